"""What the Scaling screen shows of a sweep: a figure over an axis with crossovers, and a map of winners over two."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, get_args

from msgspec import Struct, structs

from attention.core.results import Case, Peaks, Report, Row
from fatui import formatting
from fatui.quantities import format_number
from fatui.report import scaling
from fatui.report.evidence import sound_rows
from fatui.report.scaling import RatePoint, Value
from fatui.tui.view_models import roofline
from fatui.tui.view_models.plot import CROSSING, Axis, Line, Note, Plot, Point, decades, from_zero

Figure = Literal["tokens/s", "latency", "FLOP/s", "memory"]
FIGURES: Final[tuple[Figure, ...]] = get_args(Figure)
FORMATS: Final[dict[Figure, Callable[[float], str]]] = {
    "tokens/s": formatting.rate,
    "latency": formatting.seconds,
    "FLOP/s": formatting.rate,
    "memory": formatting.size,
}
MEANS: Final[dict[Figure, str]] = {
    "tokens/s": "tokens/s",
    "latency": "latency of one synchronised call",
    "FLOP/s": "FLOP/s, dotted: the roof that limits the case",
    "memory": "peak memory above the inputs",
}
FEW: Final = 4
"""Numbers that span less than this ratio stand on a linear axis."""
EDGE: Final = 0.06
"""Room beside the first and the last value, relative."""
Curves = Mapping[str, Sequence[RatePoint]]


def format_value(value: Value) -> str:
    """Format a value of an axis."""
    return format_number(value) if isinstance(value, int) else value


def figure_curves(cases: Sequence[Case], axis: str, figure: Figure) -> dict[str, list[RatePoint]]:
    """Return a figure of each implementation over cases sorted by an axis; those without it are left out."""
    made: dict[str, list[RatePoint]] = {}
    for case in cases:
        for row in sound_rows(case):
            point = _point(case, row, axis, figure)
            if point is not None:
                made.setdefault(row.implementation, []).append(point)
    return made


def _point(case: Case, row: Row, axis: str, figure: Figure) -> RatePoint | None:
    at, call = scaling.value(case.workload, axis), row.call_s
    if figure in ("latency", "memory"):
        single = row.latency_s if figure == "latency" else row.peak_bytes
        return RatePoint(at, single, single, single) if single else None
    if call is None:
        return None
    work = case.workload.tokens if figure == "tokens/s" else case.workload.flops
    return RatePoint(at, *scaling.rates(work, call))


def roof_curve(cases: Sequence[Case], axis: str, peaks: Peaks) -> list[RatePoint]:
    """Return the FLOP/s that the machine's roofs allow for each case; none without measured rates."""
    made = []
    for case in cases:
        limits = roofline.limits_of(case.workload, peaks)
        if limits is not None:
            best = case.workload.flops / limits.seconds
            made.append(RatePoint(scaling.value(case.workload, axis), best, best, best))
    return made


class AxisPlaces(Struct, frozen=True):
    """Where the values of an axis stand: numbers by their size, words at equal distances."""

    values: tuple[Value, ...]

    def at(self, value: Value) -> float:
        """Return the place of a value."""
        return float(value) if isinstance(value, int) else float(self.values.index(value))

    @property
    def axis(self) -> Axis:
        """The horizontal axis, with a tick at each value."""
        places = [self.at(value) for value in self.values]
        ticks = tuple((place, format_value(value)) for place, value in zip(places, self.values, strict=True))
        low, high = min(places), max(places)
        if isinstance(self.values[0], int) and low > 0 and high >= FEW * low:
            room = (high / low) ** EDGE
            return Axis(low / room, high * room, True, ticks)
        room = (high - low) * EDGE or 0.5
        return Axis(low - room, high + room, False, ticks)


def curve_plot(
    values: tuple[Value, ...],
    lines: Curves,
    *,
    logarithmic: bool,
    say: Callable[[float], str],
    roof: Sequence[RatePoint] = (),
    cursor: Value | None = None,
    crossing: bool = False,
) -> Plot | None:
    """Return a plot of curves with their intervals; None without any.

    Args:
        values: the values of the axis, in order.
        lines: the curves by name, in the order of their marks.
        logarithmic: whether the vertical axis is.
        say: formats its ticks.
        roof: a dotted curve without marks.
        cursor: the value at which a vertical line stands.
        crossing: whether crossovers are marked on the curves.
    """
    places = AxisPlaces(values)
    drawn = [
        Line(number, tuple(Point(places.at(each.at), each.rate, each.low, each.high) for each in points))
        for number, points in enumerate(lines.values())
    ]
    ends = [end for points in (*lines.values(), roof) for point in points for end in (point.low, point.high)]
    if not ends:
        return None
    y = decades(min(ends), max(ends), say) if logarithmic and min(ends) > 0 else from_zero(max(ends), say)
    if roof:
        top = tuple(Point(places.at(each.at), each.rate, each.rate, each.rate) for each in roof)
        drawn.insert(0, Line(roofline.ROOF, top, marked=False, every=3))
    notes = _crossings(lines, places, logarithmic) if crossing else []
    at = places.at(cursor) if cursor in values and cursor is not None else None
    return Plot(places.axis, y, tuple(drawn), tuple(notes), cursor=at)


