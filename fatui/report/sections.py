"""What each implementation is, which paths it took, and the throughput it reached."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from attention.core.results import AnyCase, Case, FineTuningCase, ModelCase
from attention.implementations import CATALOGUE
from fatui import formatting
from fatui.report.document import Block, Claim, Code, MissingData, Paragraph, Table, counted, joined
from fatui.report.evidence import EvidenceRow, compared, is_sound, sound_rows
from fatui.report.speed import RUN_BENCH, peak_line, times
from fatui.report.table import model_columns


def approach(cases: Sequence[Case], name: str) -> list[Block]:
    """Describe one implementation with its figures."""
    entry = next((entry for entry in CATALOGUE if entry.name == name), None)
    about = f"{entry.title}: {entry.summary}." if entry else "A user-defined implementation."
    found = sound_rows(cases, name)
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
    rows = []
    for case in cases:
        for row in case.rows:
            if row.implementation in names:
                rate, call = formatting.tokens_per_second(row.tokens_per_second), formatting.interval_text(row.call_s)
                numbers = (rate, call, formatting.percent(row.efficiency), formatting.error(row.max_error))
                path = row.path or formatting.UNKNOWN
                rows.append((case.workload.label, row.implementation, path, *numbers, formatting.word(row, case)))
    heads = ("case", "implementation", "path", "tokens/s", "per call", "efficiency", "max error", "verdict")
    return Table("Every row", heads, tuple(rows), frozenset({"implementation", "path", "verdict"}))


MIN_SHARE: Final = 0.05
"""Minimum difference worth reporting, as a share of the reference's peak."""


def memory_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    """Build the table of peaks above the inputs, outputs included, with their ratio to the inputs."""
    rows = []
    for case in cases:
        peaks = {row.implementation: row.peak_bytes for row in is_sound(case)}
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
    peaks = {row.implementation: row.peak_bytes for row in is_sound(case)}
    whole = peaks.get(case.reference) if case.reference and case.reference != name else None
    return [
        (1 - row.peak_bytes / whole, EvidenceRow(case, row), whole)
        for row in is_sound(case)
        if row.implementation == name and row.peak_bytes is not None and whole
    ]


def largest_saving(cases: Sequence[AnyCase], names: Sequence[str]) -> Claim | None:
    """Return the memory finding of the implementation with the largest saving on one case."""
    most = {name: max((saved for case in cases for saved, _, _ in _saved(case, name)), default=0.0) for name in names}
    best = max(most, key=lambda name: most[name], default=None)
    return savings(cases, best) if best else None


def memory_blocks(cases: Sequence[Case], names: Sequence[str]) -> list[Block]:
    """Return the memory table and its findings."""
    if not any(row.peak_bytes is not None for case in cases for row in is_sound(case)):
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
        made += [found for row in is_sound(case) if (found := _gain(case, row.implementation))]
        made.append(_table(case))
    return made


def _gain(case: AnyCase, name: str) -> Claim | None:
    """Return the finding of a significant speedup, with the time it saves or costs."""
    for _, ratio in compared([case], name):
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
