"""Comparison of runs: how much each row changed, beyond the change of the machine; machines side by side.

Between two runs the machine differs, by load, clocks or temperature, and all rows with it. The reference, whose code is
assumed unchanged, measures by how much: a row's change is that of its speedup over the reference, and it counts only
beyond the noise of both runs and beyond the change in the reference's own time. Runs that were measured in turns, round
by round, need no reference: the machine was the same, and times are compared directly. Of several pairs, measured one
after the other, the change is the geometric mean, and its interval has in it how much the pairs differ.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Final, Literal, TypeVar

from msgspec import Struct, structs

from attention.core import statistics
from attention.core.results import (
    AnyCase,
    Case,
    FineTuningCase,
    Interval,
    ModelCase,
    NoiseFloor,
    Ratio,
    Report,
    Row,
    StreamCase,
    in_order,
)
from attention.core.stream import Stream
from attention.core.workload import FineTuning, Generation, Workload
from attention.engine.record import UNITY, summarise
from fatui import formatting
from fatui.report.document import counted
from fatui.report.evidence import cpu_cores
from fatui.trust import MANY_SHARE
from fatui.untrusted_text import markdown_cell

AnyWorkload = Workload | Generation | FineTuning | Stream
Outcome = Literal["FASTER", "SAME", "SLOWER", "UNDECIDED"]
DEFAULT_TOLERANCE: Final = 0.05
"""The slowdown up to which a row counts as unchanged, unless one is given."""
MIN_PAIRS: Final = 5
"""From this number of pairs on, how much they differ decides."""
MAX_PAIRS: Final = 25
"""Pairs after which a gate ends; the looks at the pairs before are part of its error rate."""
FALSE_ALARMS: Final = 0.005
"""Largest probability that any row of unchanged code is called SLOWER at any look."""
MISSES: Final = 0.02
"""Largest probability that a row which is slower by the tolerance is called SAME at any look."""

MEASURED: Final = ("ok", "inaccurate")
"""Statuses of rows that have figures; what others have are samples from before they failed."""
MACHINE: Final = ("backend", "device", "blas")
"""What runs have to have in common for a change between them to be one of the code."""

K = TypeVar("K", Case, ModelCase, FineTuningCase, StreamCase)


def _call_time(row: Row | None) -> Interval | None:
    return row.call_s if row is not None and row.status in MEASURED else None


def rebased(case: K, reference: str) -> K:
    """Return a case with its speedups over another of its implementations; unchanged if that has no figures.

    Rounds are paired if both rows have a sample in each; a fine-tuning, and rows with samples missing, are compared by
    the intervals of their medians. The noise floor stays that of the case's own reference.
    """
    base = next((row for row in case.rows if row.implementation == reference and _call_time(row)), None)
    if base is None or reference == case.reference:
        return case
    floor = case.noise_floor
    paired = not isinstance(case, FineTuningCase | StreamCase) and _in_every_round((case, base))

    def speedup(row: Row) -> Ratio | None:
        if row.speedup is None and row.implementation != case.reference:
            return None
        if row.implementation == reference:
            return UNITY
        if paired and _in_every_round((case, row)):
            return statistics.speedup(base.samples, row.samples, floor)
        if base.call_s is None or row.call_s is None:
            return None
        return statistics.ratio_of_medians(base.call_s, row.call_s, floor.floor if floor else math.inf)

    rows = tuple(structs.replace(row, speedup=speedup(row)) for row in case.rows)
    return structs.replace(case, rows=rows, reference=reference)


def rebased_report(report: Report, reference: str) -> Report:
    """Return a report with all speedups over another implementation, and means of the cases that have figures of it."""
    cases = tuple(rebased(case, reference) for case in report.cases)
    common = tuple(case for case in cases if case.reference == reference)
    names = tuple(line.implementation for line in report.summary)
    return structs.replace(
        report,
        cases=cases,
        summary=summarise(common, names) if common else report.summary,
        models=tuple(rebased(case, reference) for case in report.models),
        fine_tunings=tuple(rebased(case, reference) for case in report.fine_tunings),
    )


class RowChange(Struct, frozen=True, kw_only=True):
    """One implementation on one workload, before and after."""

    workload: AnyWorkload
    implementation: str
    before: Row
    after: Row
    """The rows of the runs, of several pairs those of the one with the median ratio."""
    times: Ratio | None
    """Median time before over median time after, the machine's change included; None for too few rounds."""
    ratio: Ratio | None
    """Speedup over the reference after, divided by that before; above 1 is faster after.

    None if one run has no speedup for it, or the references differ; 1 for the reference itself. Of runs measured in
    turns it is the ratio of times.
    """
    noise: float
    """The larger of the noise floors before and after."""
    floor: float
    """The larger of `noise` and the change of the reference's time; a ratio inside it is printed as ≈ 1."""
    reference: str | None
    """The reference of both runs; None if they have none in common."""
    drift: Ratio | None
    """The change of the reference's own time."""
    memory: float | None = None
    """Peak memory after over that before; None if one of them is not known."""
    in_turns: bool = False
    """Whether both runs of each pair were measured in turns."""
    by_pair: tuple[Ratio, ...] = ()
    """The ratio of each pair."""

    @property
    def is_reference(self) -> bool:
        """Whether it is what the others are compared by, so that its own change cannot be seen."""
        return self.implementation == self.reference and not self.in_turns

    def judged_ratio(self, rows: int = 1) -> Ratio | None:
        """Return the ratio with the interval that decides, if it is one of several rows that a gate judges.

        The ends of Student's t of the pairs' changes have probabilities of their own, divided evenly (Bonferroni) among
        the looks at the pairs, and that of a false alarm also among the rows. Of fewer than MIN_PAIRS the interval is
        that of 95 %.
        """
        pairs = len(self.by_pair)
        if pairs < MIN_PAIRS:
            return self.ratio
        looks = max(MAX_PAIRS, pairs) - MIN_PAIRS + 1
        missing = statistics.repeated_ratio(self.by_pair, self.floor, 1 - 2 * MISSES / looks)
        alarming = statistics.repeated_ratio(self.by_pair, self.floor, 1 - 2 * FALSE_ALARMS / (max(rows, 1) * looks))
        assert missing is not None
        assert alarming is not None
        faster = missing.value > 1
        significant = missing.significant if faster else alarming.significant
        return structs.replace(missing, high=alarming.high, significant=significant)

    def outcome(self, tolerance: float = DEFAULT_TOLERANCE, rows: int = 1) -> Outcome:
        """Return whether the row got slower, by its interval and the floors.

        FASTER: the whole interval is faster, beyond the floor. SAME: it excludes a slowdown beyond the tolerance, and
        so do the noise floors; the reference always. SLOWER: the whole interval is slower, beyond the floor, and does
        not exclude the tolerance. UNDECIDED: none is shown.

        Runs that were not measured in turns are SLOWER, too, if the whole interval of 95 % lies beyond the tolerance
        and the floor; of fewer than MIN_PAIRS, which hardly tell how much runs of the same code differ, only then, and
        those in turns not at all.

        Args:
            tolerance: the slowdown to be found; 0.03 is 3 %.
            rows: number of rows that are judged together.
        """
        if self.is_reference:
            return "SAME"
        ratio = self.judged_ratio(rows)
        if ratio is None or ratio.low <= 0:
            return "UNDECIDED"
        least, most = 1 / ratio.high - 1, 1 / ratio.low - 1
        if ratio.significant and ratio.value > 1:
            return "FASTER"
        if most <= tolerance:
            return "SAME" if self.noise <= tolerance else "UNDECIDED"
        shown = len(self.by_pair) >= MIN_PAIRS and least > self.floor
        if not (shown or self.in_turns) and self.ratio:
            shown = 1 / self.ratio.high - 1 > max(tolerance, self.floor)
        return "SLOWER" if shown else "UNDECIDED"


