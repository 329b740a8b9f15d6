"""A table that draws only its visible rows, and pages through its columns when they do not all fit."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Final

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from fatui.tui.painting import KeepsStyles, set_scroll_size
from fatui.tui.view_models.table_lines import TableColumn, TableLine
from fatui.untrusted_text import clip

GAP: Final = 2


class RowTable(ScrollView, KeepsStyles, can_focus=True):
    """Table of lines; up and down move the cursor, left and right page through the columns."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("table--head", "table--cursor", "table--cursor-unfocused", "table--row", "table--dim"),
        *("table--good", "table--bad", "table--block"),
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "move(-10)", "Ten up", show=False),
        Binding("pagedown", "move(10)", "Ten down", show=False),
        Binding("home", "move(-1000000)", "First", show=False),
        Binding("end", "move(1000000)", "Last", show=False),
        Binding("left", "turn(-1)", "Columns before", show=False),
        Binding("right", "turn(1)", "More columns", show=False),
        Binding("enter", "choose", "Open what the cursor is on", show=False),
    ]

    class Highlighted(Message):
        """Posted when the cursor is on another line: it moved, or its line is no longer shown."""

        def __init__(self, table: "RowTable", key: str | None) -> None:
            super().__init__()
            self.table, self.key = table, key

        @property
        def control(self) -> "RowTable":
            """The table."""
            return self.table

    class Chosen(Highlighted):
        """Posted when enter was pressed on a line, or it was double-clicked."""

    class Turned(Message):
        """Posted when another page of columns is shown."""

    class HeadClicked(Message):
        """Posted when the heading of a column was clicked."""

        def __init__(self, table: "RowTable", column: str) -> None:
            super().__init__()
            self.table, self.column = table, column

        @property
        def control(self) -> "RowTable":
            """The table."""
            return self.table

    def __init__(self, columns: Sequence[TableColumn], *, empty: str = "", id: str) -> None:
        super().__init__(id=id)
        self.columns = tuple(columns)
        self.lines: tuple[TableLine, ...] = ()
        self.empty = empty
        self.page = 0
        self.sorted_by = ""
        self.descending = False
        self._cursor = 0
        self._widths: dict[str, int] = {}
        self._longest: dict[str, int] = {}
        self._paged: tuple[object, list[tuple[TableColumn, ...]]] = (None, [])
        """The pages, with what they were made for."""
        self._drawn: list[tuple[TableColumn, int]] = []
        """The visible columns with their widths, found once for all lines of a repaint."""

    def show(self, lines: Sequence[TableLine], *, sorted_by: str = "", descending: bool = False) -> None:
        """Set the lines; the cursor stays on its line if that still exists."""
        shown = tuple(lines)
        if (shown, sorted_by, descending) == (self.lines, self.sorted_by, self.descending):
            return
        key, before, widths, cursor = self.key, self.lines, dict(self._widths), self._cursor
        same_head = (sorted_by, descending) == (self.sorted_by, self.descending)
        self.lines, self.sorted_by, self.descending = shown, sorted_by, descending
        self._measure()
        self._cursor = next((index for index, line in enumerate(shown) if line.key == key), 0) if key else 0
        if self._cursor == 0 and self.lines and self.lines[0].key is None:
            self._cursor = self._nearest(0, 1)
        if self.key != key:  # a filter or a deletion took the line away
            self.call_later(self._post_highlighted)  # a message made in a handler of the pane would end at the pane
        set_scroll_size(self, Size(self._width, len(self.lines) + 1))
        if len(before) == len(shown) and same_head and widths == self._widths and cursor == self._cursor:
            self._refresh_lines(index for index, line in enumerate(shown) if line != before[index])
        else:
            self.refresh()

    def _post_highlighted(self) -> None:
        self.post_message(self.Highlighted(self, self.key))

    def _refresh_lines(self, indices: Iterable[int]) -> None:
        """Repaint single lines, which have to be as wide as before."""
        places = (index + 1 - self.scroll_offset.y for index in indices)
        regions = [Region(0, y, self.size.width, 1) for y in places if 0 < y < self.size.height]
        if regions:
            self.refresh(*regions)

    def _measure(self) -> None:
        for column in self.columns:
            cells = [len(line.cells.get(column.name, "")) for line in self.lines]
            self._longest[column.name] = max(cells, default=0)
            self._widths[column.name] = min(
                max(len(column.title) + (column.name == self.sorted_by), column.least, *cells, 1), column.widest
            )

    @property
    def last_row(self) -> int:
        """Number of lines up to the last row; notes and a chart may follow it."""
        return max((number for number, line in enumerate(self.lines, 1) if line.key is not None), default=0)

    @property
    def key(self) -> str | None:
        """The key of the line under the cursor."""
        return self.lines[self._cursor].key if 0 <= self._cursor < len(self.lines) else None

    def go_to(self, key: str) -> None:
        """Move the cursor to the line with a key."""
        found = next((index for index, line in enumerate(self.lines) if line.key == key), None)
        if found is not None:
            self._put_cursor(found)

    def _put_cursor(self, index: int) -> None:
        self._cursor = index
        self.scroll_to_region(Region(0, index, 1, 2), animate=False, force=True)
        self.refresh()
        self.post_message(self.Highlighted(self, self.key))

    def jump_spots(self) -> list[tuple[int, int, Callable[[], object]]]:
        """Return the place of each visible line that can be chosen."""
        top = self.scroll_offset.y
        seen = [index for index, line in enumerate(self.lines) if line.key is not None and index >= top]
        return [(0, index - top + 1, partial(self._jump_to, index)) for index in seen]

    def _jump_to(self, index: int) -> None:
        self.focus()
        self._put_cursor(index)

    def _nearest(self, index: int, direction: int) -> int:
        """Return the first selectable line from an index on, or the cursor's own if there is none."""
        while 0 <= index < len(self.lines):
            if self.lines[index].key is not None:
                return index
            index += direction
        return self._cursor

    def action_move(self, count: int) -> None:
        """Move the cursor over selectable lines."""
        if not self.lines:
            return
        target = min(max(self._cursor + count, 0), len(self.lines) - 1)
        direction = 1 if count > 0 else -1
        found = self._nearest(target, direction)
        if self.lines[found].key is None or found == self._cursor:
            found = self._nearest(target, -direction)
        if found == self._cursor:  # beyond the last row there may be notes, before the first a heading
            self.scroll_relative(y=count, animate=False)
        else:
            self._put_cursor(found)

    def action_turn(self, count: int) -> None:
        """Turn to the next or previous page of columns."""
        page = min(max(self.page + count, 0), len(self.pages) - 1)
        if page != self.page:
            self.page = page
            self.refresh()
            self.post_message(self.Turned())

    def action_choose(self) -> None:
        """Choose the line under the cursor."""
        if self.key is not None:
            self.post_message(self.Chosen(self, self.key))

    @property
    def pages(self) -> list[tuple[TableColumn, ...]]:
        """The columns, grouped by rank into pages that fit; each page starts with the first column."""
        used = tuple(each for each in self.columns[1:] if not each.optional or self._longest.get(each.name))
        whole = self._width
        made_for = whole, self.columns[0], used, tuple(map(self._width_of, used)), self._width_of(self.columns[0])
        if self._paged[0] != made_for:
            self._paged = made_for, self._make_pages(whole, used)
        return self._paged[1]

    def _make_pages(self, whole: int, used: Sequence[TableColumn]) -> list[tuple[TableColumn, ...]]:
        first, rest = self.columns[0], sorted(used, key=lambda column: column.rank)
        groups, room = [[first]], whole - self._width_of(first)
        for column in rest:
            width = self._width_of(column)
            if column.narrowest is not None:
                width = min(width, max(room - GAP, column.narrowest))
            if width + GAP > room and len(groups[-1]) > 1:
                groups.append([first])
                room = whole - self._width_of(first)
            groups[-1].append(column)
            room -= width + GAP
        order = {column.name: index for index, column in enumerate(self.columns)}
        return [tuple(sorted(group, key=lambda column: order[column.name])) for group in groups]

    def _width_of(self, column: TableColumn) -> int:
        return self._widths.get(column.name, len(column.title))

    def _fitted(self, columns: Sequence[TableColumn]) -> list[int]:
        """Return the width of each column of a page; a shrinkable column takes the space that the others leave."""
        widths = [self._width_of(each) for each in columns]
        spare = self._width - sum(widths) - GAP * (len(columns) - 1)
        for index, column in enumerate(columns):
            if column.narrowest is not None:
                longest = max(self._longest.get(column.name, 0), widths[index])
                widths[index] = min(max(widths[index] + spare, min(widths[index], column.narrowest)), longest)
        return widths

    @property
    def shown_columns(self) -> tuple[TableColumn, ...]:
        """The visible columns."""
        pages = self.pages
        return pages[min(self.page, len(pages) - 1)]

    @property
    def hint(self) -> str:
        """The keys that show the other columns, and the page; empty if all columns are visible."""
        pages = len(self.pages)
        if pages == 1 or not self.lines:
            return ""
        page = min(self.page, pages - 1)
        keys = "→ more columns" if page == 0 else "← columns before" if page == pages - 1 else "← → more columns"
        return f"{keys}, {page + 1} of {pages}"

    def on_resize(self) -> None:
        """Keep the page number in range."""
        self.page = min(self.page, len(self.pages) - 1)
        set_scroll_size(self, Size(self._width, len(self.lines) + 1))

    def on_click(self, event: events.Click) -> None:
        """Move the cursor, or post that a heading was clicked."""
        if event.y == 0:
            at, columns = 0, self.shown_columns
            for column, width in zip(columns, self._fitted(columns), strict=True):
                at += width + GAP
                if event.x < at:
                    self.post_message(self.HeadClicked(self, column.name))
                    return
            return
        index = event.y - 1 + self.scroll_offset.y
        if index < len(self.lines) and self.lines[index].key is not None:
            again = index == self._cursor and event.chain > 1
            self._put_cursor(index)
            if again:
                self.action_choose()

    @property
    def _width(self) -> int:
        return self.scrollable_content_region.width

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draw some lines."""
        columns = self.shown_columns
        self._drawn = list(zip(columns, self._fitted(columns), strict=True))
        return super().render_lines(crop)

    def _text(self, cells: Mapping[str, str]) -> str:
        parts = []
        for column, width in self._drawn:
            text = clip(cells.get(column.name, ""), width)
            parts.append(f"{text:>{width}}" if column.right else f"{text:<{width}}")
        return (" " * GAP).join(parts)

    def _head(self) -> str:
        arrow = "▼" if self.descending else "▲"
        titles = {
            column.name: column.title + (arrow if column.name == self.sorted_by else "") for column in self.columns
        }
        return self._text(titles)

    def render_line(self, y: int) -> Strip:
        """Draw the heading, which does not scroll, or one line."""
        width = self.room.width
        if y == 0 and self.lines:
            return self._strip(self._head(), "head")
        index = y - 1 + self.scroll_offset.y
        if not self.lines:
            message = textwrap.wrap(self.empty, max(10, width - 2))
            return self._strip(f" {message[y]}" if y < len(message) else "", "dim")
        if index >= len(self.lines):
            return Strip.blank(width, self.part_style())
        line = self.lines[index]
        text = clip(line.span, width) if line.span is not None else self._text(line.cells)
        if index == self._cursor and line.key is not None:
            return self._strip(text, "cursor" if self.has_focus else "cursor-unfocused")
        return self._strip(text, {"": "row", "head": "block"}.get(line.tone, line.tone))

    def _strip(self, text: str, part: str) -> Strip:
        style = self.part_style(f"table--{part}")
        return Strip([Segment(text, style)]).adjust_cell_length(self.room.width, style)
