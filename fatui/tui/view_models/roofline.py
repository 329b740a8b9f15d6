"""The roofline of a machine: what limits a case, and how near to it the implementations come.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009). The roofs are
those measured on this machine: the best matrix product, the best copy, and the shortest evaluated call.
"""

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

from attention.core.results import Case, Peaks
from attention.core.workload import Workload
from fatui import formatting
from fatui.report.document import joined
from fatui.report.evidence import sound_rows
from fatui.report.scaling import rates
from fatui.tui.view_models.plot import Axis, Line, Note, Plot, Point, decades

Roof = Literal["compute", "copy", "launch"]
UNMEASURED: Final = "The roofs are measured at the start of a run; {run} starts one."
PREDICTED: Final = "◎"
SPAN: Final = 8.0
"""The horizontal axis reaches at least this many times further than the ridge and the case."""
ROOF: Final = -4
"""Number of the roofs among the lines."""


class Limits(Struct, frozen=True):
    """The shortest time in which a case can be computed on each roof, in seconds."""

    compute: float
    copy: float
    launch: float | None
    """None if it was not measured."""

    @property
    def seconds(self) -> float:
        """The shortest time of a call."""
        return max(self.compute, self.copy, self.launch or 0.0)

    @property
    def roof(self) -> Roof:
        """The roof that limits the case."""
        times: dict[Roof, float] = {"compute": self.compute, "copy": self.copy, "launch": self.launch or 0.0}
        return max(times, key=lambda name: times[name])


def limits_of(workload: Workload, peaks: Peaks) -> Limits | None:
    """Return the limits of a case, or None without measured rates; a rank's share of it is on its own device."""
    if not peaks.flops_per_s or not peaks.copy_bytes_per_s:
        return None
    return Limits(
        compute=workload.flops / workload.ranks / peaks.flops_per_s,
        copy=workload.bytes_moved / workload.ranks / peaks.copy_bytes_per_s,
        launch=peaks.launch_s,
    )


def intensity(workload: Workload) -> float:
    """Return the FLOPs of a call over the bytes that a fused kernel moves."""
    return workload.flops / workload.bytes_moved


WHAT: Final[dict[Roof, str]] = {
    "compute": "Compute limits this case",
    "copy": "Memory traffic limits this case",
    "launch": "The launch of a call limits this case",
}


def limit_words(workload: Workload, peaks: Peaks, cases: Sequence[Case] = ()) -> list[str]:
    """Describe what limits a case, and how near to that the implementations of a run come, in sentences."""
    limits = limits_of(workload, peaks)
    if limits is None:
        return []
    launch = "" if limits.launch is None else f", a call {formatting.seconds(limits.launch)}"
    tokens = formatting.tokens_per_second(workload.tokens / limits.seconds)
    lines = [
        f"{WHAT[limits.roof]}: {formatting.flops(workload.flops)} take {formatting.seconds(limits.compute)}, "
        f"{formatting.size(workload.bytes_moved)} {formatting.seconds(limits.copy)}{launch}; at best {tokens} tokens/s."
    ]
    own = [case for case in cases if case.workload == workload]
    rows = [row for case in own for row in sound_rows(case) if row.call_s]
    others = list(dict.fromkeys(case.workload.label for case in cases if any(row.call_s for row in sound_rows(case))))
    if others and not rows:
        lines.append(
            f"Not measured; the marks are of {others[0] if len(others) == 1 else f'{len(others)} other cases'}."
        )
    if rows:
        found = sorted(rows, key=lambda row: row.call_s.median if row.call_s else 0.0)
        shares = [
            f"{row.implementation} at {formatting.percent(limits.seconds / row.call_s.median)}"
            for row in found
            if row.call_s
        ]
        lines.append(f"Of that: {joined(shares)}.")
        unfused = [row.implementation for row in found if row.fused is False]
        if unfused:
            scores = formatting.rate(workload.scores)
            lines.append(f"Unfused, so that {scores} scores pass through memory too: {joined(unfused)}.")
    return lines


def roofline(workload: Workload, peaks: Peaks, cases: Sequence[Case] = (), names: Sequence[str] = ()) -> Plot | None:
    """Return the plot of FLOP/s over FLOP/byte: the roofs, the case, and what was measured; None without roofs.

    Args:
        workload: the case on the sliders; its point lies on the roof that limits it.
        peaks: the machine's measured rates.
        cases: measured cases.
        names: the implementations, in the order of their marks.
    """
    limits = limits_of(workload, peaks)
    if limits is None or not peaks.flops_per_s or not peaks.copy_bytes_per_s:
        return None
    top, slope = peaks.flops_per_s * workload.ranks, peaks.copy_bytes_per_s * workload.ranks
    ridge, at = top / slope, intensity(workload)
    lines, everything = measured_points(cases, names)
    best = workload.flops / limits.seconds
    xs = [ridge, at, *(point.x for point in everything)]
    low, high = min(xs) / SPAN, max(xs) * SPAN
    ys = [best, top * 1.3, *(point.high for point in everything), *(point.low for point in everything)]
    x, y = decades(low, high, formatting.three), decades(min(*ys, best / 3), max(ys), formatting.rate)
    roofs = [roof_line([(x.low, x.low * slope), (ridge, top), (x.high, top)], y)]
    notes = [
        Note(x.high, top, " ", f"compute {formatting.flops(peaks.flops_per_s)}/s", ROOF),
        Note(min(max(x.low, y.low / slope) * 3, ridge), min(max(x.low * 3 * slope, y.low * 3), top), " ", "copy", ROOF),
    ]
    if limits.launch is not None:
        ceiling = workload.flops / limits.launch
        if y.low < ceiling < y.high:
            roofs.append(roof_line([(x.low, ceiling), (x.high, ceiling)], y, every=3))
            notes.append(Note(x.low, ceiling, " ", "launch", ROOF))
    notes.append(Note(at, best, PREDICTED, "at best"))
    return Plot(x, y, (*roofs, *lines), tuple(notes), cursor=at)


def roof_line(places: list[tuple[float, float]], y: Axis, number: int = ROOF, every: int = 1) -> Line:
    """Return a roof, from where it enters the plot."""
    x0, y0 = places[0]
    if y0 < y.low < places[1][1]:
        places = [(x0 * y.low / y0, y.low), *places[1:]]  # a slope of one: FLOP/s over FLOP/byte
    return Line(number, tuple(Point(a, b, b, b) for a, b in places), marked=False, every=every)


def measured_points(cases: Sequence[Case], names: Sequence[str]) -> tuple[list[Line], list[Point]]:
    """Return what was measured, a line of points for each implementation, and all of the points."""
    points: dict[str, list[Point]] = {}
    for case in cases:
        for row in sound_rows(case):
            call = row.call_s
            if call is not None and row.implementation in names:
                point = Point(intensity(case.workload), *rates(case.workload.flops, call))
                points.setdefault(row.implementation, []).append(point)
    lines = [
        Line(names.index(name), tuple(sorted(found, key=lambda point: point.x)), joined=False)
        for name, found in points.items()
    ]
    return lines, [point for found in points.values() for point in found]