class Comparison(Struct, frozen=True, kw_only=True):
    """The rows that two reports have in common, and those that only one has."""

    before: Report
    after: Report
    """Of several pairs, the first."""
    changes: tuple[RowChange, ...]
    only_before: tuple[str, ...]
    """Rows without a counterpart: "baseline on B=1 L=64 ..."."""
    only_after: tuple[str, ...]
    differences: tuple[str, ...]
    """Differences between the environments, and in the load by others: "mlx: 0.32.4, then 0.33.0"."""
    pairs: int = 1
    edited: tuple[str, ...] = ()
    """Runs that were changed after they had been written."""
    same_machine: bool = True
    """Whether all runs are of one device, backend and BLAS, as far as that is known."""


RowKey = tuple[AnyWorkload, str]
Found = tuple[AnyCase, Row]


def compare(before: Report, after: Report) -> Comparison:
    """Match rows by workload and implementation."""
    return compare_pairs([(before, after)])


def compare_pairs(pairs: Sequence[tuple[Report, Report]]) -> Comparison:
    """Compare runs that were measured in pairs, before and after, with at least one pair; rows are matched as above."""
    in_turns = all(_measured_in_turns(before, after) for before, after in pairs)
    matched: dict[RowKey, list[tuple[Found, Found]]] = {}
    firsts: dict[RowKey, None] = {}
    seconds: dict[RowKey, None] = {}
    for before, after in pairs:
        first, second = _rows(before), _rows(after)
        firsts.update(dict.fromkeys(first))
        seconds.update(dict.fromkeys(second))
        for key in first:
            if key in second:
                matched.setdefault(key, []).append((first[key], second[key]))
    differences = dict.fromkeys(text for before, after in pairs for text in _differences(before, after))
    return Comparison(
        before=pairs[0][0],
        after=pairs[0][1],
        changes=tuple(_change(matched[key], in_turns) for key in firsts if key in matched),
        only_before=tuple(_name(key) for key in firsts if key not in matched),
        only_after=tuple(_name(key) for key in seconds if key not in matched),
        differences=tuple(differences),
        pairs=len(pairs),
        edited=tuple(dict.fromkeys(report.run.id for pair in pairs for report in pair if report.edited)),
        same_machine=all(_same_machine(before, after) for before, after in pairs),
    )


