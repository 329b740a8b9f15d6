"""Scaling over the sweeps of a run: tokens/s and speedups over the axes, crossovers, and trends as power laws."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Final

from msgspec import Struct

from attention.core.results import Case, Interval, Report, Row
from attention.core.statistics import CONFIDENCE, student_t
from attention.core.workload import AXES, Workload
from attention.core.workload import swept_axes as axes_of
from fatui.report.document import Block, Claim, MissingData, counted, joined
from fatui.report.evidence import sound_rows

MUCH: Final = 20
Value = int | str


class RatePoint(Struct, frozen=True):
    """tokens/s of one implementation on one case, with the interval of its times."""

    at: Value
    rate: float
    low: float
    high: float


class Crossover(Struct, frozen=True):
    """Two neighbouring values of an axis between which another implementation becomes the faster one."""

    faster_before: str
    faster_after: str
    between: tuple[Value, Value]


def value(workload: Workload, axis: str) -> Value:
    """Return a workload's value on an axis."""
    found: Value = getattr(workload, axis)
    return found


def swept_axes(report: Report) -> tuple[str, ...]:
    """Return the axes on which the cases differ, without those that only follow another."""
    return axes_of([case.workload for case in report.cases])


def values_on(report: Report, axis: str) -> tuple[Value, ...]:
    """Return the values of an axis, sorted; formats of keys and values by their bits, most first."""
    found = {value(case.workload, axis): case.workload.value_bits for case in report.cases}
    if axis == "kv_format":
        return tuple(sorted(found, key=lambda each: (-found[each], each)))
    return tuple(sorted(found, key=lambda each: (isinstance(each, str), each)))


