"""The comparison table: a block of rows per case, filled during the run, the means of a sweep, and the verdict."""

from collections.abc import Sequence

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
    """Pane with the rows of the current run, or of a past run."""

    def __init__(self, *, id: str) -> None:
        super().__init__(lines_of.COLUMNS, empty=EMPTY, table="comparison-table", id=id)
        self._lines: dict[int, list[TableLine]] = {}
        self._provisional: dict[int, tuple[Case, list[TableLine]]] = {}
        """Lines of cases that go on, with what they were made of."""
        self._summary: tuple[object, tuple[Summary, ...], Sequence[Case]] = (None, (), ())
        """The means of a sweep, with what they were made of: the number of complete cases, and the cases among them."""
        self._rebased: dict[int, tuple[Case, Case]] = {}
        """Cases over the other reference, by their number, each with what it was made of."""
        self._owner: object = None
        self._verdict_of: tuple[Report, dict[str, str], bool] | None = None
        self._key = ""
        """The key that maximises the pane."""
        self.border_title = "4 Comparison"

    def compose(self) -> ComposeResult:
        """Yield the table, its legend, and the verdict below it."""
        yield from super().compose()
        yield VerdictCard()

    def refer_to(self, name: str | None) -> None:
        """Show speedups over another implementation, or over each case's own reference."""
        self.reference = name
        self._forget()

    def _forget(self) -> None:
        self._lines.clear()
        self._provisional.clear()
        self._rebased.clear()
        self._summary = None, (), ()

    def over_reference(self, index: int, case: Case) -> Case:
        """Return a case of the run with its speedups over the table's reference, as far as that has figures."""
        if self.reference is None:
            return case
        kept = self._rebased.get(index)
        if kept is None or kept[0] is not case:
            from fatui.report.comparison import rebased

            kept = self._rebased[index] = case, rebased(case, self.reference)
        return kept[1]

    def _means(self, indices: Sequence[int], cases: Sequence[Case], names: tuple[str, ...]) -> list[TableLine]:
        """Return the means of complete cases: of those that have figures of the table's reference, if any has."""
        if self._summary[0] != len(cases):
            over = [self.over_reference(index, case) for index, case in zip(indices, cases, strict=True)]
            common = [case for case in over if self.reference in (None, case.reference)] or over
            self._summary = len(cases), summarise(tuple(common), names), common
        _, summary, averaged = self._summary
        return lines_of.summary_lines(summary, averaged, of=len(cases))

    def _note(self, case: Case) -> str:
        """Say that a case has no speedups over the table's reference, whose row has no figures."""
        if self.reference is None or case.reference in (None, self.reference):
            return ""
        return f" · over {case.reference}: no figures of {self.reference}"

    def show_session(self, session: Session, report: Report | None, keys: dict[str, str]) -> None:
        """Draw the current run; `report`: of the finished run, for its verdict."""
        self._begin(session, keys)
        self.table.empty = RUNNING if session.active else EMPTY
        record, several = session.record, len(session.plan.cases) > 1
        lines: list[TableLine] = []
        for index, case_record in enumerate(record.cases):
            if case_record.started:
                lines += self._session_case(session, index, several)
        final = [index for index in range(len(record.cases)) if session.is_final(index)]
        if several and final:
            lines = self._means(final, [session.case(index) for index in final], session.plan.ordered) + lines
        self.show_lines(lines)
        self._show_verdict(None if session.active else report, keys, goes_on=session.any_rows)
        if session.finding and report is None:
            self.query_one(VerdictCard).say(session.finding, bad=session.phase in ("refused", "failed"))
        number = session.case_number
        case = self.over_reference(number, session.case(number)) if number is not None and not several else None
        label = f"{len(session.plan.cases)} cases" if several else session.plan.cases[0].label
        notes = f"{self._note(case)}{lines_of.notes(case)}" if case else ""
        set_title(self, f"4 Comparison · {label}{notes}")

    def _session_case(self, session: Session, index: int, several: bool) -> list[TableLine]:
        if session.is_final(index) and index in self._lines:
            return self._lines[index]
        given = session.case(index)
        case = self.over_reference(index, given)
        if not case.rows and not session.active:
            return []
        kept = self._provisional.get(index)
        if kept is None or kept[0] is not given:
            made = [lines_of.block_head(index, case, self._note(case))] if several else []
            kept = self._provisional[index] = given, made + lines_of.case_lines(index, case)
        made = kept[1]
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
        self._begin(report, keys)
        several = len(report.cases) > 1
        cases, names = report.cases, tuple(line.implementation for line in report.summary)
        lines = self._means(range(len(cases)), cases, names) if several else []
        shown = [self.over_reference(index, case) for index, case in enumerate(cases)]
        for index, case in enumerate(shown):
            if several:
                lines.append(lines_of.block_head(index, case, self._note(case)))
            lines += lines_of.case_lines(index, case)
        self.show_lines(lines)
        self._show_verdict(report, keys, goes_on=False)
        label = f"{len(cases)} cases" if several else cases[0].workload.label if cases else "no rows"
        notes = f"{self._note(shown[0])}{lines_of.notes(shown[0])}" if len(shown) == 1 else ""
        set_title(self, f"4 Comparison · {label}{notes}")

    def _begin(self, owner: object, keys: dict[str, str]) -> None:
        self._key = keys["maximise"]
        if owner is not self._owner:
            self._owner = owner
            self._forget()

    def _show_verdict(self, report: Report | None, keys: dict[str, str], goes_on: bool) -> None:
        card = self.query_one(VerdictCard)
        self.set_class(report is not None, "-done")  # which changes the height of the pane
        self._verdict_of = None if report is None else (report, keys, goes_on)
        if report is None:
            card.clear()
        else:
            over = self.over_reference_of(report)
            card.show(over, self.content_size.height, self.table.last_row, keys, goes_on=goes_on)

    def on_resize(self) -> None:
        """Lay the hint and the verdict out for the new height."""
        super().on_resize()
        if self._verdict_of is not None:
            self._show_verdict(*self._verdict_of)

    def _hints(self) -> list[str]:
        is_over = any(case.reference == self.reference for _, case in self._rebased.values())
        over = [f"over {self.reference}"] if self.reference and is_over else []
        full = f"{self._key} all panes" if self.has_class("-maximised") else f"{self._key} maximise"
        return [*super()._hints(), *([*over, "o sort", "enter a row", full] if self.table.lines else [])]
