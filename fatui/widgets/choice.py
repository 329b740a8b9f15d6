"""A choice of one word among a few, on one row."""

from collections.abc import Callable
from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget


class Choice(Widget, can_focus=True):
    """Chooses one of its options; digits that are typed make an option where `typed_option` is given."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"choice--label", "choice--value"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Previous", show=False),
        Binding("right,space,enter", "step(1)", "Next", show=False),
        Binding("home", "end(0)", "First", show=False),
        Binding("end", "end(-1)", "Last", show=False),
    ]
    DEFAULT_CSS = "Choice { height: 1; }"

    class Changed(Message):
        """The person chose another option."""

        def __init__(self, choice: "Choice", value: str) -> None:
            super().__init__()
            self.choice, self.value = choice, value

    def __init__(
        self, label: str, options: tuple[str, ...], *, id: str, typed_option: Callable[[str], str] | None = None
    ) -> None:
        super().__init__(id=id)
        self.label = label
        self.options = options
        self.value = options[0]
        self._typed_option = typed_option
        self._typed = ""

    def show(self, value: str) -> None:
        """Sets the value without a message."""
        if value != self.value:
            self.value = value
            self.refresh()

    def _choose(self, value: str) -> None:
        if value != self.value:
            self.value = value
            self.refresh()
            self.post_message(self.Changed(self, value))

    def action_step(self, count: int) -> None:
        """Goes to the next option, around the end; from a typed one to the first."""
        index = self.options.index(self.value) + count if self.value in self.options else 0
        self._choose(self.options[index % len(self.options)])

    def action_end(self, index: int) -> None:
        """Goes to the first option or the last."""
        self._choose(self.options[index])

    def on_key(self, event: events.Key) -> None:
        """Makes an option from typed digits, each of which adds to those before."""
        if self._typed_option is None or not (event.character or "").isdigit():
            self._typed = ""
            return
        event.stop()
        self._typed = (self._typed + (event.character or "")).lstrip("0")[:8]
        if self._typed:
            self._choose(self._typed_option(self._typed))

    def on_blur(self) -> None:
        """Ends a typed value."""
        self._typed = ""

    def on_click(self, event: events.Click) -> None:
        """Goes to the next option; on the label's side of the word, to the one before."""
        self.action_step(-1 if event.x <= len(self.label) + 1 else 1)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Goes to the next option."""
        event.stop()
        event.prevent_default()
        self.action_step(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Goes to the option before."""
        event.stop()
        event.prevent_default()
        self.action_step(-1)

    def render_line(self, y: int) -> Strip:
        """Draws the row."""
        label = self.get_component_rich_style("choice--label")
        value = self.get_component_rich_style("choice--value")
        left, right = ("‹", "›") if self.has_focus else (" ", " ")
        parts = [Segment(f"{self.label} ", label), Segment(f"{left}{self.value}{right}", value)]
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)
