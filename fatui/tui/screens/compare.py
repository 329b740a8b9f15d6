"""The screen that compares two runs."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Static

from attention.core.results import Report, Row
from fatui import formatting
from fatui.report import comparison
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.terminal import literal
from fatui.tui.view_models.table_lines import TableColumn, TableLine
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.tui.widgets.row_table import RowTable

COLUMNS = (
    TableColumn(name="implementation", title="", right=False, widest=16),
    TableColumn(name="path before", title="path before", right=False, rank=4, widest=22),
    TableColumn(name="path after", title="path after", right=False, rank=5, widest=22),
    TableColumn(name="before", title="tokens/s before", rank=2),
    TableColumn(name="after", title="after", rank=1),
    TableColumn(name="ratio", title="change", rank=0),
    TableColumn(name="memory", title="memory", rank=3, widest=24),
)
MAX_NAMED = 3
EMPTY = "These two runs have no workload and implementation in common."


class Compare(Screen[None]):
    """Screen of the rows that two runs have in common, with the ratios of their times."""

    CSS_PATH: ClassVar = ["list.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings((actions.BACK,)), actions.closing("history_compare")]
    app: Lab

    def __init__(self, before: Report, after: Report) -> None:
        super().__init__(classes="list-screen")
        self._comparison = comparison.compare(before, after)

    def compose(self) -> ComposeResult:
        """Yield the table, and below it what cannot be compared."""
        before, after = self._comparison.before.run, self._comparison.after.run
        yield StatusLine()
        with Vertical(classes="pane half") as pane:
            title = f"{before.id} of {_when(before.started)}, then {after.id} of {_when(after.started)}"
            pane.border_title = literal(title)
            yield RowTable(COLUMNS, empty=EMPTY, id="changes")
            yield Static("\n".join(self._notes()), markup=False, classes="under")
        yield KeyBar(keys=actions.bar((actions.BACK,), self.app.keys))

    def on_mount(self) -> None:
        """Fill the table."""
        self.query_one(StatusLine).show("Comparison of two runs", "above 1 is faster after")
        lines: list[TableLine] = []
        label = ""
        for change in self._comparison.changes:
            if change.workload.label != label:
                label = change.workload.label
                lines.append(TableLine(span=f"{label} · noise floor {formatting.percent(change.floor)}", tone="head"))
            lines.append(_line(change))
        self.query_one(RowTable).show(lines)

    def _notes(self) -> list[str]:
        made = self._comparison
        notes = [f"Environments differ: {'; '.join(made.differences)}"] if made.differences else []
        notes += [f"Only before: {_some(made.only_before)}"] if made.only_before else []
        return notes + ([f"Only after: {_some(made.only_after)}"] if made.only_after else [])

    def action_back(self) -> None:
        """Go back."""
        self.dismiss()


def _some(names: tuple[str, ...]) -> str:
    """Join the first few names, and say how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f", and {more} more" if more > 0 else "")


def _when(started: str) -> str:
    return started[:16].replace("T", " ")


def _line(change: comparison.RowChange) -> TableLine:
    significant = change.ratio is not None and change.ratio.significant
    cells = {
        "implementation": change.implementation,
        "path before": change.before.path or "-",
        "path after": change.after.path or "-",
        "before": _rate(change.before),
        "after": _rate(change.after),
        "ratio": formatting.speedup_text(change.ratio),
        "memory": f"{formatting.size(change.before.peak_bytes)}, {formatting.size(change.after.peak_bytes)}",
    }
    tone = ("good" if change.ratio.value > 1 else "bad") if significant and change.ratio else ""
    return TableLine(key=f"{change.implementation} {change.workload.label}", cells=cells, tone=tone)


def _rate(row: Row) -> str:
    return row.status if row.status != "ok" else formatting.tokens_per_second(row.tokens_per_second)
