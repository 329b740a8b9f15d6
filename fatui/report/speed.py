"""Speedups of each implementation over the reference, and which implementation to choose when."""

from collections.abc import Sequence

from attention.core import statistics
from attention.core.results import AnyCase, Ratio
from fatui import formatting
from fatui.report.document import Block, Claim, MissingData, Table, counted, joined
from fatui.report.evidence import EvidenceRow, compared, is_sound, sound_rows

RUN_BENCH = "fatui bench seed-table"


def mean_speedup(cases: Sequence[AnyCase], name: str) -> Ratio | None:
    """Return the geometric mean of an implementation's speedups, or its only one; None if the references differ."""
    found = compared(cases, name)
    if len({case.reference for case, _ in found}) != 1:
        return None
    return found[0][1] if len(found) == 1 else statistics.geometric_mean([ratio for _, ratio in found])


def mean_finding(cases: Sequence[AnyCase], name: str, where: str = "") -> Claim | None:
    """Return what the mean speedup supports: faster, slower, equally fast, or None.

    A mean is reported only if most of its cases agree with it, each beyond its own noise floor.
    """
    found, mean = compared(cases, name), mean_speedup(cases, name)
    if mean is None:
        return None
    reference, over = found[0][0].reference, f"over {counted(len(found), 'case')}"
    how = "(geometric mean)" if len(found) > 1 else f"({found[0][0].workload.label})"
    ratios = [ratio for _, ratio in found]
    if mean.significant and 2 * sum(_agrees(ratio, mean) for ratio in ratios) > len(ratios):
        return Claim(f"{where}{name} is {times(mean)} {reference} {over} {how}.")
    if not mean.significant and all(formatting.is_clear(ratio) for ratio in (mean, *ratios)):
        low, high = formatting.three(mean.low), formatting.three(mean.high)
        return Claim(f"{where}{name} is as fast as {reference} within {low} to {high} times, {over} {how}.")
    return None


def _agrees(ratio: Ratio, mean: Ratio) -> bool:
    return ratio.significant and (ratio.value > 1) == (mean.value > 1)


def times(ratio: Ratio) -> str:
    """Format a significant speedup with its interval: "49.6 ±0.4x as fast as"."""
    return f"{formatting.speedup_text(ratio)} as fast as"


def extremes(cases: Sequence[AnyCase], name: str) -> list[Block]:
    """Return where an implementation gains most, and where it gains nothing or loses."""
    clear = [(case, ratio) for case, ratio in compared(cases, name) if formatting.is_clear(ratio)]
    wins = [(case, ratio) for case, ratio in clear if ratio.significant and ratio.value > 1]
    losses = [(case, ratio) for case, ratio in clear if ratio.significant and ratio.value < 1]
    equal = [(case, ratio) for case, ratio in clear if not ratio.significant]
    made: list[Block] = []
    if wins:
        case, ratio = max(wins, key=lambda each: each[1].value)
        least_case, least = min(wins, key=lambda each: each[1].value)
        text = f"{name} gains most on {case.workload.label}: {times(ratio)} {case.reference}"
        if len(wins) > 1:
            text += f"; of its wins, least on {least_case.workload.label}: {times(least)} it"
        made.append(Claim(f"{text}."))
    if losses:
        case, ratio = min(losses, key=lambda each: each[1].value)
        part = f"{name} is slower than {case.reference} in {len(losses)} of {counted(len(clear), 'case')}"
        made.append(Claim(f"{part}, most on {case.workload.label}: {times(ratio)} it."))
    if equal:
        part = f"{name} makes no difference beyond the noise floor in {len(equal)} of {counted(len(clear), 'case')}"
        made.append(Claim(f"{part}: {joined([case.workload.label for case, _ in equal])}."))
    return made


def speedup_table(cases: Sequence[AnyCase], names: Sequence[str]) -> Table:
    """Build the table of speedups: a row per case, a column per implementation."""
    rows = []
    for case in cases:
        cells = {row.implementation: row for row in case.rows}
        found = [cells.get(name) for name in names]
        texts = [
            "" if row is None else formatting.speedup_text(row.speedup) if row.status == "ok" else row.status
            for row in found
        ]
        floor = formatting.percent(case.noise_floor.floor if case.noise_floor else None)
        rows.append((case.workload.label, case.reference or formatting.UNKNOWN, *texts, floor))
    caption = (
        "Median of paired ratios to the reference with a 95 % interval; ≈ 1 is inside the noise floor, "
        "a question mark means that the interval is too wide for a verdict"
    )
    heads = ("case", "reference", *names, "noise floor")
    return Table(caption, heads, tuple(rows), frozenset({"reference"}))


def choices(cases: Sequence[AnyCase], names: Sequence[str]) -> list[Block]:
    """Return, per implementation, the cases in which nothing was measurably faster."""
    best: dict[str, list[str]] = {name: [] for name in names}
    decided = 0
    for case in cases:
        winners = formatting.best_of(case)
        decided += bool(winners)
        for name in winners:
            best[name].append(case.workload.label)
    made: list[Block] = []
    for name in sorted((name for name in names if best[name]), key=lambda each: -len(best[each])):
        share = f"{len(best[name])} of {counted(decided, 'case')}"
        alone = joined([*best[name][:5], *([f"{len(best[name]) - 5} more"] if len(best[name]) > 5 else [])])
        made.append(
            Claim(f"Choose {name} where it was the fastest, or inside the fastest's interval: {share} ({alone}).")
        )
    return made or [MissingData("No case has a fastest implementation that the intervals support.", RUN_BENCH)]


def leanest(cases: Sequence[AnyCase], names: Sequence[str]) -> Claim | None:
    """Return the implementation with the least memory in every case that has figures, or None."""
    known = [case for case in cases if sum(row.peak_bytes is not None for row in is_sound(case)) > 1]
    for name in names:
        wins = [case for case in known if _is_leanest(case, name)]
        if known and len(wins) == len(known):
            line = max(sound_rows(known, name), key=lambda each: each.row.peak_bytes or 0)
            peak = formatting.size(line.row.peak_bytes)
            part = f"at most {peak} above its inputs ({line.case.workload.label})"
            return Claim(
                f"Where memory is short, choose {name}: none took less in any of {counted(len(known), 'case')}; {part}."
            )
    return None


def _is_leanest(case: AnyCase, name: str) -> bool:
    peaks = {row.implementation: row.peak_bytes for row in is_sound(case) if row.peak_bytes is not None}
    return name in peaks and peaks[name] == min(peaks.values())


def peak_line(cases: Sequence[AnyCase], name: str) -> EvidenceRow | None:
    """Return the row with the highest throughput."""
    rated = [line for line in sound_rows(cases, name) if line.row.tokens_per_second is not None]
    return max(rated, key=lambda each: each.row.tokens_per_second or 0.0, default=None)
