"""A pane with a table: its order, a filter that opens above it, and a legend of the symbols in it."""

from collections.abc import Sequence
from typing import Final

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, Static

from attention.core.results import Report
from fatui.tui.painting import set_subtitle, set_text
from fatui.tui.view_models.table_lines import TableColumn, TableLine, filtered, legend, ordered
from fatui.tui.widgets.row_table import RowTable

FEW: Final = 8
"""Lines of a table, with the heading, that a legend leaves it at least."""
BESIDE: Final = 8
"""Columns of the lower edge that its text does not use."""
HINT: Final = "only rows with this text; enter keeps it, escape shows all"


class TablePane(Vertical):
    """Pane with a table.

    Attributes:
        by: the column that orders the rows of each block; empty: as they were given.
        descending: whether the largest come first.
        needle: only rows that contain it are shown.
        reference: the implementation that speedups are shown over; None: the reference of each case.
    """

    DEFAULT_CSS = """
    TablePane > RowTable { height: 1fr; }
    TablePane > Input { height: 1; border: none; padding: 0 1; }
    TablePane > .legend { height: 1; color: $text-muted; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
    """

    class OrderChanged(Message):
        """Posted when the order was changed."""

    class ReferenceRequested(Message):
        """Posted when a row is to be the reference of the others."""

        def __init__(self, key: str) -> None:
            super().__init__()
            self.key = key

    def __init__(self, columns: Sequence[TableColumn], *, empty: str, table: str, id: str | None = None) -> None:
        """Create the pane.

        Args:
            columns: the columns of the table.
            empty: shown without rows.
            table: the id of the table.
            id: the id of the pane.
        """
        super().__init__(id=id, classes="pane half")
        self.by, self.descending, self.needle = "", True, ""
        self.reference: str | None = None
        self._over: tuple[Report, str, Report] | None = None
        self.table = RowTable(columns, empty=empty, id=table)
        """The table."""
        self._legend = Static(classes="legend", markup=False)
        self._given: Sequence[TableLine] = ()

    def compose(self) -> ComposeResult:
        """Yield the table and its legend."""
        yield self.table
        yield self._legend

    def over_reference_of(self, report: Report) -> Report:
        """Return a report as the table shows it: over the table's reference, as far as that has figures."""
        if self.reference is None:
            return report
        if self._over is None or self._over[0] is not report or self._over[1] != self.reference:
            from fatui.report.comparison import rebased_report

            self._over = report, self.reference, rebased_report(report, self.reference)
        return self._over[2]

    def show_lines(self, lines: Sequence[TableLine], columns: Sequence[TableColumn] | None = None) -> None:
        """Show lines in the pane's order, as far as they pass the filter."""
        self._given = lines
        if columns is not None and tuple(columns) != self.table.columns:
            self.table.columns = tuple(columns)
        self._draw_lines()

    def _draw_lines(self) -> None:
        shown = filtered(ordered(self._given, self.by, self.descending), self.needle)
        self.table.show(shown, sorted_by=self.by, descending=self.descending)
        words = legend(shown, [column.name for column in self.table.shown_columns])
        below = self._legend
        room = self.table.size.height + below.size.height * below.display
        below.display = bool(words) and room > min(len(shown) + 1, FEW)  # it takes no place of a few rows
        set_text(below, words)
        self.call_after_refresh(self._show_hint)

    @on(RowTable.Turned)
    def _show_page(self) -> None:
        self._draw_lines()

    def _show_hint(self) -> None:
        text, below = " · ".join(self._hints()), self._legend
        words = str(below.content)
        if words and not below.display and len(text) + len(words) + BESIDE < self.size.width:
            text = f"{text} · {words}" if text else words
        set_subtitle(self, text)

    def _hints(self) -> list[str]:
        hint = self.table.hint
        parts = [hint] if hint else []
        parts += [f"only '{self.needle}'"] if self.needle else []
        titles = {column.name: column.title for column in self.table.columns}
        if self.by in titles and self.by not in {column.name for column in self.table.shown_columns}:
            parts.append(f"sorted by {titles[self.by]}")
        return parts

    def on_resize(self) -> None:
        """Update the hint and the legend."""
        self.call_after_refresh(self._draw_lines)

    @property
    def sortable(self) -> list[tuple[str, str]]:
        """The columns that can order the rows, each with its title."""
        names = {name for line in self._given for name, figure in line.figures.items() if figure is not None}
        return [(each.name, each.title or each.name) for each in self.table.columns if each.name in names]

    def choose_order(self, by: str | None) -> None:
        """Order by a column, in the other direction if it is the present one; None changes nothing."""
        if by is not None:
            self.order_by(by, not self.descending if by == self.by else self.descending)

    def order_by(self, by: str, descending: bool) -> None:
        """Order the rows of each block by a column."""
        self.by, self.descending = by, descending
        self._draw_lines()
        self.post_message(self.OrderChanged())

    @on(RowTable.HeadClicked)
    def _order_by_clicked(self, event: RowTable.HeadClicked) -> None:
        if event.column in dict(self.sortable):
            self.choose_order(event.column)

    def reverse(self) -> None:
        """Reverse the order."""
        self.order_by(self.by, not self.descending)

    def request_reference(self) -> None:
        """Request that the row under the cursor becomes the reference."""
        if self.table.key is not None:
            self.post_message(self.ReferenceRequested(self.table.key))

    def ask_filter(self) -> None:
        """Open the filter."""
        if not self.query(".filter"):
            self.mount(Input(self.needle, placeholder=HINT, compact=True, classes="filter"), before=self.table)
        self.query_one(".filter").focus()

    @on(Input.Changed, ".filter")
    def _filter(self, event: Input.Changed) -> None:
        event.stop()
        self.needle = event.value.strip()
        self._draw_lines()

    @on(Input.Submitted, ".filter")
    def _close_filter(self, event: Input.Submitted) -> None:
        event.stop()
        event.input.remove()
        self.table.focus()

    def clear_filter(self) -> bool:
        """Close the filter and show all rows; return whether there was one."""
        if not (self.needle or self.query(".filter")):
            return False
        self.query(".filter").remove()
        self.needle = ""
        self._draw_lines()
        self.table.focus()
        return True

    def key_escape(self, event: events.Key) -> None:
        """Close the filter; without one, leave the key to the screen."""
        if self.clear_filter():
            event.stop()
            event.prevent_default()
