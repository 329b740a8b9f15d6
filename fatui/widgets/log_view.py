"""The lines of the journal: filtered, paused, and scrolled without losing their place."""

from typing import ClassVar, Final

from rich.segment import Segment
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from fatui.journal import Journal, Line
from fatui.widgets.row_table import clip

LEVELS: Final = ("info", "warning", "error")


class LogView(ScrollView, can_focus=True):
    """View of a journal that follows its end, unless scrolled up or paused.

    Attributes:
        needle: only lines that contain it are shown, case-insensitively.
        level: only lines of this level or a higher one are shown.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"log--time", "log--info", "log--warning", "log--error"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("home", "scroll_home", "First", show=False),
        Binding("end", "follow", "Last, and follow", show=False),
    ]

    def __init__(self, journal: Journal, *, id: str) -> None:
        super().__init__(id=id)
        self.journal = journal
        self.needle = ""
        self.level = "info"
        self.paused = False
        self._lines: list[Line] = []
        self._read = 0
        self._following = True

    def _passes(self, line: Line) -> bool:
        return LEVELS.index(line.level) >= LEVELS.index(self.level) and self.needle.lower() in line.text.lower()

    def update_lines(self) -> None:
        """Show the lines added to the journal since the last call."""
        if self.paused or self._read == self.journal.count:
            return
        fresh = [line for line in self.journal.since(self._read) if self._passes(line)]
        self._read = self.journal.count
        if not fresh:
            return
        self._lines.extend(fresh)
        surplus = len(self._lines) - len(self.journal) if len(self._lines) > len(self.journal) else 0
        del self._lines[:surplus]
        self._lay_out(surplus)

    def filter(self, needle: str, level: str) -> None:
        """Show only the lines that match a word and a level."""
        if (needle, level) != (self.needle, self.level):
            self.needle, self.level = needle, level
            self._lines = [line for line in self.journal.since(0) if self._passes(line)]
            self._read = self.journal.count
            self._following = True
            self._lay_out(0)

    def _lay_out(self, removed: int) -> None:
        self.virtual_size = Size(self._width, len(self._lines))
        if self._following:
            # The maximum offset is known only after layout with the new size.
            self.call_after_refresh(self.scroll_end, animate=False, immediate=True)
        elif removed:
            self.scroll_to(y=max(0, self.scroll_offset.y - removed), animate=False, immediate=True)
        self.refresh()

    @property
    def held_back(self) -> int:
        """Number of lines held back while paused."""
        return self.journal.count - self._read

    def action_follow(self) -> None:
        """Scroll to the end, and follow it again."""
        self._following = True
        self.scroll_end(animate=False)

    def watch_scroll_y(self, old: float, new: float) -> None:
        """Stop following when scrolled up; follow again at the end."""
        super().watch_scroll_y(old, new)
        if new < old or new >= self.max_scroll_y:
            # Scrolling down without reaching an end that has moved is not a reason to stop following.
            self._following = new >= self.max_scroll_y

    @property
    def _width(self) -> int:
        return self.scrollable_content_region.width

    def on_resize(self) -> None:
        """Stay at the end if following."""
        self._lay_out(0)

    def render_line(self, y: int) -> Strip:
        """Draw one line; the level is shown as a word as well as by colour."""
        width = self._width
        index = y + self.scroll_offset.y
        if index >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        line = self._lines[index]
        level = "" if line.level == "info" else f"{line.level}: "
        parts = [
            Segment(f"{line.at}  ", self.get_component_rich_style("log--time")),
            Segment(clip(level + line.text, width - 10), self.get_component_rich_style(f"log--{line.level}")),
        ]
        return Strip(parts).adjust_cell_length(width, self.rich_style)
