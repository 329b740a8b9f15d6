"""The log and its filter, which opens above it."""

from typing import ClassVar, Final

from rich.segment import Segment
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from fatui.tui.terminal import literal
from fatui.tui.view_models.journal import Log, LogLine
from fatui.tui.widgets.row_table import clip

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

    def __init__(self, journal: Log, *, id: str) -> None:
        super().__init__(id=id)
        self.journal = journal
        self.needle = ""
        self.level = "info"
        self.paused = False
        self._lines: list[LogLine] = []
        self._read = 0
        self._following = True

    def _passes(self, line: LogLine) -> bool:
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


HINT = "word to find; start with warning: or error: for a level"


class LogPane(Vertical):
    """Pane with the journal; the title gives the filter and the number of lines held back."""

    DEFAULT_CSS = "LogPane Input { height: 1; border: none; padding: 0 1; } LogPane LogView { height: 1fr; }"

    def __init__(self, journal: Log, *, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.journal = journal
        self._title = ""

    def compose(self) -> ComposeResult:
        """Yield the lines; the filter is mounted when it is opened."""
        yield LogView(self.journal, id="log-view")

    @property
    def view(self) -> LogView:
        """The view of the lines."""
        return self.query_one(LogView)

    def refresh_lines(self) -> None:
        """Show new lines and update the title."""
        view = self.view
        view.update_lines()
        parts = ["5 Log"]
        if view.needle or view.level != "info":
            what = [f"'{view.needle}'"] if view.needle else []
            parts.append(f"only {', '.join([*what, *([f'{view.level}s'] if view.level != 'info' else [])])}")
        if view.paused:
            parts.append(f"paused, {view.held_back} held back")
        title = " · ".join(parts)
        if self._title != title:
            self._title = title
            self.border_title = literal(title)

    def toggle_pause(self) -> None:
        """Pause, or continue and show what was held back."""
        self.view.paused = not self.view.paused
        self.refresh_lines()

    def ask(self) -> None:
        """Open the filter, which takes a word, a level, or both: "error: poc"."""
        if self.query(Input):
            self.query_one(Input).focus()
            return
        field = Input(self.view.needle, placeholder=HINT, compact=True)
        self.mount(field, before=self.view)
        field.focus()

    @on(Input.Changed)
    def _filter(self, event: Input.Changed) -> None:
        event.stop()
        text, level = event.value.strip(), "info"
        for each in LEVELS:
            if text.lower().startswith(f"{each}:"):
                text, level = text[len(each) + 1 :].strip(), each
        self.view.filter(text, level)
        self.refresh_lines()

    @on(Input.Submitted)
    def _close(self, event: Input.Submitted) -> None:
        event.stop()
        event.input.remove()
        self.view.focus()

    def key_escape(self) -> None:
        """Close the filter and show all lines."""
        if self.query(Input):
            self.query_one(Input).remove()
            self.view.filter("", "info")
            self.view.focus()
            self.refresh_lines()
