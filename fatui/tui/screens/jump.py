"""Jump mode: a letter on everything that can be reached; pressing it goes there."""

from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple, Protocol, runtime_checkable

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Static

from fatui.tui.screens.base import AppScreen

LETTERS: Final = "asdfghjklqwertyuiopzxcvbnm123456789"


@runtime_checkable
class OffersSpots(Protocol):
    """A widget with several places to jump to."""

    def jump_spots(self) -> list[tuple[int, int, Callable[[], object]]]:
        """Return the column and row of each place inside the widget, and what goes there."""
        ...


class Spot(NamedTuple):
    """A place to jump to."""

    letter: str
    x: int
    y: int
    go: Callable[[], object]


def spots_of(screen: Screen[Any]) -> list[Spot]:
    """Return the visible places of a screen from top to bottom, column by column of panes, each with a letter."""
    found: list[tuple[int, int, Callable[[], object]]] = []
    for widget in screen.query(Widget):
        region = widget.content_region
        if not widget.display or not all(each.display for each in widget.ancestors if isinstance(each, Widget)):
            continue
        inside = screen.size.region.intersection(region)
        parents = [each.region for each in widget.ancestors if isinstance(each, Widget) and each is not screen]
        for parent in parents:
            inside = inside.intersection(parent)
        if isinstance(widget, OffersSpots):
            places = [(region.x + x, region.y + y, go) for x, y, go in widget.jump_spots()]
        elif widget.focusable:
            places = [(region.x, region.y, widget.focus)]
        else:
            continue
        found += [place for place in places if inside.contains(place[0], place[1])]
    return [Spot(letter, *place) for letter, place in zip(LETTERS, found, strict=False)]


class Jump(AppScreen, ModalScreen[Spot]):
    """Overlay with the letters; any other key closes it."""

    CSS_PATH: ClassVar = ["jump.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", show=False, id="back"),
        Binding("semicolon", "close", "Close", show=False, id="jump"),
    ]

    def __init__(self, spots: list[Spot]) -> None:
        super().__init__()
        self.spots = spots

    def compose(self) -> ComposeResult:
        """Yield a label for each place."""
        for spot in self.spots:
            label = Static(f"[{spot.letter}]", markup=False, classes="jump-label")
            label.styles.offset = spot.x, spot.y
            yield label

    def on_key(self, event: events.Key) -> None:
        """Choose the place of a letter."""
        spot = next((each for each in self.spots if each.letter == event.character), None)
        if spot is not None:
            event.stop()
            self.dismiss(spot)

    def on_click(self) -> None:
        """Close on a click."""
        self.dismiss()

    def on_resize(self, event: events.Resize) -> None:
        """Close when the places have moved."""
        if event.size != self.app.size:
            self.dismiss()

    def action_close(self) -> None:
        """Close without going anywhere."""
        self.dismiss()