def slices(report: Report, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Describe each set of values of the other swept axes; each is one slice of the run."""
    others = [axis for axis in swept_axes(report) if axis not in axes]
    return tuple(dict.fromkeys(_words(case.workload, others) for case in report.cases))


def _words(workload: Workload, axes: list[str]) -> str:
    return ", ".join(f"{axis.rstrip('_')} {value(workload, axis)}" for axis in axes)


def cases_of(report: Report, axes: tuple[str, ...], part: str) -> list[Case]:
    """Return the cases of one slice."""
    others = [axis for axis in swept_axes(report) if axis not in axes]
    return [case for case in report.cases if _words(case.workload, others) == part]


def references_text(report: Report) -> str:
    """Name what the speedups of a report are over: "poc", "poc in 3 cases, baseline in 1"."""
    counts = Counter(case.reference for case in report.all_cases if case.reference)
    if len(counts) == 1:
        return next(iter(counts))
    many = (counted(count, "case") for count in counts.values())
    return ", ".join(f"{name} in {count}" for name, count in zip(counts, many, strict=True))


def row_of(case: Case, name: str) -> Row | None:
    """Return an implementation's row, or None."""
    return next((row for row in case.rows if row.implementation == name), None)


def sorted_cases(report: Report, axis: str, part: str) -> list[Case]:
    """Return the cases of one slice over one axis, in the order of its values."""
    order = values_on(report, axis)
    return sorted(cases_of(report, (axis,), part), key=lambda each: order.index(value(each.workload, axis)))


def curves_of(cases: Sequence[Case], axis: str) -> dict[str, list[RatePoint]]:
    """Return tokens/s of each implementation over cases sorted by an axis."""
    made: dict[str, list[RatePoint]] = {}
    for case in cases:
        for row in sound_rows(case):
            if row.call_s is not None and row.tokens_per_second is not None:
                point = RatePoint(value(case.workload, axis), *rates(case.workload.tokens, row.call_s))
                made.setdefault(row.implementation, []).append(point)
    return made


def rates(work: float, call: Interval) -> tuple[float, float, float]:
    """Return work per second and its interval, low and high: at the median time of a call, its high and its low end."""
    low, high = call.low or call.median, call.high or call.median  # no interval with too few rounds
    return work / call.median, work / high, work / low


def spans_much(lines: dict[str, list[RatePoint]]) -> bool:
    """Whether the rates span so much that a zero-based scale would flatten the slower lines."""
    rates = [point.rate for points in lines.values() for point in points]
    return bool(rates) and max(rates) > MUCH * min(rates)


def crossovers(lines: dict[str, list[RatePoint]]) -> list[Crossover]:
    """Return where two implementations change order between neighbouring values, with disjoint intervals on both."""
    found = []
    names = list(lines)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            found += _crossovers_of(first, second, lines)
    return found


def _crossovers_of(first: str, second: str, lines: dict[str, list[RatePoint]]) -> list[Crossover]:
    others = {point.at: point for point in lines[second]}
    order: list[tuple[Value, str]] = []
    for point in lines[first]:
        other = others.get(point.at)
        if other is not None and point.low > other.high:
            order.append((point.at, first))
        elif other is not None and other.low > point.high:
            order.append((point.at, second))
    return [
        Crossover(before, after, (start, end)) for (start, before), (end, after) in pairwise(order) if before != after
    ]


TREND_AXES: Final = {"head_dim": "head dim", "seq": "length", "batch": "batch"}
MIN_POINTS: Final = 3
"""Minimum number of points for a fit with an interval."""
RUN_SWEEP: Final = "fatui bench scaling"


class PowerLaw(Struct, frozen=True):
    """y = c x^slope, by least squares on logarithms, with Student's t interval of the slope."""

    slope: float
    low: float
    high: float
    points: int


class Sweep(Struct, frozen=True):
    """The cases of one run that differ in one axis only, in the order of its values."""

    axis: str
    cases: tuple[Case, ...]

    @property
    def ends(self) -> str:
        """The range of the axis, as text."""
        return f"{TREND_AXES[self.axis]} {self.at(self.cases[0])} to {self.at(self.cases[-1])}"

    def at(self, case: Case) -> int:
        """Return a case's value on the axis."""
        return int(value(case.workload, self.axis))

    @property
    def elsewhere(self) -> str:
        """The label of the case without this axis."""
        short = {"head_dim": "D=", "seq": "L=", "batch": "B="}[self.axis]
        return " ".join(part for part in self.cases[0].workload.label.split() if not part.startswith(short))


def fit(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """Fit a power law to positive values; return None for fewer than three different points."""
    if len(set(xs)) < MIN_POINTS:
        return None
    u, w = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle, height = fmean(u), fmean(w)
    spread = sum((x - middle) ** 2 for x in u)
    slope = sum((x - middle) * (y - height) for x, y in zip(u, w, strict=True)) / spread
    residual = sum((y - height - slope * (x - middle)) ** 2 for x, y in zip(u, w, strict=True))
    freedom = len(u) - 2
    half = student_t((1 + CONFIDENCE) / 2, freedom) * math.sqrt(residual / freedom / spread)
    return PowerLaw(slope, slope - half, slope + half, len(u))


def sweeps(report: Report) -> Iterator[Sweep]:
    """Yield every sweep of a run along one axis, with enough points for a fit."""
    for axis in TREND_AXES:
        groups: dict[object, list[Case]] = {}
        for case in report.cases:
            rest = tuple(value(case.workload, name) for name in _others(case, axis))
            groups.setdefault(rest, []).append(case)
        for cases in groups.values():
            if len({value(case.workload, axis) for case in cases}) >= MIN_POINTS:
                yield Sweep(axis, tuple(sorted(cases, key=lambda each: int(value(each.workload, axis)))))


def _others(case: Case, axis: str) -> list[str]:
    """Return the fields that must be equal in a sweep; a kv_seq that follows seq is not an axis of its own."""
    follows = axis == "seq" and case.workload.kv_seq == case.workload.seq
    return [name for name in AXES if name != axis and not (follows and name == "kv_seq")]


def time_law(sweep: Sweep, name: str) -> PowerLaw | None:
    """Fit an implementation's time per call along a sweep."""
    points = [
        (sweep.at(case), row.call_s.median)
        for case in sweep.cases
        for row in sound_rows(case)
        if row.implementation == name and row.call_s
    ]
    return fit([x for x, _ in points], [y for _, y in points])


def speedup_law(sweep: Sweep, name: str) -> PowerLaw | None:
    """Fit an implementation's speedup along a sweep; None if the reference changes."""
    if len({case.reference for case in sweep.cases}) != 1 or name == sweep.cases[0].reference:
        return None
    points = [
        (sweep.at(case), row.speedup.value)
        for case in sweep.cases
        for row in sound_rows(case)
        if row.implementation == name and row.speedup
    ]
    return fit([x for x, _ in points], [y for _, y in points])


def effects(reports: Sequence[Report], names: Sequence[str]) -> list[Block]:
    """Return the trends and crossovers of each axis, or for an axis without a sweep, what to run."""
    found = [sweep for report in reports for sweep in sweeps(report)]
    made: list[Block] = []
    for axis, word in TREND_AXES.items():
        along = [sweep for sweep in found if sweep.axis == axis]
        claims = [finding for sweep in along for finding in _sweep_findings(sweep, names)]
        if not along:
            made.append(MissingData(f"No run has swept {word} alone over three values or more.", RUN_SWEEP))
        elif not claims:
            made.append(
                MissingData(
                    f"The intervals support no trend along {word}; more time narrows them.", f"{RUN_SWEEP} --seconds 20"
                )
            )
        made += claims
    return made


def _sweep_findings(sweep: Sweep, names: Sequence[str]) -> list[Claim]:
    made = []
    grown = [f"{name} as {sweep_power(law)}" for name in names if (law := time_law(sweep, name)) and law.low > 0]
    if grown:
        made.append(Claim(f"{_begin(sweep)}: the time of a call grows with {TREND_AXES[sweep.axis]}, {joined(grown)}."))
    made += [found for name in names if (found := _gain(sweep, name))]
    curves = curves_of(sweep.cases, sweep.axis)
    for crossing in crossovers(curves):
        first, then = crossing.between
        text = f"{crossing.faster_before} is the faster up to {first}, {crossing.faster_after} from {then} on"
        made.append(Claim(f"{_begin(sweep)}: between {crossing.faster_before} and {crossing.faster_after}, {text}."))
    return made


def sweep_power(law: PowerLaw) -> str:
    """Format the power with its interval, as used in a sentence."""
    half = law.high - law.slope
    return f"its power {law.slope:.2f} ±{half:.2f}"


def _begin(sweep: Sweep) -> str:
    return f"{sweep.ends[0].upper()}{sweep.ends[1:]} ({sweep.elsewhere})"


def _gain(sweep: Sweep, name: str) -> Claim | None:
    """Return the finding that the speedup grows or diminishes with each doubling, or None."""
    law = speedup_law(sweep, name)
    if law is None or law.low <= 0 <= law.high:
        return None
    factor, low, high = (2.0**power for power in (law.slope, law.low, law.high))
    verb = "grows" if factor > 1 else "diminishes"
    figures = f"{factor:.2f} times [{low:.2f}, {high:.2f}] at each doubling, {law.points} points"
    return Claim(f"{_begin(sweep)}: the speedup of {name} over {sweep.cases[0].reference} {verb}: {figures}.")
