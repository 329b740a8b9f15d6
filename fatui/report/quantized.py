"""Quantized keys and values: speedup over unquantized ones by format and length, beside their memory and error."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from msgspec import Struct, structs

from attention.core.kv_format import DENSE
from attention.core.results import Case, ModelCase, Ratio, Row
from attention.core.workload import Workload
from fatui import formatting
from fatui.report.document import Block, Claim, Paragraph, Table, joined
from fatui.report.evidence import sound_rows


class FormatPoint(Struct, frozen=True):
    """One implementation on one case with quantized keys and values."""

    workload: Workload
    row: Row
    ratio: Ratio
    """Speedup over its own time with unquantized ones."""

    @property
    def bits(self) -> float:
        """Bits of a value, with its share of scales and biases."""
        return self.workload.value_bits


class LengthBreakEven(Struct, frozen=True):
    """The numbers of keys between which quantized ones become faster."""

    slower: int
    """The most keys at which they are slower beyond noise, of those below `faster`."""
    faster: int
    """The next number of keys that was measured at which they are faster beyond noise."""


def format_points(cases: Iterable[Case], name: str) -> list[FormatPoint]:
    """Return the points of an implementation with a speedup over unquantized, by bits, most first, then by keys."""
    found = [
        FormatPoint(case.workload, row, row.over_unquantized)
        for case in cases
        for row in sound_rows(case)
        if row.implementation == name and row.over_unquantized is not None
    ]
    return sorted(found, key=lambda point: (-point.bits, point.workload.kv_format, point.workload.kv_seq))


def break_even(points: Sequence[FormatPoint]) -> LengthBreakEven | None:
    """Return where points of one format go from slower than unquantized to faster, over the number of keys, or None.

    Both neighbours must differ beyond noise.
    """
    clear = sorted((point for point in points if point.ratio.significant), key=lambda point: point.workload.kv_seq)
    for before, after in pairwise(clear):
        if before.workload.kv_seq < after.workload.kv_seq and before.ratio.value < 1 < after.ratio.value:
            return LengthBreakEven(before.workload.kv_seq, after.workload.kv_seq)
    return None


def break_even_text(name: str, points: Sequence[FormatPoint]) -> str | None:
    """Describe from how many keys on a format is faster than unquantized ones; None without a finding."""
    clear = [point for point in points if point.ratio.significant]
    if not clear:
        return None
    kv_format, dtype = clear[0].workload.kv_format, clear[0].workload.dtype
    subject = f"{name} with keys and values in {kv_format}"
    if found := break_even(points):
        return (
            f"{subject} breaks even with {dtype} between {found.slower:,} keys, where it is slower, and "
            f"{found.faster:,}, where it is faster"
        )
    lengths = sorted({point.workload.kv_seq for point in clear})
    if len({point.ratio.value > 1 for point in clear}) > 1 or len(lengths) < 2:
        return None
    how = "faster" if clear[0].ratio.value > 1 else "slower"
    return f"{subject} is {how} than with {dtype} at every length measured, {lengths[0]:,} to {lengths[-1]:,} keys"


def formats_text(name: str, points: Sequence[FormatPoint]) -> str | None:
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


def _gain(point: FormatPoint) -> str:
    error = f", K/V error {formatting.kv_error_text(point.row)}" if point.row.kv_error is not None else ""
    less, speed = formatting.three(_saving(point.workload)), formatting.speedup_text(point.ratio)
    return f"{speed} as fast as with {point.workload.dtype}, {less}x less memory{error}"


def _saving(workload: Workload) -> float:
    return workload.counterparts["unquantized"].kv_token_bytes / workload.kv_token_bytes


def quantized_blocks(cases: Sequence[Case], models: Sequence[ModelCase], names: Sequence[str]) -> list[Block]:
    """Return the section: findings by format and by length, the table of formats, and that of models' caches."""
    found = [case for case in cases if case.workload.kv_format != DENSE]
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
        blocks.append(_table(found, shown))
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
                if len(group) > 1 and (text := break_even_text(name, format_points(group, name))):
                    yield shape, text


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


def _table(cases: Sequence[Case], names: Sequence[str]) -> Table:
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