def _crossings(lines: Curves, places: AxisPlaces, logarithmic: bool) -> list[Note]:
    """Return a sign for each crossover, where the two lines as they are drawn meet."""
    found = scaling.crossovers({name: list(points) for name, points in lines.items()})
    notes = []
    for each in found:
        (x0, x1), before, after = (
            (places.at(each.between[0]), places.at(each.between[1])),
            _ends(lines[each.faster_before], each.between),
            _ends(lines[each.faster_after], each.between),
        )
        scale = math.log if logarithmic else float
        gap0, gap1 = (scale(a) - scale(b) for a, b in zip(before, after, strict=True))
        part = gap0 / (gap0 - gap1) if gap0 != gap1 else 0.5
        across = places.axis.logarithmic
        x = x0 * (x1 / x0) ** part if across else x0 + (x1 - x0) * part
        y = after[0] * (after[1] / after[0]) ** part if logarithmic else after[0] + (after[1] - after[0]) * part
        notes.append(Note(x, y, CROSSING, f"{each.faster_after} overtakes"))
    return notes


def _ends(points: Sequence[RatePoint], between: tuple[Value, Value]) -> tuple[float, float]:
    rates = {point.at: point.rate for point in points}
    return rates[between[0]], rates[between[1]]


def letters_of(names: Sequence[str]) -> dict[str, str]:
    """Return a letter for each implementation: its first that no other one has."""
    made: dict[str, str] = {}
    for name in names:
        choices = [*name.upper(), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        made[name] = next((each for each in choices if each.isalpha() and each not in made.values()), "?")
    return made


class MapCell(Struct, frozen=True):
    """A cell of the map: its text, and its tone: "none", "slower", "same", "faster" or "much-faster"."""

    text: str
    tone: str = "none"


NO_CASE: Final = MapCell("·")


def winner_cell(case: Case, letters: Mapping[str, str]) -> MapCell:
    """Return the letters of the fastest implementations of a case, with their speedup over the reference."""
    best = formatting.best_of(case)
    rows = [row for row in case.rows if row.implementation in best]
    if not rows:
        return _tie(case)
    cell = speedup_cell(max(rows, key=lambda row: row.speedup.value if row.speedup else 0.0))
    return MapCell(f"{''.join(letters.get(row.implementation, '?') for row in rows)} {cell.text}", cell.tone)


def _tie(case: Case) -> MapCell:
    """Return the cell of a case without a fastest: whether all are equal, or it is too uncertain to say."""
    ratios = [row.speedup for row in case.rows if row.status == formatting.OK]
    if not ratios:
        return MapCell("none")
    equal = all(ratio is not None and formatting.is_clear(ratio) and not ratio.significant for ratio in ratios)
    return MapCell("≈", "same") if equal else MapCell("?")


def speedup_cell(row: Row | None) -> MapCell:
    """Return one implementation's speedup over the reference, or its status."""
    if row is None:
        return NO_CASE
    if row.status != formatting.OK:
        return MapCell(row.status)
    ratio = row.speedup
    if ratio is None:
        return MapCell(formatting.UNKNOWN)
    if ratio.low == ratio.high == 1:
        return MapCell("1", "same")
    if not ratio.significant:
        return MapCell("≈ 1", "same") if formatting.is_clear(ratio) else MapCell("?")
    tone = "slower" if ratio.value < 1 else "much-faster" if ratio.value >= 2 else "faster"
    return MapCell(f"{formatting.three(ratio.value)}x", tone)


ELSE_OVER: Final = "*"
"""Marks a speedup over another reference than that of most cases."""


def references_of(report: Report) -> tuple[str | None, tuple[str, ...]]:
    """Return the reference of most cases, and the others."""
    counts = Counter(case.reference for case in report.cases if case.reference)
    names = sorted(counts, key=lambda name: -counts[name])
    return (names[0] if names else None), tuple(names[1:])


class HeatData(Struct, frozen=True):
    """The two axes, and the cells by their values, (across, down)."""

    across: tuple[str, tuple[Value, ...]]
    down: tuple[str, tuple[Value, ...]]
    cells: Mapping[tuple[Value, Value], MapCell]


def heat_map(report: Report, name: str | None, across: str, down: str, part: str) -> HeatData:
    """Return the map of one implementation's speedups, or of the winners, over two axes in one slice of a run."""
    letters, (reference, _) = letters_of([line.implementation for line in report.summary]), references_of(report)
    cells = {}
    for case in scaling.cases_of(report, (across, down), part):
        key = scaling.value(case.workload, across), scaling.value(case.workload, down)
        cell = winner_cell(case, letters) if name is None else speedup_cell(scaling.row_of(case, name))
        elsewhere = case.reference not in (None, reference) and cell.tone != "none"
        cells[key] = structs.replace(cell, text=f"{cell.text}{ELSE_OVER}") if elsewhere else cell
    values = (
        tuple(each for each in scaling.values_on(report, axis) if any(each == key[place] for key in cells))
        for place, axis in enumerate((across, down))
    )
    columns, rows = values
    return HeatData((across.rstrip("_"), columns), (down.rstrip("_"), rows), cells)
