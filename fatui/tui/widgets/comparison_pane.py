"""The comparison table: a block of rows per case, filled during the run, the means of a sweep, and the verdict."""

from textual.app import ComposeResult

from attention.core.results import Case, Report, Summary
from attention.engine.record import summarise
from fatui.tui.painting import set_title
from fatui.tui.view_models import table_lines as lines_of
from fatui.tui.view_models.session import Session
from fatui.tui.view_models.table_lines import TableLine
from fatui.tui.widgets.table_pane import TablePane
from fatui.tui.widgets.text_panes import VerdictCard

EMPTY = "No rows yet. Press r to run; rows appear as they are measured."
RUNNING = "Rows appear as they are measured, from the first rounds on."


class ComparisonPane(TablePane):
    """Pane with the rows of the current run, or of a past run.

    Attributes:
        reference: the implementation that speedups are shown over; None: the reference of each case.
    """

    def __init__(self, *, id: str) -> None:
        super().__init__(lines_of.COLUMNS, empty=EMPTY, table="comparison-table", id=id)
        self.reference: str | None = None
        self._lines: dict[int, list[TableLine]] = {}
        self._summary: tuple[int, tuple[Summary, ...]] = (0, ())
        self._owner: object = None
        self._verdict_of: tuple[Report, dict[str, str], bool] | None = None
        self.border_title = "4 Comparison"

    def compose(self) -> ComposeResult:
        """Yield the table, its legend, and the verdict below it."""
        yield from super().compose()
        yield VerdictCard()

    def refer_to(self, name: str | None) -> None:
        """Show speedups over another implementation, or over each case's own reference."""
        self.reference = name
        self._lines.clear()

    def _rebased(self, case: Case) -> Case:
        if self.reference is None:
            return case
        from fatui.report.comparison import rebased

        return rebased(case, self.reference)

    def show_session(self, session: Session, report: Report | None, keys: dict[str, str]) -> None:
        """Draw the current run; `report`: of the finished run, for its verdict."""
        self._begin(session)
        self.table.empty = RUNNING if session.active else EMPTY
        record, several = session.record, len(session.plan.cases) > 1
        lines: list[TableLine] = []
        for index, case_record in enumerate(record.cases):
            if case_record.started:
                lines += self._session_case(session, index, several)
        final = [session.case(index) for index in range(len(record.cases)) if session.is_final(index)]
        if several and final:
            if self._summary[0] != len(final):
                self._summary = len(final), summarise(tuple(final), session.plan.ordered)
            lines = lines_of.summary_lines(self._summary[1], final) + lines
        self.show_lines(lines)
        self._show_verdict(None if session.active else report, keys, goes_on=session.any_rows)
        if session.finding and report is None:
            self.query_one(VerdictCard).say(session.finding, bad=session.phase in ("refused", "failed"))
        case = session.case(session.case_number) if session.case_number is not None else None
        label = f"{len(session.plan.cases)} cases" if several else session.plan.cases[0].label
        floor = lines_of.notes(case) if case and not several else ""
        set_title(self, f"4 Comparison · {label}{floor}")

    def _session_case(self, session: Session, index: int, several: bool) -> list[TableLine]:
        if session.is_final(index) and index in self._lines:
            return self._lines[index]
        case = self._rebased(session.case(index))
        if not case.rows and not session.active:
            return []
        made = [lines_of.block_head(index, case)] if several else []
        made += lines_of.case_lines(index, case)
        if session.is_final(index):
            self._lines[index] = made
            return made
        there = {row.implementation for row in case.rows}
        waiting = [
            (name, row.step or "") for name, row in session.record.cases[index].rows.items() if name not in there
        ]
        return made + lines_of.waiting_lines(index, waiting if session.active else [])

    def show_report(self, report: Report, keys: dict[str, str]) -> None:
        """Draw a past run."""
        self._begin(report)
        several = len(report.cases) > 1
        lines = lines_of.summary_lines(report.summary, report.cases) if several else []
        for index, case in enumerate(map(self._rebased, report.cases)):
            if several:
                lines.append(lines_of.block_head(index, case))
            lines += lines_of.case_lines(index, case)
        self.show_lines(lines)
        self._show_verdict(report, keys, goes_on=False)
        label = (
            f"{len(report.cases)} cases" if several else report.cases[0].workload.label if report.cases else "no rows"
        )
        floor = lines_of.notes(report.cases[0]) if len(report.cases) == 1 else ""
        set_title(self, f"4 Comparison · {label}{floor}")

    def _begin(self, owner: object) -> None:
        if owner is not self._owner:
            self._owner = owner
            self._lines.clear()
            self._summary = (0, ())

    def _show_verdict(self, report: Report | None, keys: dict[str, str], goes_on: bool) -> None:
        card = self.query_one(VerdictCard)
        self.set_class(report is not None, "-done")  # which changes the height of the pane
        self._verdict_of = None if report is None else (report, keys, goes_on)
        if report is None:
            card.clear()
        else:
            if self.reference is not None:
                from fatui.report.comparison import rebased_report

                report = rebased_report(report, self.reference)
            card.show(report, self.content_size.height, self.table.last_row, keys, goes_on=goes_on)

    def on_resize(self) -> None:
        """Lay the hint and the verdict out for the new height."""
        super().on_resize()
        if self._verdict_of is not None:
            self._show_verdict(*self._verdict_of)

    def _hints(self) -> list[str]:
        over = [f"over {self.reference}"] if self.reference else []
        return [*super()._hints(), *([*over, "o sort", "enter a row"] if self.table.lines else [])]
