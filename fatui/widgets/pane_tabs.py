"""Tabs shown instead of side-by-side panes on narrow terminals."""

from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

TABS = (("setup", "Set up"), ("live", "Live"), ("results", "Results"), ("log", "Log"))


class PaneTabs(Widget):
    """Row of tabs; a click opens one."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"tabs--open", "tabs--other"}
    DEFAULT_CSS = "PaneTabs { height: 1; }"

    class Opened(Message):
        """Posted when a tab was clicked."""

        def __init__(self, tab: str) -> None:
            super().__init__()
            self.tab = tab

    def __init__(self, *, id: str = "tabs") -> None:
        super().__init__(id=id)
        self.tab = TABS[0][0]

    def show(self, tab: str) -> None:
        """Mark a tab as open."""
        self.tab = tab
        self.refresh()

    @staticmethod
    def _title(name: str, title: str, tab: str) -> str:
        return f" [{title}] " if name == tab else f"  {title}  "

    def render_line(self, y: int) -> Strip:
        """Draw the row; brackets mark the open tab without colour."""
        opened, other = (self.get_component_rich_style(f"tabs--{part}") for part in ("open", "other"))
        parts = [
            Segment(self._title(name, title, self.tab), opened if name == self.tab else other) for name, title in TABS
        ]
        return Strip([*parts, Segment("  [ and ] turn", other)]).adjust_cell_length(self.size.width, other)

    def on_click(self, event: events.Click) -> None:
        """Open the clicked tab."""
        at = 0
        for name, title in TABS:
            at += len(self._title(name, title, self.tab))
            if event.x < at:
                self.post_message(self.Opened(name))
                return
