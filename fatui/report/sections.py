"""The sections of a report: each implementation, its speedups, memory, models, and which to choose."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from attention.core.results import AnyCase, Case, FineTuningCase, ModelCase, Ratio
from attention.implementations import CATALOGUE
from fatui import formatting
from fatui.report.document import Block, Claim, Code, MissingData, Paragraph, Table, counted, joined
from fatui.report.evidence import EvidenceRow, evidence_rows, sound_rows
from fatui.report.table import further_columns, model_columns
from fatui.verdict import agreed_speedup, mean_speedup, speedups

RUN_BENCH = "fatui bench seed-table"


def mean_finding(cases: Sequence[AnyCase], name: str, where: str = "") -> Claim | None:
    """Return what the mean speedup supports: faster, slower, equally fast, or None.

    A mean is reported only if most of its cases agree with it, each beyond its own noise floor.
    """
    found, mean = speedups(cases, name), mean_speedup(cases, name)
    if mean is None:
        return None
    reference, over = found[0][0].reference, f"over {counted(len(found), 'case')}"
    how = "(geometric mean)" if len(found) > 1 else f"({found[0][0].workload.label})"
    ratios = [ratio for _, ratio in found]
    if agreed_speedup(cases, name):
        return Claim(f"{where}{name} is {times(mean)} {reference} {over} {how}.")
    if not mean.significant and all(formatting.is_clear(ratio) for ratio in (mean, *ratios)):
        low, high = formatting.three(mean.low), formatting.three(mean.high)
        return Claim(f"{where}{name} is as fast as {reference} within {low} to {high} times, {over} {how}.")
    return None


def times(ratio: Ratio) -> str:
    """Format a significant speedup with its interval: "49.6 ±0.4x as fast as"."""
    return f"{formatting.speedup_text(ratio)} as fast as"


def extremes(cases: Sequence[AnyCase], name: str) -> list[Block]:
    """Return where an implementation gains most, and where it gains nothing or loses."""
    clear = [(case, ratio) for case, ratio in speedups(cases, name) if formatting.is_clear(ratio)]
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
    known = [case for case in cases if sum(row.peak_bytes is not None for row in sound_rows(case)) > 1]
    for name in names:
        wins = [case for case in known if _is_leanest(case, name)]
        if known and len(wins) == len(known):
            line = max(evidence_rows(known, name), key=lambda each: each.row.peak_bytes or 0)
            peak = formatting.size(line.row.peak_bytes)
            part = f"at most {peak} above its inputs ({line.case.workload.label})"
            return Claim(
                f"Where memory is short, choose {name}: none took less in any of {counted(len(known), 'case')}; {part}."
            )
    return None


def _is_leanest(case: AnyCase, name: str) -> bool:
    peaks = {row.implementation: row.peak_bytes for row in sound_rows(case) if row.peak_bytes is not None}
    return name in peaks and peaks[name] == min(peaks.values())


def peak_line(cases: Sequence[AnyCase], name: str) -> EvidenceRow | None:
    """Return the row with the highest throughput."""
    rated = [line for line in evidence_rows(cases, name) if line.row.tokens_per_second is not None]
    return max(rated, key=lambda each: each.row.tokens_per_second or 0.0, default=None)


def approach(cases: Sequence[Case], name: str) -> list[Block]:
    """Describe one implementation with its figures."""
    entry = next((entry for entry in CATALOGUE if entry.name == name), None)
    about = f"{entry.title}: {entry.summary}." if entry else "A user-defined implementation."
    found = evidence_rows(cases, name)
    if not found:
        command = f"{RUN_BENCH} --impl {shlex.quote(name)}"
        return [Paragraph(about), MissingData(f"{name} has no accurate row with figures.", command)]
    return [Paragraph(about), _paths(found, name), *_throughput(found, cases, name)]


def _paths(found: Sequence[EvidenceRow], name: str) -> Claim:
    paths = Counter(line.row.path or "an unknown path" for line in found)
    counts = [f"{path} in {counted(count, 'case')}" for path, count in paths.most_common()]
    return Claim(f"{name} took {joined(counts)}.")


def _throughput(found: Sequence[EvidenceRow], cases: Sequence[Case], name: str) -> list[Block]:
    rates = [line.row.tokens_per_second for line in found if line.row.tokens_per_second is not None]
    best = peak_line(cases, name)
    made: list[Block] = []
    if rates and best:
        peak = f"{formatting.tokens_per_second(best.row.tokens_per_second)} tokens/s"
        at = f"at most {peak}, {formatting.interval_text(best.row.call_s)} a call ({best.case.workload.label})"
        mean = f"{formatting.tokens_per_second(fmean(rates))} tokens/s on average over {counted(len(rates), 'case')}, "
        made.append(Claim(f"{name} reached {mean if len(rates) > 1 else ''}{at}."))
    efficiencies = [line.row.efficiency for line in found if line.row.efficiency is not None]
    if efficiencies:
        mean = f"{formatting.percent(fmean(efficiencies))} on average, " if len(efficiencies) > 1 else ""
        text = f"{mean}at most {formatting.percent(max(efficiencies))} of the best rate measured in the same run"
        made.append(Claim(f"Efficiency of {name}: {text}, {counted(len(efficiencies), 'case')}."))
    return made


def throughput_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    """Build the table of tokens/s and time per call, one row per case and implementation."""
    rows, further = [], further_columns(cases)
    for case in cases:
        for row in case.rows:
            if row.implementation in names:
                rate, call = formatting.tokens_per_second(row.tokens_per_second), formatting.interval_text(row.call_s)
                numbers = (formatting.percent(row.efficiency), formatting.row_error(row))
                own = (cell(row) for cell in further.values())
                path = row.path or formatting.UNKNOWN
                who = case.workload.label, row.implementation, path
                rows.append((*who, rate, call, *own, *numbers, formatting.word(row, case)))
    rates = ("tokens/s", "per call", *further)
    heads = ("case", "implementation", "path", *rates, "efficiency", "max error", "verdict")
    return Table("Every row", heads, tuple(rows), frozenset({"implementation", "path", "verdict"}))


MIN_SHARE: Final = 0.05
"""Minimum difference worth reporting, as a share of the reference's peak."""


