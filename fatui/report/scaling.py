"""Scaling over a sweep: speedups over two axes, tokens/s over one, and crossovers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from msgspec import Struct

from attention.core.results import Case, Interval, Report, Row
from attention.core.workload import Workload

AXES: Final = ("batch", "seq", "kv_seq", "heads", "kv_heads", "head_dim", "dtype", "mask", "pass_")
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
    columns = {axis: [value(case.workload, axis) for case in report.cases] for axis in AXES}
    axes = [axis for axis in AXES if len(set(columns[axis])) > 1]
    for follower, leader in (("kv_seq", "seq"), ("kv_heads", "heads")):
        if follower in axes and leader in axes and columns[follower] == columns[leader]:
            axes.remove(follower)
    return tuple(axes)


def values_on(report: Report, axis: str) -> tuple[Value, ...]:
    """Return the values of an axis, sorted."""
    found = {value(case.workload, axis) for case in report.cases}
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


def row_of(case: Case, name: str) -> Row | None:
    """Return an implementation's row, or None."""
    return next((row for row in case.rows if row.implementation == name), None)


def grid(report: Report, name: str, across: str, down: str, part: str) -> dict[tuple[Value, Value], Row]:
    """Return one implementation's rows by their values on two axes, (across, down)."""
    found = {}
    for case in cases_of(report, (across, down), part):
        row = row_of(case, name)
        if row is not None:
            found[value(case.workload, across), value(case.workload, down)] = row
    return found


def curves(report: Report, axis: str, part: str) -> dict[str, list[RatePoint]]:
    """Return tokens/s of each implementation over one axis, in one slice of a run."""
    order = values_on(report, axis)
    cases = sorted(cases_of(report, (axis,), part), key=lambda each: order.index(value(each.workload, axis)))
    return curves_of(cases, axis)


def curves_of(cases: Sequence[Case], axis: str) -> dict[str, list[RatePoint]]:
    """Return tokens/s of each implementation over cases sorted by an axis."""
    made: dict[str, list[RatePoint]] = {}
    for case in cases:
        for row in case.rows:
            if row.call_s is not None and row.tokens_per_second is not None and _sound(row):
                made.setdefault(row.implementation, []).append(_point(case, axis, row.call_s))
    return made


def _sound(row: Row) -> bool:
    return row.status == "ok" and not row.collecting


def _point(case: Case, axis: str, call: Interval) -> RatePoint:
    tokens = case.workload.tokens
    low, high = call.low or call.median, call.high or call.median  # no interval with too few rounds
    return RatePoint(value(case.workload, axis), tokens / call.median, tokens / high, tokens / low)


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