def _same_machine(before: Report, after: Report) -> bool:
    both = [(getattr(before.environment, name), getattr(after.environment, name)) for name in MACHINE]
    return all(first == second or None in (first, second) for first, second in both)


def _rows(report: Report) -> dict[RowKey, Found]:
    return {(case.workload, row.implementation): (case, row) for case in report.all_cases for row in case.rows}


def _measured_in_turns(before: Report, after: Report) -> bool:
    return bool(before.run.in_turns) and before.run.in_turns == after.run.in_turns


def _name(key: RowKey) -> str:
    return f"{key[1]} on {key[0].label}"


def _change(pairs: Sequence[tuple[Found, Found]], in_turns: bool) -> RowChange:
    """Return the change of one row over all pairs of runs that have it."""
    (case, row), (_, row_after) = _shown(pairs)
    reference, drift = case.reference, None
    if in_turns:
        noise = floor = statistics.MIN_FLOOR
        times = found = [_round_by_round(before, after, floor) for before, after in pairs]
    else:
        cases = [(before[0], after[0]) for before, after in pairs]
        reference = reference if len({each.reference for both in cases for each in both}) == 1 else None
        noise = max(statistics.repeated_floor(_floors(side)) for side in zip(*cases, strict=True))
        drifts = [_times(_reference_row(before), _reference_row(after), noise) for before, after in cases]
        drift = statistics.repeated_ratio([each for each in drifts if each], noise) if reference else None
        floor = max(noise, math.expm1(abs(math.log(drift.value)))) if drift else noise
        times = [_times(before[1], after[1], noise) for before, after in pairs]
        found = [_beyond(before[1], after[1], floor) for before, after in pairs] if drift else []
    ratios = [each for each in found if each]
    return RowChange(
        workload=case.workload,
        implementation=row.implementation,
        before=row,
        after=row_after,
        times=statistics.repeated_ratio([each for each in times if each], noise),
        ratio=statistics.repeated_ratio(ratios, floor),
        noise=noise,
        floor=floor,
        reference=reference,
        drift=drift,
        memory=_growth([(before[1], after[1]) for before, after in pairs]),
        in_turns=in_turns,
        by_pair=tuple(ratios),
    )


def _round_by_round(before: Found, after: Found, floor: float) -> Ratio | None:
    """Return the ratio of a row's times in the same rounds; that of the medians if it skipped rounds in a run."""
    if all(_in_every_round(found) for found in (before, after)):
        return statistics.paired_ratio(before[1].samples, after[1].samples, floor)
    return _times(before[1], after[1], floor)


def _in_every_round(found: Found) -> bool:
    case, row = found
    reference = _reference_row(case)
    return reference is not None and len(reference.samples) == len(row.samples)


def _floors(cases: Sequence[AnyCase]) -> list[NoiseFloor]:
    return [case.noise_floor for case in cases if case.noise_floor]


