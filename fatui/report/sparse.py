"""Sparse patterns: speedup over dense by density, and the density from which dense is as fast."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from msgspec import Struct, structs

from attention.core.results import Case, Ratio, Row
from attention.core.workload import Workload
from fatui import formatting
from fatui.report.document import Block, Claim, Paragraph, Table
from fatui.report.evidence import sound_rows
from fatui.report.scaling import RatePoint


class DensityPoint(Struct, frozen=True):
    """One implementation on one masked case, beside its own dense time."""

    density: float
    workload: Workload
    row: Row
    ratio: Ratio
    """Speedup over dense."""


class BreakEven(Struct, frozen=True):
    """The density at which a masked call takes as long as a dense one."""

    density: float
    """Interpolated between the two densities."""
    low: float
    """The highest measured density below it that is faster than dense, beyond noise."""
    high: float
    """The lowest measured density above it that is slower than dense, beyond noise."""


def density_points(cases: Iterable[Case], name: str) -> list[DensityPoint]:
    """Return the points of an implementation with a speedup over dense, by density."""
    found = [
        DensityPoint(case.workload.density, case.workload, row, row.over_dense)
        for case in cases
        for row in sound_rows(case)
        if row.implementation == name and row.over_dense is not None
    ]
    return sorted(found, key=lambda point: point.density)


def break_even(points: Sequence[DensityPoint]) -> BreakEven | None:
    """Return where points by density go from faster than dense to slower, or None.

    Both neighbours must differ from dense beyond noise; between them the share of the dense time is taken as linear.
    """
    clear = [point for point in points if point.ratio.significant]
    for before, after in pairwise(clear):
        if before.ratio.value > 1 > after.ratio.value and before.density < after.density:
            first, second = 1 / before.ratio.value, 1 / after.ratio.value
            part = (1 - first) / (second - first)
            between = before.density + part * (after.density - before.density)
            return BreakEven(between, before.density, after.density)
    return None


def random_blocks(points: Sequence[DensityPoint]) -> list[DensityPoint]:
    """Return the points of random blocks, which differ in density alone."""
    return [point for point in points if point.workload.mask.startswith("blocks:")]


def break_even_text(name: str, points: Sequence[DensityPoint]) -> str | None:
    """Describe up to which density of random blocks an implementation is faster than dense; None without a finding."""
    chosen = random_blocks(points)
    found = break_even(chosen)
    if found:
        return (
            f"{name} breaks even with dense at a density of about {found.density:.2g}: random blocks are faster at "
            f"{found.low:.3g} and slower at {found.high:.3g}"
        )
    clear = [point for point in chosen if point.ratio.significant]
    if len(clear) < 2 or len({point.ratio.value > 1 for point in clear}) > 1:
        return None
    low, high = (f"{point.density:.3g}" for point in (clear[0], clear[-1]))
    how = "faster" if clear[0].ratio.value > 1 else "slower"
    rest = "" if len(clear) == len(chosen) else "; at the other densities measured noise hides the difference"
    return f"{name} is {how} than dense with random blocks at densities from {low} to {high}{rest}"


def density_curves(cases: Sequence[Case], names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, list[RatePoint]]]:
    """Return the densities of random blocks and each implementation's time there, as a share of its own dense time.

    Two lines are for comparison: dense itself, which is 1, and the pairs, the share reached at equal efficiency.
    Nothing is returned for fewer than two densities.
    """
    points = {name: found for name in names if (found := random_blocks(density_points(cases, name)))}
    densities = sorted({point.density for found in points.values() for point in found})
    if len(densities) < 2:
        return (), {}
    at = {density: f"{density:.3g}" for density in densities}
    lines = {
        name: [RatePoint(at[p.density], 1 / p.ratio.value, 1 / p.ratio.high, 1 / p.ratio.low) for p in found]
        for name, found in points.items()
    }
    lines["dense"] = [RatePoint(at[density], 1.0, 1.0, 1.0) for density in densities]
    lines["pairs"] = [RatePoint(at[density], density, density, density) for density in densities]
    return tuple(at.values()), lines


def sparse_blocks(cases: Sequence[Case], names: Sequence[str]) -> list[Block]:
    """Return the section: findings of break-even, and the speedup over dense by shape and density."""
    masked = [case for case in cases if "dense" in formatting.counterparts_of([case])]
    if not masked:
        return []
    blocks: list[Block] = [
        Paragraph(
            "Each case was also timed with every pair visible, in the same rounds: the speedup over dense is an "
            "implementation's own. At equal efficiency it is 1 / density."
        )
    ]
    for shape, group in shapes_of(masked).items():
        for name in names:
            text = break_even_text(name, density_points(group, name))
            if text:
                blocks.append(Claim(f"{text} ({shape})."))
        best = _largest(group, names)
        if best:
            blocks.append(best)
    return [*blocks, _table(masked, names)]


def shapes_of(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Return the cases by the label of their dense shape."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(structs.replace(case.workload, mask="none").label, []).append(case)
    return groups


def _largest(cases: Sequence[Case], names: Sequence[str]) -> Claim | None:
    points = [(name, point) for name in names for point in density_points(cases, name)]
    clear = [(name, point) for name, point in points if point.ratio.significant and point.ratio.value > 1]
    if not clear:
        return None
    name, point = max(clear, key=lambda each: each[1].ratio.value)
    times, pairs = formatting.speedup_text(point.ratio), _ideal(point.workload)
    label = point.workload.label
    return Claim(f"Largest speedup over dense: {name}, {times} on {label}, with {pairs} times fewer pairs.")


def _table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    rows = []
    for case in sorted(cases, key=lambda each: -each.workload.density):
        points = {name: density_points([case], name) for name in names}
        cells = [formatting.over_text(points[name][0].row, "dense") if points[name] else "-" for name in names]
        rows.append((case.workload.label, formatting.percent(case.workload.density), _ideal(case.workload), *cells))
    heads = ("case", "visible pairs", "dense / visible", *names)
    return Table("Speedup over each implementation's own dense time", heads, tuple(rows))


def _ideal(workload: Workload) -> str:
    return formatting.three(1 / workload.density) if workload.density and math.isfinite(workload.density) else "-"
