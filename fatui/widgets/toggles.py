"""Several words on one row, each selected or not."""

from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget


class Toggles(Widget, can_focus=True):
    """Row of words; left and right move, space or a click selects or deselects, though never the last one selected."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"picker--on", "picker--off", "picker--cursor"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Previous", show=False),
        Binding("right", "move(1)", "Next", show=False),
        Binding("space,enter", "take", "Select or deselect", show=False),
    ]
    DEFAULT_CSS = "Toggles { height: 1; }"

    class Changed(Message):
        """Posted when a word was selected or deselected."""

    def __init__(self, options: tuple[str, ...], chosen: tuple[str, ...], *, id: str) -> None:
        super().__init__(id=id)
        self.options = options
        self.chosen = chosen
        self._cursor = 0

    def action_move(self, count: int) -> None:
        """Move to another word, wrapping around."""
        self._cursor = (self._cursor + count) % len(self.options)
        self.refresh()

    def action_take(self) -> None:
        """Select or deselect the word under the cursor."""
        word = self.options[self._cursor]
        chosen = tuple(each for each in self.options if (each in self.chosen) != (each == word))
        if chosen:
            self.chosen = chosen
            self.post_message(self.Changed())
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Select or deselect the clicked word."""
        at = 0
        for index, word in enumerate(self.options):
            at += len(word) + 4
            if event.x < at:
                self._cursor = index
                self.action_take()
                return

    def on_focus(self) -> None:
        """Show the cursor."""
        self.refresh()

    def on_blur(self) -> None:
        """Hide the cursor."""
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        on, off, cursor = (self.get_component_rich_style(f"picker--{part}") for part in ("on", "off", "cursor"))
        parts = []
        for index, word in enumerate(self.options):
            taken = word in self.chosen
            style = cursor if self.has_focus and index == self._cursor else on if taken else off
            parts += [Segment(f"{'●' if taken else '○'} {word}", style), Segment("  ", off)]
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)