def _shown(pairs: Sequence[tuple[Found, Found]]) -> tuple[Found, Found]:
    """Return the first pair with a row that is not ok, otherwise the one with the median ratio of times."""
    for pair in pairs:
        if any(row.status != "ok" for _, row in pair):
            return pair
    timed = [pair for pair in pairs if all(row.call_s for _, row in pair)]
    if not timed:
        return pairs[0]
    return sorted(timed, key=_ratio_of_medians)[len(timed) // 2]


def _ratio_of_medians(pair: tuple[Found, Found]) -> float:
    before, after = pair[0][1].call_s, pair[1][1].call_s
    assert before is not None
    assert after is not None
    return before.median / after.median


def _growth(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Return the median peak memory after over that before."""
    before, after = ([row.peak_bytes for row in side if row.peak_bytes] for side in zip(*pairs, strict=True))
    return median(after) / median(before) if before and after else None


def _reference_row(case: AnyCase) -> Row | None:
    return next((row for row in case.rows if row.implementation == case.reference), None)


def _times(before: Row | None, after: Row | None, floor: float) -> Ratio | None:
    first, second = _call_time(before), _call_time(after)
    return statistics.ratio_of_medians(first, second, floor) if first and second else None


def _beyond(before: Row, after: Row, floor: float) -> Ratio | None:
    if before.speedup is None or after.speedup is None:
        return None
    return statistics.ratio_of_speedups(before.speedup, after.speedup, floor)


FIELD_NAMES: Final = {"mlx": "MLX", "blas": "BLAS", "memory_bytes": "memory", "os": "system", "python": "Python"}


def _differences(before: Report, after: Report) -> tuple[str, ...]:
    differences = []
    for name in before.environment.__struct_fields__:
        first, second = getattr(before.environment, name), getattr(after.environment, name)
        if first != second:
            say = formatting.size if name == "memory_bytes" else str
            words = [say(value) if value else "unknown" for value in (first, second)]
            differences.append(f"{FIELD_NAMES.get(name, name)}: {words[0]}, then {words[1]}")
    return (*differences, *_other_reference(before, after), *_other_load(before, after))


def _other_reference(before: Report, after: Report) -> tuple[str, ...]:
    """Return where the reference is not the same code in both runs, or not accurate in one of them."""
    if _measured_in_turns(before, after):
        return ()
    found: dict[str, None] = {}
    first, second = _rows(before), _rows(after)
    for key, (case, row) in first.items():
        if row.implementation != case.reference or key not in second or second[key][0].reference != case.reference:
            continue
        for name in ("path", "status"):
            words = getattr(row, name), getattr(second[key][1], name)
            if words[0] != words[1]:
                found[f"{name} of {case.reference}, which changes are relative to: {words[0]}, then {words[1]}"] = None
    return tuple(found)


def _other_load(before: Report, after: Report) -> tuple[str, ...]:
    """Return in what load the runs differ, if by enough to look like a change of the code."""
    cores = [report.conditions.other_cores if report.conditions else None for report in (before, after)]
    first, second = cores
    if _measured_in_turns(before, after) or first is None or second is None or before.conditions is None:
        return ()
    if abs(first - second) < MANY_SHARE * (before.conditions.cores or 1):
        return ()
    return (
        f"other load: {first:.1f} cores were busy, then {second:.1f}; it slows rows of several threads more than the "
        "baseline, which looks like a change of theirs",
    )


ACROSS: Final = "across"
NOTE: Final = (
    "Speedups are each machine's own, over its reference in the same rounds. A ratio marked 'across' compares times of "
    "different machines: it includes all that differs between them."
)


class MachineRow(Struct, frozen=True, kw_only=True):
    """One implementation on one machine."""

    machine: int
    """Number of the machine, from 0."""
    case: AnyCase
    row: Row
    across: Ratio | None
    """Time on the first machine that has the row over the time here; above 1 is faster here. None on that machine."""


class MachineTable(Struct, frozen=True, kw_only=True):
    """The rows of several machines."""

    machines: tuple[str, ...]
    """Device and backend of each."""
    rows: dict[tuple[AnyWorkload, str], tuple[MachineRow, ...]]
    """By workload and implementation; of repeated cases those of the latest run."""
    notes: tuple[str, ...]


def by_machine(reports: Sequence[Report]) -> MachineTable:
    """Put the rows of runs side by side, those of one machine together.

    A machine is a device and backend, on the CPU with so many cores and so much memory: virtual machines name their
    processors alike.
    """
    names = machine_names(reports)
    machines: dict[str, int] = {}
    found: dict[tuple[AnyWorkload, str], dict[int, tuple[AnyCase, Row]]] = {}
    versions: dict[str, dict[str, None]] = {}
    for report in in_order(reports):
        name = names[machine_key(report)]
        number = machines.setdefault(name, len(machines))
        versions.setdefault(name, {})[f"fatui {report.environment.fatui}, MLX {report.environment.mlx}"] = None
        for case in report.all_cases:
            for row in case.rows:
                before = found.setdefault((case.workload, row.implementation), {})
                if number not in before or _call_time(row):
                    before[number] = case, row
    notes = [
        f"{name}: runs of different versions: {'; '.join(each)}" for name, each in versions.items() if len(each) > 1
    ]
    notes += [f"{report.run.id}: edited since it was written" for report in reports if report.edited]
    return MachineTable(
        machines=tuple(machines),
        rows={key: _beside(each) for key, each in found.items()},
        notes=tuple(notes),
    )


def machine_name(report: Report) -> str:
    """Return the device and the backend of a run."""
    where = report.environment
    return f"{where.machine or 'unknown device'}, {where.backend or 'unknown backend'}"


def machine_key(report: Report) -> tuple[str, ...]:
    """Return what runs of one machine have in common."""
    if report.environment.backend != "cpu":
        return (machine_name(report),)
    cores = cpu_cores(report)
    known = counted(cores, "core") if cores else "unknown cores"
    return machine_name(report), known, formatting.size(report.environment.memory_bytes)


def machine_names(reports: Sequence[Report]) -> dict[tuple[str, ...], str]:
    """Return the name of each machine by its key, with cores and memory where several have the same."""
    keys = dict.fromkeys(map(machine_key, reports))
    alike = Counter(name for name, *_ in keys)
    return {key: ", ".join(key) if alike[key[0]] > 1 else key[0] for key in keys}


def _beside(found: dict[int, tuple[AnyCase, Row]]) -> tuple[MachineRow, ...]:
    first = next((found[number] for number in sorted(found) if _call_time(found[number][1])), None)
    return tuple(
        MachineRow(machine=number, case=case, row=row, across=_across(first, (case, row)))
        for number, (case, row) in sorted(found.items())
    )


def _across(first: tuple[AnyCase, Row] | None, here: tuple[AnyCase, Row]) -> Ratio | None:
    if first is None or first[1] is here[1]:
        return None
    return _times(first[1], here[1], statistics.repeated_floor(_floors([case for case, _ in (first, here)])))


HEADS: Final = ("implementation", "machine", "per call", "tokens/s", "speedup", ACROSS, "memory", "status")


def cells(name: str, entry: MachineRow) -> tuple[str, ...]:
    """Return the texts of a row, in the order of HEADS."""
    row = entry.row
    reference = entry.case.reference
    speedup = "reference" if name == reference else formatting.speedup_text(row.speedup)
    return (
        name,
        f"[{entry.machine + 1}]",
        formatting.interval_text(row.call_s),
        formatting.tokens_per_second(row.tokens_per_second),
        speedup,
        f"{ACROSS} {formatting.speedup_text(entry.across)}" if entry.across else "",
        formatting.size(row.peak_bytes),
        row.status,
    )


def labels(table: MachineTable) -> dict[str, list[tuple[str, MachineRow]]]:
    """Return the rows by the label of their workload."""
    groups: dict[str, list[tuple[str, MachineRow]]] = {}
    for (workload, name), entries in table.rows.items():
        groups.setdefault(workload.label, []).extend((name, entry) for entry in entries)
    return groups


def to_markdown(table: MachineTable) -> str:
    """Format the rows of several machines as Markdown."""
    lines = [f"{number}. {markdown_cell(name)}" for number, name in enumerate(table.machines, 1)]
    for label, rows in labels(table).items():
        lines += ["", f"### {markdown_cell(label)}", "", f"| {' | '.join(HEADS)} |", f"|{' --- |' * len(HEADS)}"]
        lines += [f"| {' | '.join(map(markdown_cell, cells(name, entry)))} |" for name, entry in rows]
    lines += ["", NOTE, *(f"- {markdown_cell(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"