def memory_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    """Build the table of peaks above the inputs, outputs included, with their ratio to the inputs."""
    rows = []
    for case in cases:
        peaks = {row.implementation: row.peak_bytes for row in sound_rows(case)}
        held = case.workload.input_bytes
        cells = [_peak(peaks.get(name), held) for name in names]
        rows.append((case.workload.label, formatting.size(held), formatting.size(case.workload.output_bytes), *cells))
    caption = "Peak above the inputs while one call runs, outputs included; in brackets as a multiple of the inputs"
    return Table(caption, ("case", "inputs", "outputs", *names), tuple(rows))


def _peak(peak: int | None, inputs: int) -> str:
    return formatting.UNKNOWN if peak is None else f"{formatting.size(peak)} ({formatting.three(peak / inputs)}x)"


def savings(cases: Sequence[AnyCase], name: str) -> Claim | None:
    """Return how much less memory than the reference an implementation takes, or None if next to nothing."""
    found = [(saved, line, whole) for case in cases for saved, line, whole in _saved(case, name)]
    if not found:
        return None
    most, line, whole = max(found, key=lambda each: each[0])
    least, worst, _ = min(found, key=lambda each: each[0])
    if most < MIN_SHARE:
        return None
    peak = f"{formatting.size(line.row.peak_bytes)} instead of {line.case.reference}'s {formatting.size(whole)}"
    text = f"{name} takes {'up to ' if len(found) > 1 else ''}{_less(most)}: {peak} ({line.case.workload.label})"
    if least <= -MIN_SHARE:
        text += f"; on {worst.case.workload.label} it takes {_more(-least)}"
        if worst.case.reference != line.case.reference:
            text += f" {'as' if least < -1 else 'than'} {worst.case.reference}"
    elif len(found) > 1 and least >= MIN_SHARE:
        text += f"; at least {_less(least)} in each of {counted(len(found), 'case')}"
    return Claim(f"{text}.")


def _less(share: float) -> str:
    """Format a saved share: a percentage, or a factor above 2."""
    if share >= 1:
        return "no measurable memory"
    return f"{f'{formatting.three(1 / (1 - share))} times' if share > 0.5 else formatting.percent(share)} less memory"


def _more(share: float) -> str:
    """Format an additional share: a percentage, or a factor above 2."""
    return f"{formatting.three(1 + share)} times as much" if share > 1 else f"{formatting.percent(share)} more"


def _saved(case: AnyCase, name: str) -> list[tuple[float, EvidenceRow, int]]:
    peaks = {row.implementation: row.peak_bytes for row in sound_rows(case)}
    whole = peaks.get(case.reference) if case.reference and case.reference != name else None
    return [
        (1 - row.peak_bytes / whole, EvidenceRow(case, row), whole)
        for row in sound_rows(case)
        if row.implementation == name and row.peak_bytes is not None and whole
    ]


