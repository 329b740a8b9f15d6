"""What cases gain over their counterparts: sparse patterns over dense, quantized keys and values over unquantized.

With the density from which dense is as fast, and the number of keys from which a quantized format is faster.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from msgspec import Struct, structs

from attention.core.kv_format import DENSE
from attention.core.results import Case, ModelCase, Ratio, Row
from attention.core.workload import Counterpart, Workload
from fatui import formatting
from fatui.report.document import Block, Claim, Paragraph, Table, joined
from fatui.report.evidence import sound_rows
from fatui.report.scaling import RatePoint


class CounterpartPoint(Struct, frozen=True):
    """One implementation on one case, beside its own time on the case's counterpart."""

    workload: Workload
    row: Row
    ratio: Ratio
    """Speedup over the counterpart."""

    @property
    def density(self) -> float:
        """Share of pairs that the mask shows."""
        return self.workload.density

    @property
    def bits(self) -> float:
        """Bits of a value, with its share of scales and biases."""
        return self.workload.value_bits


class DensityBreakEven(Struct, frozen=True):
    """The density at which a masked call takes as long as a dense one."""

    density: float
    """Interpolated between the two densities."""
    low: float
    """The highest measured density below it that is faster than dense, beyond noise."""
    high: float
    """The lowest measured density above it that is slower than dense, beyond noise."""


class LengthBreakEven(Struct, frozen=True):
    """The numbers of keys between which quantized ones become faster."""

    slower: int
    """The most keys at which they are slower beyond noise, of those below `faster`."""
    faster: int
    """The next number of keys that was measured at which they are faster beyond noise."""


def density_points(cases: Iterable[Case], name: str) -> list[CounterpartPoint]:
    """Return the points of an implementation with a speedup over dense, by density."""
    return sorted(_points(cases, name, "dense"), key=lambda point: point.density)


def format_points(cases: Iterable[Case], name: str) -> list[CounterpartPoint]:
    """Return the points of an implementation with a speedup over unquantized, by bits, most first, then by keys."""
    found = _points(cases, name, "unquantized")
    return sorted(found, key=lambda point: (-point.bits, point.workload.kv_format, point.workload.kv_seq))


def _points(cases: Iterable[Case], name: str, counterpart: Counterpart) -> list[CounterpartPoint]:
    return [
        CounterpartPoint(case.workload, row, ratio)
        for case in cases
        for row in sound_rows(case)
        if row.implementation == name and (ratio := formatting.over(row, counterpart)) is not None
    ]


def _crossing(
    points: Sequence[CounterpartPoint], position: Callable[[CounterpartPoint], float], *, gains: bool
) -> tuple[CounterpartPoint, CounterpartPoint] | None:
    """Return the first two points by position between which the speedup passes 1, upwards if it `gains`, or None.

    Both must differ from the counterpart beyond noise.
    """
    clear = sorted((point for point in points if point.ratio.significant), key=position)
    for before, after in pairwise(clear):
        slower, faster = (before, after) if gains else (after, before)
        if position(before) < position(after) and slower.ratio.value < 1 < faster.ratio.value:
            return before, after
    return None


def density_break_even(points: Sequence[CounterpartPoint]) -> DensityBreakEven | None:
    """Return where points go from faster than dense to slower, over the density, or None.

    Both neighbours must differ from dense beyond noise; between them the share of the dense time is taken as linear.
    """
    neighbours = _crossing(points, lambda point: point.density, gains=False)
    if neighbours is None:
        return None
    before, after = neighbours
    first, second = 1 / before.ratio.value, 1 / after.ratio.value
    part = (1 - first) / (second - first)
    between = before.density + part * (after.density - before.density)
    return DensityBreakEven(between, before.density, after.density)


def length_break_even(points: Sequence[CounterpartPoint]) -> LengthBreakEven | None:
    """Return where points of one format go from slower than unquantized to faster, over the number of keys, or None.

    Both neighbours must differ beyond noise.
    """
    neighbours = _crossing(points, lambda point: point.workload.kv_seq, gains=True)
    return LengthBreakEven(*(point.workload.kv_seq for point in neighbours)) if neighbours else None


def random_blocks(points: Sequence[CounterpartPoint]) -> list[CounterpartPoint]:
    """Return the points of random blocks, which differ in density alone."""
    return [point for point in points if point.workload.mask.startswith("blocks:")]


