"""The log and its search, which opens above it."""

import textwrap
from collections.abc import Sequence
from typing import ClassVar, Final

from rich.segment import Segment
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from fatui.tui.painting import KeepsStyles, set_scroll_size, set_title
from fatui.tui.view_models.journal import Log, LogLine
from fatui.untrusted_text import clip

LEVELS: Final = ("info", "warning", "error")
EMPTY: Final = "What happens in a run is written here: steps, paths, problems."
TIME_WIDTH: Final = 10
"""Columns of the time and the gap after it."""


class LogView(ScrollView, KeepsStyles, can_focus=True):
    """View of a journal that wraps its lines and follows its end, unless scrolled up or paused.

    Attributes:
        needle: the word to search for, case-insensitively.
        level: only lines of this level or a higher one are shown.
        cursor: index of the line that enter opens; None while the end is followed.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("log--time", "log--info", "log--warning", "log--error", "log--cursor", "log--match"),
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Line before", show=False),
        Binding("down,j", "move(1)", "Next line", show=False),
        Binding("pageup", "move(-10)", "Ten lines before", show=False),
        Binding("pagedown", "move(10)", "Ten lines on", show=False),
        Binding("home", "move(-1000000)", "First line", show=False),
        Binding("end", "follow", "Last line, and follow", show=False),
        Binding("enter", "open", "Open the line", show=False),
        Binding("n", "search(1)", "Next match", show=False),
        Binding("N", "search(-1)", "Match before", show=False),
    ]

    class Opened(Message):
        """Posted when a line is to be shown whole."""

        def __init__(self, line: LogLine) -> None:
            super().__init__()
            self.line = line

    def __init__(self, journal: Log, *, id: str) -> None:
        super().__init__(id=id)
        self.journal = journal
        self.needle = ""
        self.level = "info"
        self.paused = False
        self.cursor: int | None = None
        self._lines: list[LogLine] = []
        self._starts: list[int] = []
        """The first row of each line."""
        self._rows: list[tuple[int, str]] = []
        """The wrapped text, each row with the index of its line."""
        self._wrapped_to = 0
        self._read = 0
        self._following = True

    def take_over(self, other: "LogView") -> None:
        """Show the lines that another view shows, as it shows them."""
        self.needle, self.level, self.paused, self.cursor = other.needle, other.level, other.paused, other.cursor
        self._read, self._following = other._read, other._following
        self._append(other._lines)  # wrapped again once there is a width

    def _passes(self, line: LogLine) -> bool:
        return LEVELS.index(line.level) >= LEVELS.index(self.level)

    def _matches(self, line: LogLine) -> bool:
        return bool(self.needle) and self.needle.lower() in line.text.lower()

    @property
    def matches(self) -> int:
        """Number of lines with the word searched for."""
        return sum(map(self._matches, self._lines))

    def update_lines(self) -> None:
        """Show the lines added to the journal since the last call."""
        if self._lines and self._width != self._wrapped_to:
            self.on_resize()  # a scroll bar has come, which posts no event
        if self.paused or self._read == self.journal.count:
            return
        fresh = [line for line in self.journal.since(self._read) if self._passes(line)]
        self._read = self.journal.count
        if not fresh:
            return
        surplus = max(0, len(self._lines) + len(fresh) - len(self.journal))
        if surplus:
            self._lines = [*self._lines, *fresh][surplus:]
            gone = self._starts[surplus] if surplus < len(self._starts) else len(self._rows)
            self.cursor = None if self.cursor is None else max(0, self.cursor - surplus)
            self._wrap()
            self._lay_out(gone)
        else:
            self._append(fresh)
            self._lay_out(0)

    def _append(self, lines: Sequence[LogLine]) -> None:
        width = max(10, self._wrapped_to - TIME_WIDTH)
        for line in lines:
            self._starts.append(len(self._rows))
            text = _leveled(line)
            parts = [text] if len(text) <= width else textwrap.wrap(text, width) or [""]
            self._rows += [(len(self._lines), part) for part in parts]
            self._lines.append(line)

    def _wrap(self) -> None:
        """Wrap all lines to the present width."""
        lines, self._lines, self._starts, self._rows = self._lines, [], [], []
        self._wrapped_to = self._width
        self._append(lines)

    def show_level(self, level: str) -> None:
        """Show only the lines of a level or a higher one."""
        if level != self.level:
            self.level = level
            self._lines = [line for line in self.journal.since(0) if self._passes(line)]
            self._read = self.journal.count
            self._following, self.cursor = True, None
            self._wrap()
            self._lay_out(0)

    def _lay_out(self, removed: int) -> None:
        set_scroll_size(self, Size(self._width, len(self._rows)))
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
        self._following, self.cursor = True, None
        self.scroll_end(animate=False)
        self.refresh()

    def action_move(self, count: int) -> None:
        """Move the cursor over lines; it begins at the last one that is visible."""
        if not self._lines:
            return
        here = self.cursor
        if here is None:
            bottom = min(self.scroll_offset.y + self.size.height, len(self._rows)) - 1
            here = self._rows[bottom][0] + (1 if count < 0 else 0)
        self._put_cursor(min(max(here + count, 0), len(self._lines) - 1))

    def _put_cursor(self, index: int) -> None:
        self.cursor = index
        self._following = False
        end = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._rows)
        region = Region(0, self._starts[index], 1, min(end - self._starts[index], max(1, self.size.height)))
        self.scroll_to_region(region, animate=False, force=True)
        self.refresh()

    def action_search(self, step: int) -> None:
        """Go to the next or the previous line with the word searched for, round the ends."""
        found = [index for index, line in enumerate(self._lines) if self._matches(line)]
        if not found:
            return
        here = self.cursor if self.cursor is not None else len(self._lines) if step < 0 else -1
        beyond = [index for index in found if (index > here if step > 0 else index < here)]
        self._put_cursor((beyond or found)[0 if step > 0 else -1])

    def action_open(self) -> None:
        """Open the line under the cursor, or the last one."""
        if self._lines:
            self.post_message(self.Opened(self._lines[-1 if self.cursor is None else self.cursor]))

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to a line; a double click opens it."""
        row = event.y + self.scroll_offset.y
        if row < len(self._rows):
            self.cursor = self._rows[row][0]
            self.refresh()
            if event.chain > 1:
                self.action_open()

    def watch_scroll_y(self, old: float, new: float) -> None:
        """Stop following when scrolled up; follow again at the end, unless the cursor is on a line."""
        super().watch_scroll_y(old, new)
        if new < old or new >= self.max_scroll_y:
            # Scrolling down without reaching an end that has moved is not a reason to stop following.
            self._following = new >= self.max_scroll_y and self.cursor is None

    @property
    def _width(self) -> int:
        return self.scrollable_content_region.width

    def on_resize(self) -> None:
        """Wrap to the new width, keep the line at the top, and stay at the end if following."""
        if self._width == self._wrapped_to:
            self._lay_out(0)
            return
        top = self._rows[self.scroll_offset.y][0] if self.scroll_offset.y < len(self._rows) else 0
        self._wrap()
        self._lay_out(0)
        if not self._following and self._starts:
            self.call_after_refresh(self.scroll_to, y=self._starts[top], animate=False, immediate=True)

    def render_line(self, y: int) -> Strip:
        """Draw one row; the level is shown as a word as well as by colour."""
        width = self._width
        row = y + self.scroll_offset.y
        if not self._rows and not self._lines and not self.needle:
            words = textwrap.wrap(EMPTY, max(10, width))
            parts = [Segment(words[row], self.part_style("log--time"))] if row < len(words) else []
            return Strip(parts).adjust_cell_length(width, self.part_style())
        if row >= len(self._rows):
            return Strip.blank(width, self.part_style())
        index, text = self._rows[row]
        line = self._lines[index]
        first = self._starts[index] == row
        part = "cursor" if index == self.cursor else "match" if self._matches(line) else line.level
        parts = [
            Segment(f"{line.at}  " if first else " " * TIME_WIDTH, self.part_style("log--time")),
            Segment(clip(text, width - TIME_WIDTH), self.part_style(f"log--{part}")),
        ]
        return Strip(parts).adjust_cell_length(width, self.part_style())


