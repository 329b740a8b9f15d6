"""The bottom row: the keys of the current context, as many as fit, the most important first."""

from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.strip import Strip
from textual.widget import Widget

PALETTE = "^p Palette"


class KeyBar(Widget):
    """Row of keys with their labels; a click runs the key's action."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"keys--key", "keys--label"}
    DEFAULT_CSS = "KeyBar { height: 1; dock: bottom; }"

    def __init__(self, *, id: str = "key-bar", keys: tuple[tuple[str, str, str], ...] = ()) -> None:
        super().__init__(id=id)
        self.keys = keys

    def show(self, keys: tuple[tuple[str, str, str], ...]) -> None:
        """Set the keys, each a tuple of key, label and action."""
        if keys != self.keys:
            self.keys = keys
            self.refresh()

    def _fitting(self) -> tuple[tuple[str, str, str], ...]:
        room, fitting = self.size.width - len(PALETTE) - 2, []
        for key, label, action in self.keys:
            room -= len(key) + len(label) + 3
            if room < 0:
                break
            fitting.append((key, label, action))
        return tuple(fitting)

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        key_style, label_style = (self.get_component_rich_style(f"keys--{part}") for part in ("key", "label"))
        parts = []
        for key, label, _ in self._fitting():
            parts += [Segment(f" {key}", key_style), Segment(f" {label} ", label_style)]
        used = sum(len(part.text) for part in parts)
        parts.append(Segment(" " * max(1, self.size.width - used - len(PALETTE) - 1), label_style))
        parts += [Segment("^p", key_style), Segment(PALETTE[2:] + " ", label_style)]
        return Strip(parts).adjust_cell_length(self.size.width, label_style)

    async def on_click(self, event: events.Click) -> None:
        """Run the clicked action."""
        at = 0
        for key, label, action in self._fitting():
            at += len(key) + len(label) + 3
            if event.x < at:
                await self.run_action(action)
                return
        if event.x >= self.size.width - len(PALETTE) - 1:
            self.app.action_command_palette()