def density_break_even_text(name: str, points: Sequence[CounterpartPoint]) -> str | None:
    """Describe up to which density of random blocks an implementation is faster than dense; None without a finding."""
    chosen = random_blocks(points)
    found = density_break_even(chosen)
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
            text = density_break_even_text(name, density_points(group, name))
            if text:
                blocks.append(Claim(f"{text} ({shape})."))
        best = _largest_gain(group, names)
        if best:
            blocks.append(best)
    return [*blocks, _density_table(masked, names)]


def shapes_of(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Return the cases by the label of their dense shape."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(structs.replace(case.workload, mask="none").label, []).append(case)
    return groups


def _largest_gain(cases: Sequence[Case], names: Sequence[str]) -> Claim | None:
    points = [(name, point) for name in names for point in density_points(cases, name)]
    clear = [(name, point) for name, point in points if point.ratio.significant and point.ratio.value > 1]
    if not clear:
        return None
    name, point = max(clear, key=lambda each: each[1].ratio.value)
    times, pairs = formatting.speedup_text(point.ratio), _ideal(point.workload)
    label = point.workload.label
    return Claim(f"Largest speedup over dense: {name}, {times} on {label}, with {pairs} times fewer pairs.")


def _density_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    rows = []
    for case in sorted(cases, key=lambda each: -each.workload.density):
        points = {name: density_points([case], name) for name in names}
        cells = [formatting.over_text(points[name][0].row, "dense") if points[name] else "-" for name in names]
        rows.append((case.workload.label, formatting.percent(case.workload.density), _ideal(case.workload), *cells))
    heads = ("case", "visible pairs", "dense / visible", *names)
    return Table("Speedup over each implementation's own dense time", heads, tuple(rows))


def _ideal(workload: Workload) -> str:
    return formatting.three(1 / workload.density) if workload.density and math.isfinite(workload.density) else "-"


def length_break_even_text(name: str, points: Sequence[CounterpartPoint]) -> str | None:
    """Describe from how many keys on a format is faster than unquantized ones; None without a finding."""
    clear = [point for point in points if point.ratio.significant]
    if not clear:
        return None
    kv_format, dtype = clear[0].workload.kv_format, clear[0].workload.dtype
    subject = f"{name} with keys and values in {kv_format}"
    if found := length_break_even(points):
        return (
            f"{subject} breaks even with {dtype} between {found.slower:,} keys, where it is slower, and "
            f"{found.faster:,}, where it is faster"
        )
    lengths = sorted({point.workload.kv_seq for point in clear})
    if len({point.ratio.value > 1 for point in clear}) > 1 or len(lengths) < 2:
        return None
    how = "faster" if clear[0].ratio.value > 1 else "slower"
    return f"{subject} is {how} than with {dtype} at every length measured, {lengths[0]:,} to {lengths[-1]:,} keys"


def formats_text(name: str, points: Sequence[CounterpartPoint]) -> str | None:
    """Describe, for cases that differ in format alone, which are faster than unquantized ones, and which slower."""
    faster = [point for point in points if point.ratio.significant and point.ratio.value > 1]
    slower = [point for point in points if point.ratio.significant and point.ratio.value < 1]
    parts = []
    if faster:
        best = max(faster, key=lambda point: point.ratio.value)
        rest = [point.workload.kv_format for point in faster if point is not best]
        parts.append(f"gains most with {best.workload.kv_format}, {_gain(best)}")
        parts += [f"also gains with {joined(rest)}"] if rest else []
    if slower:
        parts.append(f"loses with {joined([point.workload.kv_format for point in slower])}")
    return f"{name} {'; it '.join(parts)}" if parts else None


def _gain(point: CounterpartPoint) -> str:
    error = f", K/V error {formatting.kv_error_text(point.row)}" if point.row.kv_error is not None else ""
    less, speed = formatting.three(_saving(point.workload)), formatting.speedup_text(point.ratio)
    return f"{speed} as fast as with {point.workload.dtype}, {less}x less memory{error}"


def _saving(workload: Workload) -> float:
    return workload.counterparts["unquantized"].kv_token_bytes / workload.kv_token_bytes


def quantized_blocks(cases: Sequence[Case], models: Sequence[ModelCase], names: Sequence[str]) -> list[Block]:
    """Return the section: findings by format and by length, the table of formats, and that of models' caches."""
    found = beside_unquantized(cases)
    blocks: list[Block] = []
    if found:
        blocks.append(
            Paragraph(
                "Each case was also timed with unquantized keys and values, in the same rounds: the speedup over "
                "them is an implementation's own. K/V error is the RMS difference of the output from float64 "
                "attention over the unquantized ones, relative to the RMS of that; inputs are normally distributed."
            )
        )
        blocks += [Claim(f"{text} ({shape}).") for shape, text in _findings(found, names)]
        shown = [name for name in names if any(row.implementation == name for case in found for row in case.rows)]
        blocks.append(_format_table(found, shown))
    quantized = [case for case in models if case.workload.kv_format != DENSE]
    if quantized:
        blocks.append(_models_table(models, quantized))
    return blocks


def _findings(cases: Sequence[Case], names: Sequence[str]) -> Iterable[tuple[str, str]]:
    for shape, group in by_shape(cases).items():
        for name in names:
            if text := formats_text(name, format_points(group, name)):
                yield shape, text
    for shape, formats in by_length(cases).items():
        for group in formats.values():
            for name in names:
                if len(group) > 1 and (text := length_break_even_text(name, format_points(group, name))):
                    yield shape, text


def beside_unquantized(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that are compared with unquantized keys and values: quantized ones, on one device."""
    return [case for case in cases if "unquantized" in case.workload.counterparts]


def by_shape(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Return quantized cases by the label of their unquantized counterpart."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.workload.counterparts["unquantized"].label, []).append(case)
    return groups


def by_length(cases: Sequence[Case]) -> dict[str, dict[str, list[Case]]]:
    """Return quantized cases by what they have in common beside format and number of keys, and then by format."""
    groups: dict[str, dict[str, list[Case]]] = {}
    for case in sorted(cases, key=lambda each: (-each.workload.value_bits, each.workload.kv_format)):
        work = case.workload
        words = structs.replace(work, kv_format=DENSE).label.split()
        rows = [] if work.pass_ == "decode" or work.seq == work.kv_seq else [f"L={work.seq}"]
        shape = " ".join([*rows, *(word for word in words if not word.startswith("L="))])
        groups.setdefault(shape, {}).setdefault(work.kv_format, []).append(case)
    return groups


def _format_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    rows = []
    for shape, group in by_shape(cases).items():
        for case in sorted(group, key=lambda each: (-each.workload.value_bits, each.workload.kv_format)):
            work = case.workload
            over = [formatting.over_text(row, "unquantized") if row else "-" for row in _rows(case, names)]
            errors = [row.kv_error for row in sound_rows(case) if row.kv_error is not None]
            cells = (
                formatting.three(work.value_bits),
                formatting.size(work.kv_token_bytes),
                formatting.size(work.key_value_bytes),
                f"{formatting.three(_saving(work))}x",
                formatting.percent(max(errors)) if errors else "-",
            )
            rows.append((shape, work.kv_format, *cells, *over))
    heads = ("case", "K/V", "bits per value", "bytes per token", "keys and values", "less memory", "K/V error", *names)
    caption = "Speedup over each implementation's own time with unquantized keys and values"
    return Table(caption, heads, tuple(rows), frozenset({"K/V"}))


def _rows(case: Case, names: Sequence[str]) -> list[Row | None]:
    rows = {row.implementation: row for row in sound_rows(case)}
    return [rows.get(name) for name in names]


def _models_table(models: Sequence[ModelCase], quantized: Sequence[ModelCase]) -> Table:
    """Build the table of models' caches: those that are quantized, and the same cases with unquantized ones."""
    like = {structs.replace(case.workload, kv_format=DENSE) for case in quantized}
    shown = [case for case in models if structs.replace(case.workload, kv_format=DENSE) in like]
    rows = [
        (
            case.workload.label,
            row.implementation,
            formatting.tokens_per_second(row.tokens_per_second),
            formatting.over_text(row, "unquantized"),
            formatting.size(case.cache_bytes),
            formatting.size(case.kv_token_bytes),
            formatting.error(row.kl_divergence) if case.workload.kv_format != DENSE else "-",
        )
        for case in shown
        for row in case.rows
        if row in sound_rows(case)
    ]
    caption = (
        "Caches of models: after the prompt, and per token in all layers; KL is the divergence of the next token's"
    )
    heads = ("case", "implementation", "tokens/s", formatting.OVER["unquantized"], "cache", "bytes per token", "KL")
    caption = f"{caption} distribution from that with an unquantized cache, in nats"
    return Table(caption, heads, tuple(rows), frozenset({"implementation"}))