def largest_saving(cases: Sequence[AnyCase], names: Sequence[str]) -> Claim | None:
    """Return the memory finding of the implementation with the largest saving on one case."""
    most = {name: max((saved for case in cases for saved, _, _ in _saved(case, name)), default=0.0) for name in names}
    best = max(most, key=lambda name: most[name], default=None)
    return savings(cases, best) if best else None


def memory_blocks(cases: Sequence[Case], names: Sequence[str]) -> list[Block]:
    """Return the memory table and its findings."""
    if not any(row.peak_bytes is not None for case in cases for row in sound_rows(case)):
        return [MissingData("No run has measured memory.", "fatui bench seed-table")]
    found = [finding for name in names if (finding := savings(cases, name))]
    return [*found, memory_table(cases, names)]


RUN_MODEL = "fatui model tinyllama-1.1b --layers 2 --prompt 128 --generate 8"
RUN_TUNING = "fatui finetune tiny-llama --iters 20"
ESTIMATED = (
    "Where cases are marked as estimated fewer layers ran, and the figures were computed for all of the model's."
)


def model_blocks(cases: Sequence[ModelCase]) -> list[Block]:
    """Return the findings of generation, or how to measure it."""
    if not cases:
        return [MissingData("No model has been measured.", RUN_MODEL)]
    blocks = _blocks(cases)
    if any(case.workload.estimated for case in cases):
        blocks.insert(0, Paragraph(ESTIMATED))
    return blocks


def tuning_blocks(cases: Sequence[FineTuningCase]) -> list[Block]:
    """Return the findings of fine-tuning, or how to measure it."""
    if not cases:
        return [MissingData("No fine-tuning has been measured.", RUN_TUNING)]
    return [*_blocks(cases), *(finding for case in cases if (finding := _agreement(case)))]


def _blocks(cases: Sequence[ModelCase | FineTuningCase]) -> list[Block]:
    made: list[Block] = []
    for case in cases:
        made += [found for row in sound_rows(case) if (found := _gain(case, row.implementation))]
        made.append(_table(case))
    return made


def _gain(case: AnyCase, name: str) -> Claim | None:
    """Return the finding of a significant speedup, with the time it saves or costs."""
    for _, ratio in speedups([case], name):
        if ratio.significant:
            return Claim(f"{case.workload.label}: {name} is {times(ratio)} {case.reference}{_time(ratio.value)}.")
    return None


def _time(speedup: float) -> str:
    """Format a speedup as a change in time; empty above 2, where the factor itself is clearer."""
    if speedup > 2:
        return ""
    if speedup < 0.5:
        return f", it takes {formatting.three(1 / speedup)} times as long"
    return f", {formatting.percent(abs(1 - 1 / speedup))} {'less' if speedup > 1 else 'more'} time"


def _table(case: ModelCase | FineTuningCase) -> Table:
    columns = model_columns(case)
    heads = ("implementation", *(column.head for column in columns[1:]))
    cells = zip(*(column.cells for column in columns), strict=True)
    rows = tuple((*line[:-1], formatting.verdict(row, case)) for row, line in zip(case.rows, cells, strict=True))
    weights = f"; weights {formatting.size(case.weights_bytes)}, memory is on top of them" if case.weights_bytes else ""
    return Table(f"{case.workload.label}{weights}", heads, rows, frozenset({"path", "verdict"}))


def _agreement(case: FineTuningCase) -> Claim | None:
    """Return the finding of the largest difference between loss curves."""
    apart = [row.loss_difference for row in case.rows if row.status == "ok" and row.loss_difference is not None]
    if not apart or case.reference is None:
        return None
    return Claim(
        f"{case.workload.label}: the losses differ from {case.reference}'s by at most {formatting.percent(max(apart))}."
    )


CALL = """from attention import attention

out = attention(q, k, v, mask="causal", implementation={quoted})  # q (B, H, Lq, D), k and v (B, Hkv, Lk, D)"""
MODEL = """from attention import patch_mlx_lm

with patch_mlx_lm({quoted}):  # every model of mlx-lm, loaded or yet to be; undone at the end
    text = mlx_lm.generate(model, tokenizer, prompt)"""
PROGRAM = "python -m attention.patch --implementation {name} your_script.py"


def adopt(name: str) -> list[Block]:
    """Return snippets for one call, for mlx-lm's models, and for a whole script."""
    quoted = json.dumps(name)
    return [
        Paragraph("In your own program:"),
        Code(CALL.format(quoted=quoted), "python"),
        Paragraph("In mlx-lm's models, while the context is open:"),
        Code(MODEL.format(quoted=quoted), "python"),
        Paragraph("Or around an unmodified script:"),
        Code(PROGRAM.format(name=shlex.quote(name)), "sh"),
    ]