def _leveled(line: LogLine) -> str:
    return line.text if line.level == "info" else f"{line.level}: {line.text}"


HINT = "word to find, then n and N; start with warning: or error: for a level"


class LogPane(Vertical):
    """Pane with the journal; the title gives the filter and the number of lines held back."""

    DEFAULT_CSS = "LogPane Input { height: 1; border: none; padding: 0 1; } LogPane LogView { height: 1fr; }"

    def __init__(self, journal: Log, *, id: str, like: "LogPane | None" = None) -> None:
        """Create the pane; `like`: another one in whose place it comes."""
        super().__init__(id=id, classes="pane")
        self.journal = journal
        self._title = ""
        self.view = LogView(journal, id="log-view")
        """The view of the lines."""
        if like is not None:
            self.set_classes(like.classes)
            self.view.take_over(like.view)

    def compose(self) -> ComposeResult:
        """Yield the lines; the search is mounted when it is opened."""
        yield self.view

    def refresh_lines(self) -> None:
        """Show new lines and update the title."""
        view = self.view
        view.update_lines()
        parts = ["5 Log"]
        if view.level != "info":
            parts.append(f"only {view.level}s" if view.level == "error" else "only warnings and errors")
        if view.needle:
            count = view.matches
            parts.append(f"{count} line{'' if count == 1 else 's'} with '{view.needle}', n and N")
        if view.paused:
            parts.append(f"paused, {view.held_back} held back")
        title = " · ".join(parts)
        if self._title != title:
            self._title = title
            set_title(self, title)

    def toggle_pause(self) -> None:
        """Pause, or continue and show what was held back."""
        self.view.paused = not self.view.paused
        self.refresh_lines()

    def ask(self) -> None:
        """Open the search, which takes a word, a level, or both: "error: poc"."""
        if self.query(Input):
            self.query_one(Input).focus()
            return
        field = Input(self.view.needle, placeholder=HINT, compact=True)
        self.mount(field, before=self.view if self.view.parent else None)  # a pane just placed has no children yet
        field.focus()

    @on(Input.Changed)
    def _filter(self, event: Input.Changed) -> None:
        event.stop()
        text, level = event.value.strip(), "info"
        for each in LEVELS:
            if text.lower().startswith(f"{each}:"):
                text, level = text[len(each) + 1 :].strip(), each
        self.view.show_level(level)
        self.view.needle = text
        self.view.refresh()
        self.refresh_lines()

    @on(Input.Submitted)
    def _close(self, event: Input.Submitted) -> None:
        event.stop()
        event.input.remove()
        self.view.focus()
        if self.view.needle:
            self.view.action_search(-1)

    def key_escape(self) -> None:
        """Close the search and show all lines."""
        if self.query(Input):
            self.query_one(Input).remove()
            self.view.show_level("info")
            self.view.needle = ""
            self.view.focus()
            self.refresh_lines()
