"""A gate: whether a comparison of runs shows that nothing got worse by more than its thresholds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from msgspec import Struct, structs

from attention.core.errors import UsageError, suggestion
from attention.core.results import Ratio
from fatui import formatting
from fatui.report.comparison import DEFAULT_TOLERANCE, MEASURED, MIN_PAIRS, Comparison, Outcome, RowChange
from fatui.untrusted_text import markdown_cell, one_line

Policy = Literal["fail", "pass"]
POLICIES: Final = ("fail", "pass")
CRITERIA: Final = ("slower", "memory", "inaccurate")
TAKES: Final = "slower:3%, memory:10% or inaccurate"
MAX_PERCENT: Final = 1000.0
OTHER_MACHINE: Final = "undecided: the runs differ in device, backend or BLAS, so that a change need not be the code's"
_PERCENT: Final = re.compile(r"([0-9]{1,4}(?:\.[0-9]{1,4})?)\s*%")
SCHEMA: Final = 1


class RowThresholds(Struct, frozen=True, kw_only=True):
    """Thresholds of one implementation, in place of those of all."""

    implementation: str
    slower: float | None = None
    memory: float | None = None


class Thresholds(Struct, frozen=True, kw_only=True):
    """What fails a gate. Limits are relative: 0.03 is 3 %."""

    slower: float | None = None
    """Largest slowdown of a row; None: times are not judged."""
    memory: float | None = None
    """Largest growth of a row's peak memory; None: memory is not judged."""
    inaccurate: bool = False
    """Whether an inaccurate row fails."""
    undecided: Policy = "pass"
    """What happens to rows of which the runs show neither that they pass nor that they fail."""
    missing: Policy = "fail"
    """What happens to rows that only the first run has."""
    rows: tuple[RowThresholds, ...] = ()

    @property
    def judging(self) -> bool:
        """Whether anything is judged."""
        return self.inaccurate or any(each is not None for each in (self.slower, self.memory)) or bool(self.rows)

    def of(self, implementation: str) -> tuple[float | None, float | None]:
        """Return the largest slowdown and growth of memory of an implementation."""
        slower, memory = self.slower, self.memory
        for row in self.rows:
            if row.implementation == implementation:
                slower = slower if row.slower is None else row.slower
                memory = memory if row.memory is None else row.memory
        return slower, memory


class GateRow(Struct, frozen=True, kw_only=True):
    """The judgement of one row."""

    change: RowChange
    outcome: Outcome
    ratio: Ratio | None = None
    """The change with the interval by which it was judged, which is wider than that of a single row."""
    failures: tuple[str, ...] = ()
    """What fails the gate, in words."""
    undecided: tuple[str, ...] = ()
    """What the runs leave open, in words."""


