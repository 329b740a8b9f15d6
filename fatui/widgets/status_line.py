"""The top row: what is set up and on which machine, with the phase on the right."""

from typing import ClassVar

from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget

from fatui.widgets.row_table import clip

GAP = 2


class StatusLine(Widget):
    """Row of two texts; the left one is cut if both do not fit."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"status--name", "status--left", "status--right", "status--alarm"}
    DEFAULT_CSS = "StatusLine { height: 1; dock: top; }"

    def __init__(self, *, id: str = "status") -> None:
        super().__init__(id=id)
        self.left, self.right, self.alarm = "", "", False

    def show(self, left: str, right: str, *, alarm: bool = False) -> None:
        """Set the texts; an alarm is highlighted."""
        if (left, right, alarm) != (self.left, self.right, self.alarm):
            self.left, self.right, self.alarm = left, right, alarm
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        name, left, right, alarm = (
            self.get_component_rich_style(f"status--{part}") for part in ("name", "left", "right", "alarm")
        )
        end = clip(self.right, max(0, self.size.width - 12))
        room = self.size.width - len(" fatui  ") - len(end) - GAP - 1
        middle = f"{clip(self.left, room):<{max(0, room)}}" + " " * GAP
        parts = [
            Segment(" fatui ", name),
            Segment(f" {middle}", left),
            Segment(f"{end} ", alarm if self.alarm else right),
        ]
        return Strip(parts).adjust_cell_length(self.size.width, left)
