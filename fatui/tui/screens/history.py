"""The history screen (open, compare or delete past runs), and the screen that compares two of them."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from msgspec import structs
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.screen import Screen
from textual.widgets import Input, Static

from attention.core.errors import UsageError
from attention.core.files import expand_home
from attention.core.results import Report, Row, in_order, instant
from fatui import formatting
from fatui.draft import UNNAMED
from fatui.report import comparison
from fatui.storage import result_files
from fatui.storage.history import HistoryError, RunSummary
from fatui.storage.history import RunHistory as Runs
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.screens.base import AppScreen
from fatui.tui.screens.tables import HasTable
from fatui.tui.terminal import literal
from fatui.tui.view_models.table_lines import TableColumn, TableLine
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.table_pane import TablePane

FINDING = 72
RUN_COLUMNS = (
    TableColumn(name="mark", title="", right=False),
    TableColumn(name="started", title="started", right=False),
    TableColumn(name="preset", title="preset or case", right=False, rank=1, widest=32),
    TableColumn(name="finding", title="finding", right=False, rank=2, widest=FINDING, narrowest=24),
    TableColumn(name="cases", title="cases", rank=3),
    TableColumn(name="seconds", title="took", rank=4),
    TableColumn(name="device", title="device", right=False, rank=5, widest=28),
    TableColumn(name="id", title="id", right=False, rank=6),
)
FILE = "a result file (JSON) of any machine; enter compares the chosen run with it"
NO_RUNS = "No runs yet; finished runs appear here."
CHANGE_COLUMNS = (
    TableColumn(name="implementation", title="", right=False, widest=16),
    TableColumn(name="before", title="tokens/s before", rank=2),
    TableColumn(name="after", title="after", rank=1),
    TableColumn(name="times", title="after / before", rank=4, optional=True),
    TableColumn(name="drift", title="drift", rank=5, optional=True),
    TableColumn(name="ratio", title="beyond the drift", rank=0),
    TableColumn(name="word", title="verdict", right=False, rank=3, widest=12),
    TableColumn(name="memory", title="memory", rank=6, widest=24),
    TableColumn(name="path before", title="path before", right=False, rank=7, widest=22),
    TableColumn(name="path after", title="path after", right=False, rank=8, widest=22),
)
IN_TURNS = tuple(
    structs.replace(column, title="after / before") if column.name == "ratio" else column for column in CHANGE_COLUMNS
)
"""The columns of runs measured in turns, between which nothing drifts."""
MAX_NAMED = 3
NOTHING_IN_COMMON = "These two runs have no workload and implementation in common."


class History(HasTable, AppScreen, Screen[Report]):
    """Screen of past runs; the result is the report to open."""

    CSS_PATH: ClassVar = ["list.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.HISTORY), actions.closing("history")]
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._history = Runs()
        self._runs: list[RunSummary] = []
        self._marked: list[str] = []
        self._deleted: list[Report] = []

    def compose(self) -> ComposeResult:
        """Yield the list."""
        yield StatusLine()
        yield Static(classes="notice", markup=False)
        pane = TablePane(RUN_COLUMNS, empty=NO_RUNS, table="runs", id="history-pane")
        pane.border_title = "History"
        yield Input(placeholder=FILE, id="file")
        yield pane
        yield KeyBar(keys=(("enter", "Open", "screen.open"), *actions.bar(actions.HISTORY, self.app.keys)))

    async def on_mount(self) -> None:
        """Read the runs."""
        self.query_one(".notice").display = self.query_one("#file").display = False
        self.query_one(RowTable).focus()
        await self._read()

    async def _read(self) -> None:
        try:
            self._runs = await asyncio.to_thread(self._history.runs)
        except HistoryError as error:
            self._notice(str(error))
        if self._history.notice:
            self._notice(self._history.notice)
        self._show()

    def _notice(self, text: str) -> None:
        self.query_one(".notice", Static).update(text)
        self.query_one(".notice").display = True

    def _show(self) -> None:
        lines = [_run_line(run, run.id in self._marked) for run in self._runs]
        self.query_one(TablePane).show_lines(lines)
        count = len(self._runs)
        self.query_one(StatusLine).show("History", f"{count} run{'' if count == 1 else 's'}")

    @property
    def _chosen(self) -> str | None:
        return self.query_one(RowTable).key

    async def _get(self, name: str) -> Report | None:
        try:
            return await asyncio.to_thread(self._history.get, name)
        except HistoryError as error:
            self.app.tell(str(error), "error")
            return None

    @on(RowTable.Chosen)
    async def action_open(self) -> None:
        """Open the run on the main screen."""
        if self.app.runs.active:
            self.app.tell("a run is in progress; open another when it has ended", "warning")
        elif self._chosen is not None:
            report = await self._get(self._chosen)
            if report is not None:
                self.dismiss(report)

    def action_mark(self) -> None:
        """Mark or unmark the run; a third mark replaces the oldest."""
        name = self._chosen
        if name is None:
            return
        self._marked = (
            [each for each in self._marked if each != name] if name in self._marked else [*self._marked, name][-2:]
        )
        self._show()

    async def action_compare(self) -> None:
        """Compare two runs, the older one first."""
        chosen = list(dict.fromkeys([*self._marked, *([self._chosen] if self._chosen else [])]))[:2]
        if len(chosen) < 2:
            self.app.tell(f"mark two runs with {self.app.keys['history_mark']}, or mark one and move to another")
            return
        order = [run.id for run in self._runs]
        newer, older = sorted(chosen, key=order.index)
        before, after = await self._get(older), await self._get(newer)
        if before and after:
            self.app.push_screen(Compare(before, after))

    def action_file(self) -> None:
        """Show the input for a result file."""
        if self._chosen is None:
            self.app.tell("there is no run here to compare a file with")
            return
        box = self.query_one("#file", Input)
        box.display = True
        box.focus()

    @on(Input.Submitted, "#file")
    async def _compare_with(self, event: Input.Submitted) -> None:
        """Compare the run under the cursor with that of a file, the older one first."""
        event.stop()
        path = expand_home(event.value.strip())
        try:
            theirs = await asyncio.to_thread(result_files.read, path)
        except UsageError as error:
            self.app.tell("; ".join(error.problems), "warning")
            return
        own = await self._get(self._chosen) if self._chosen else None
        if own is not None:
            self._close_file()
            self.app.push_screen(Compare(*in_order((own, theirs))))

    def _close_file(self) -> bool:
        """Hide the input for a result file; return whether it was open."""
        box = self.query_one("#file", Input)
        was_open, box.display = box.display, False
        self.query_one(RowTable).focus()
        return was_open

    async def action_delete(self) -> None:
        """Delete the run under the cursor."""
        name = self._chosen
        if name is None:
            return
        try:
            removed = await asyncio.to_thread(self._history.remove, name)
        except HistoryError as error:
            self.app.tell(str(error), "error")
            return
        self._deleted += [removed] if removed else []
        self._marked = [each for each in self._marked if each != name]
        await self._read()
        undo = f"; {self.app.keys['history_undo']} brings it back" if removed else ""
        self.app.tell(f"run {name} is deleted{undo}")

    async def action_undo(self) -> None:
        """Restore the last deleted run."""
        if not self._deleted:
            self.app.tell("nothing was deleted here")
            return
        try:
            await asyncio.to_thread(self._history.add, self._deleted[-1])
        except HistoryError as error:
            self.app.tell(str(error), "error")
            return
        restored = self._deleted.pop().run.id
        await self._read()
        self.app.clear_notifications()  # one says that it is deleted
        self.app.tell(f"run {restored} is back")

    def action_back(self) -> None:
        """Close the filter or the input for a file, or the screen without opening a run."""
        if not self.query_one(TablePane).clear_filter() and not self._close_file():
            self.dismiss()


def _run_line(run: RunSummary, marked: bool) -> TableLine:
    cells = {
        "mark": "●" if marked else " ",
        "started": formatting.started_text(run.started),
        "preset": run.preset or run.shape or UNNAMED,
        "finding": ("interrupted; " if run.interrupted else "") + run.finding,
        "cases": str(run.cases),
        "seconds": formatting.duration(run.seconds),
        "device": run.device or formatting.UNKNOWN,
        "id": run.id,
    }
    figures: dict[str, float | str | None] = {
        "started": instant(run.started),
        "preset": run.preset or run.shape or UNNAMED,
        "finding": run.finding,
        "cases": run.cases,
        "seconds": run.seconds,
        "device": run.device,
        "id": run.id,
    }
    return TableLine(key=run.id, cells=cells, figures=figures)


class Compare(HasTable, AppScreen, Screen[None]):
    """Screen of the rows that two runs have in common: before, after, the reference's own drift, and what is beyond it.

    The runs may be of two devices: then the drift is how much faster the second is in the reference.
    """

    CSS_PATH: ClassVar = ["list.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.COMPARE), actions.closing("history_compare")]
    app: Lab

    def __init__(self, before: Report, after: Report) -> None:
        super().__init__(classes="list-screen")
        self._reports = before, after
        self._reference: str | None = None
        self._comparison = comparison.compare(before, after)

    def compose(self) -> ComposeResult:
        """Yield what differs between the runs, the table, and what cannot be compared."""
        first, second = (f"{each.run.id} of {formatting.started_text(each.run.started)}" for each in self._reports)
        yield StatusLine()
        yield Static(markup=False, classes="notice")
        pane = TablePane(CHANGE_COLUMNS, empty=NOTHING_IN_COMMON, table="changes", id="compare-pane")
        pane.border_title = literal(f"{first}, then {second}")
        yield pane
        yield Static("\n".join(self._notes()), markup=False, classes="under")
        yield KeyBar(keys=(("enter", "Details", "screen.details"), *actions.bar(actions.COMPARE, self.app.keys)))

    def on_mount(self) -> None:
        """Fill the table."""
        self.query_one(".under").display = bool(self._notes())
        self.query_one(RowTable).focus()
        self._show()

    def _show(self) -> None:
        over = f" beyond the change of {self._reference}" if self._reference else ""
        self.query_one(StatusLine).show(
            f"Comparison{_outcomes(self._comparison.changes)}", f"above 1: second is faster{over}"
        )
        lines: list[TableLine] = []
        label = ""
        for change in self._comparison.changes:
            if change.workload.label != label:
                label = change.workload.label
                lines.append(TableLine(span=f"{label} · {_basis(change)}", tone="head"))
            lines.append(_change_line(change))
        in_turns = all(change.in_turns for change in self._comparison.changes)
        self.query_one(TablePane).show_lines(lines, IN_TURNS if in_turns else CHANGE_COLUMNS)
        notice, differences = self.query_one(".notice", Static), self._comparison.differences
        notice.display = bool(differences)
        notice.update("\n".join(f"The runs differ in {text}" for text in differences))

    def _notes(self) -> list[str]:
        made = self._comparison
        notes = [f"Only before: {_some(made.only_before)}"] if made.only_before else []
        return notes + ([f"Only after: {_some(made.only_after)}"] if made.only_after else [])

    @on(TablePane.ReferenceRequested)
    def _take_reference(self, event: TablePane.ReferenceRequested) -> None:
        """Take the drift from another row; from the runs' own reference again if it was that already."""
        name = next(each.implementation for each in self._comparison.changes if _change_key(each) == event.key)
        self._reference = None if name == self._reference else name
        before, after = self._reports
        if self._reference:
            before, after = (comparison.rebased_report(each, self._reference) for each in self._reports)
        self._comparison = comparison.compare(before, after)
        self._show()

    @on(RowTable.Chosen)
    def action_details(self) -> None:
        """Show both rows of the one under the cursor."""
        from fatui.tui.screens.dialogs import ChangeDetails

        key = self.query_one(RowTable).key
        change = next((each for each in self._comparison.changes if _change_key(each) == key), None)
        if change is not None:
            self.app.push_screen(ChangeDetails(change))

    def action_back(self) -> None:
        """Close the filter, or go back."""
        if not self.query_one(TablePane).clear_filter():
            self.dismiss()