class Gate(Struct, frozen=True, kw_only=True):
    """The judgement of a comparison."""

    comparison: Comparison
    thresholds: Thresholds
    rows: tuple[GateRow, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the gate fails, a line each; none if it passes."""
        made = _lines((row, row.failures) for row in self.rows)
        if self.thresholds.undecided == "fail":
            made += _lines((row, row.undecided) for row in self.rows)
        if self.thresholds.missing == "fail":
            made += [f"{name}: only in the first run" for name in self.comparison.only_before]
        return tuple(made if self.rows or made else ["the runs have no row in common"])

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the runs leave open and does not fail the gate, a line each."""
        return tuple(_lines((row, row.undecided) for row in self.rows) if self.thresholds.undecided == "pass" else ())

    @property
    def decided(self) -> bool:
        """Whether further pairs of runs would change nothing: a row fails, or none is undecided."""
        return any(row.failures for row in self.rows) or not any(row.undecided for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether the gate passes."""
        return not self.problems

    def ended(self, most: int) -> bool:
        """Return whether no further pair of runs is measured: they decide, or there are as many as allowed."""
        return self.comparison.pairs >= most or (self.comparison.pairs >= MIN_PAIRS and self.decided)


def _lines(found: Iterable[tuple[GateRow, Iterable[str]]]) -> list[str]:
    return [
        f"{row.change.implementation} on {row.change.workload.label}: {text}" for row, texts in found for text in texts
    ]


def judge(comparison: Comparison, thresholds: Thresholds) -> Gate:
    """Judge each row of a comparison."""
    timed = sum(change.ratio is not None and not change.is_reference for change in comparison.changes)
    judged = _judged if comparison.same_machine else _judged_elsewhere
    rows = tuple(judged(change, thresholds, timed) for change in comparison.changes)
    return Gate(comparison=comparison, thresholds=thresholds, rows=rows)


def _judged(change: RowChange, thresholds: Thresholds, timed: int) -> GateRow:
    slower, memory = thresholds.of(change.implementation)
    outcome = change.outcome(DEFAULT_TOLERANCE if slower is None else slower, timed)
    ratio = change.judged_ratio(timed)
    failures, undecided = [], []
    before, after = change.before.status, change.after.status
    if after not in MEASURED and before in MEASURED:
        failures.append(f"{after}: {change.after.reason or 'no reason is known'}")
    elif after == "inaccurate" and thresholds.inaccurate:
        failures.append(f"inaccurate: {change.after.reason or 'beyond its tolerance'}")
    if after in MEASURED and before in MEASURED:
        if slower is not None and outcome == "SLOWER":
            failures.append(f"slower by {slowdown_text(ratio)}; the limit is {formatting.percent(slower)}")
        elif slower is not None and outcome == "UNDECIDED":
            undecided.append(_undecided_text(change, ratio, slower))
        if memory is not None and (change.before.peak_bytes is None) != (change.after.peak_bytes is None):
            undecided.append("its memory is known in one of the runs only")
        elif memory is not None and change.memory is not None and change.memory > 1 + memory:
            grown = formatting.percent(change.memory - 1)
            failures.append(f"memory grew by {grown}, {formatting.percent(memory)} is allowed")
    return GateRow(change=change, outcome=outcome, ratio=ratio, failures=tuple(failures), undecided=tuple(undecided))


def _judged_elsewhere(change: RowChange, thresholds: Thresholds, timed: int) -> GateRow:
    """Judge a row of two machines: whether it has figures and is accurate; its time and memory are left open."""
    row = _judged(change, structs.replace(thresholds, slower=None, memory=None, rows=()), timed)
    open_ = any(limit is not None for limit in thresholds.of(change.implementation)) and not row.failures
    undecided = (OTHER_MACHINE,) if open_ and change.before.status in MEASURED else ()
    return structs.replace(row, outcome="UNDECIDED", undecided=undecided)


def slowdown_text(ratio: Ratio | None) -> str:
    """Return the interval of a row's slowdown: "-0.4 to 2.1 %"; above 0 it got slower."""
    if ratio is None or ratio.low <= 0:
        return formatting.UNKNOWN
    least, most = (100 * (1 / end - 1) for end in (ratio.high, ratio.low))
    return f"{least:.3g} to {most:.3g} %" if most < 1000 else "an unknown factor"


def _undecided_text(change: RowChange, ratio: Ratio | None, slower: float) -> str:
    """Return why a row's outcome is open."""
    if change.reference is None:
        return "undecided: the runs have no common baseline"
    if ratio is None:
        return "undecided: too few rounds"
    text = f"undecided: slower by {slowdown_text(ratio)}"
    if change.noise > slower:
        text += f", with a noise floor of {formatting.percent(change.noise)}"
    return f"{text}; the limit is {formatting.percent(slower)}; measure longer, or more pairs of runs"


def parse_criteria(texts: Sequence[str], base: Thresholds | None = None) -> Thresholds:
    """Return thresholds with the criteria of a command line, which replace those of `base`.

    Raises:
        UsageError: with one problem for each text that is no criterion.
    """
    limits: dict[str, Any] = {}
    problems = []
    for text in texts:
        name, colon, limit = text.partition(":")
        name = name.strip()
        if name not in CRITERIA:
            problems.append(f"--fail-on: got '{_shown(text)}'; it takes {TAKES}{suggestion(name[:40], CRITERIA)}")
        elif name == "inaccurate":
            if colon:
                problems.append(f"--fail-on: got '{_shown(text)}'; inaccurate has no limit")
            limits[name] = True
        else:
            try:
                limits[name] = parse_percent(limit, f"--fail-on {name}")
            except UsageError as error:
                problems.extend(error.problems)
    if problems:
        raise UsageError(*problems)
    return structs.replace(base or Thresholds(), **limits)


def parse_percent(value: object, name: str) -> float:
    """Return a percentage, such as "3%" or "0.5 %", as a fraction.

    Raises:
        UsageError: it is none, or above 1000 %.
    """
    match = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 40 else None
    if match is None or float(match[1]) > MAX_PERCENT:
        raise UsageError(f"{name}: got '{_shown(str(value)[:100])}'; it takes a percentage up to 1000 %, such as 3%")
    return float(match[1]) / 100


def thresholds_of(document: Mapping[str, Any]) -> Thresholds:
    """Return the thresholds of a TOML document.

    Raises:
        UsageError: with every mistake, named by its key.
    """
    problems = list(_unknown(document, ("schema", "undecided", "missing", "fail-on", "row"), ""))
    if document.get("schema") != SCHEMA or isinstance(document.get("schema"), bool):
        problems.append(f"schema: got {_shown(repr(document.get('schema')))}; it takes {SCHEMA}")
    fields: dict[str, Any] = {}
    for name in ("undecided", "missing"):
        if name in document:
            fields[name] = document[name]
            if document[name] not in POLICIES:
                problems.append(f"{name}: got {_shown(repr(document[name]))}; it takes fail or pass")
    limits = document.get("fail-on", {})
    if isinstance(limits, dict):
        fields.update(_limits(limits, CRITERIA, "fail-on.", problems))
    else:
        problems.append("fail-on: it takes a table")
    rows = document.get("row", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        problems.append("row: it takes tables, [[row]]")
        rows = []
    fields["rows"] = tuple(_row_thresholds(row, f"row {number}: ", problems) for number, row in enumerate(rows, 1))
    if problems:
        raise UsageError(*problems)
    return Thresholds(**fields)


def _row_thresholds(row: Mapping[str, Any], where: str, problems: list[str]) -> RowThresholds:
    name = row.get("implementation")
    if not isinstance(name, str) or not name:
        problems.append(f"{where}implementation: it takes the name of an implementation")
    limits = _limits({key: row[key] for key in row if key != "implementation"}, CRITERIA[:2], where, problems)
    return RowThresholds(implementation=str(name), **limits)


def _limits(table: Mapping[str, Any], known: Sequence[str], where: str, problems: list[str]) -> dict[str, Any]:
    problems.extend(_unknown(table, known, where))
    made: dict[str, Any] = {}
    for name in known:
        if name not in table:
            continue
        if name == "inaccurate":
            made[name] = table[name]
            if not isinstance(table[name], bool):
                problems.append(f"{where}{name}: got {_shown(repr(table[name]))}; it takes true or false")
            continue
        try:
            made[name] = parse_percent(table[name], f"{where}{name}")
        except UsageError as error:
            problems.extend(error.problems)
    return made


def _unknown(table: Iterable[str], known: Sequence[str], where: str) -> Iterable[str]:
    return (
        f"{where}{_shown(name)}: not known here; it takes {', '.join(known)}{suggestion(name[:40], known)}"
        for name in table
        if name not in known
    )


def _shown(text: str) -> str:
    return one_line(text, 60)


def to_markdown(gate: Gate) -> str:
    """Format a gate's judgement for the comment of a pull request."""
    comparison = gate.comparison
    passed = f": the gate {'passes' if gate.passed else 'fails'}" if gate.thresholds.judging else ""
    first, second = comparison.before, comparison.after
    pairs = f", {comparison.pairs} pairs of runs" if comparison.pairs > 1 else ""
    runs = f"{markdown_cell(first.run.id)} then {markdown_cell(second.run.id)}{pairs}"
    device = markdown_cell(second.environment.machine or formatting.UNKNOWN)
    lines = [f"### Attention performance{passed}", "", f"{runs}, on {device}.", ""]
    lines += ["| case | implementation | slowdown | memory | outcome |", "| --- | --- | ---: | ---: | --- |"]
    for row in gate.rows:
        change = row.change
        memory = formatting.UNKNOWN if change.memory is None else f"{100 * (change.memory - 1):+.1f} %"
        cells = (change.workload.label, change.implementation, _slowdown_cell(row), memory, outcome_text(row))
        lines.append(f"| {' | '.join(markdown_cell(cell) for cell in cells)} |")
    notes = [f"only in the first run: {name}" for name in comparison.only_before]
    notes += [f"only in the second run: {name}" for name in comparison.only_after]
    notes += [f"{name}: edited since it was written" for name in comparison.edited]
    notes += [f"the runs differ in {text}" for text in comparison.differences]
    lines += ["", *(f"- **{markdown_cell(problem)}**" for problem in gate.problems)]
    lines += [f"- {markdown_cell(note)}" for note in (*gate.remarks, *notes)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _slowdown_cell(row: GateRow) -> str:
    return "reference" if row.change.is_reference else slowdown_text(row.ratio)


def outcome_text(row: GateRow) -> str:
    """Return a row's outcome, or the status of one without figures."""
    statuses = row.change.before.status, row.change.after.status
    if any(status != "ok" for status in statuses):
        return statuses[1] if statuses[0] == statuses[1] else ", then ".join(statuses)
    return row.outcome