def _outcomes(changes: Sequence[comparison.RowChange]) -> str:
    """Count the outcomes of the rows besides the references: " · the second: 1 faster, 2 undecided"."""
    counts = Counter(change.outcome().lower() for change in changes if not change.is_reference)
    words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    return f" · the second: {words}" if words else ""


def _basis(change: comparison.RowChange) -> str:
    """Format what the changes of a workload are relative to."""
    if change.in_turns:
        return "measured in turns: times are compared as they are"
    if change.reference is None:
        return "no common reference: the machine's own change is not known"
    if change.drift is None:
        return f"too few rounds of {change.reference} to know the machine's own change"
    return (
        f"{change.reference} itself {formatting.speedup_text(change.drift)} · "
        f"counts beyond {formatting.percent(change.floor)}"
    )


def _some(names: tuple[str, ...]) -> str:
    """Join the first few names, and say how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f", and {more} more" if more > 0 else "")


def _change_key(change: comparison.RowChange) -> str:
    return f"{change.implementation} {change.workload.label}"


def _change_line(change: comparison.RowChange) -> TableLine:
    significant = change.ratio is not None and change.ratio.significant
    own = change.is_reference
    word = "reference" if own else change.outcome().lower()
    cells = {
        "implementation": change.implementation,
        "path before": change.before.path or "-",
        "path after": change.after.path or "-",
        "before": _rate(change.before),
        "after": _rate(change.after),
        "times": "" if change.in_turns else formatting.speedup_text(change.times),
        "drift": "" if change.in_turns else formatting.speedup_text(change.drift),
        "ratio": "-" if own else formatting.speedup_text(change.ratio),
        "word": word,
        "memory": f"{formatting.size(change.before.peak_bytes)}, {formatting.size(change.after.peak_bytes)}",
    }
    figures: dict[str, float | str | None] = {
        "implementation": change.implementation,
        "before": change.before.tokens_per_second,
        "after": change.after.tokens_per_second,
        "times": change.times.value if change.times else None,
        "drift": change.drift.value if change.drift else None,
        "ratio": change.ratio.value if change.ratio else None,
        "word": word,
        "memory": change.memory,
    }
    tone = ("good" if change.ratio.value > 1 else "bad") if significant and change.ratio and not own else ""
    return TableLine(key=_change_key(change), cells=cells, tone=tone, figures=figures)


def _rate(row: Row) -> str:
    return row.status if row.status != "ok" else formatting.tokens_per_second(row.tokens_per_second)
