"""Generation and fine-tuning of whole models with each implementation."""

from collections.abc import Sequence

from attention.report import AnyCase, FineTuningCase, ModelCase
from fatui import figures
from fatui.model_columns import model_columns
from fatui.report.document import Block, Finding, Missing, Paragraph, Table
from fatui.report.evidence import compared, sound
from fatui.report.speed import times

RUN_MODEL = "fatui model tinyllama-1.1b --layers 2 --prompt 128 --generate 8"
RUN_TUNING = "fatui finetune tiny-llama --iters 20"
ESTIMATED = (
    "Where cases are marked as estimated fewer layers ran, and the figures were computed for all of the model's."
)


def model_blocks(cases: Sequence[ModelCase]) -> list[Block]:
    """Return the findings of generation, or how to measure it."""
    if not cases:
        return [Missing("No model has been measured.", RUN_MODEL)]
    blocks = _blocks(cases)
    if any(case.workload.estimated for case in cases):
        blocks.insert(0, Paragraph(ESTIMATED))
    return blocks


def tuning_blocks(cases: Sequence[FineTuningCase]) -> list[Block]:
    """Return the findings of fine-tuning, or how to measure it."""
    if not cases:
        return [Missing("No fine-tuning has been measured.", RUN_TUNING)]
    return [*_blocks(cases), *(finding for case in cases if (finding := _agreement(case)))]


def _blocks(cases: Sequence[ModelCase | FineTuningCase]) -> list[Block]:
    made: list[Block] = []
    for case in cases:
        made += [found for row in sound(case) if (found := _gain(case, row.implementation))]
        made.append(_table(case))
    return made


def _gain(case: AnyCase, name: str) -> Finding | None:
    """Return the finding of a significant speedup, with the time it saves or costs."""
    for _, ratio in compared([case], name):
        if ratio.significant:
            return Finding(f"{case.workload.label}: {name} is {times(ratio)} {case.reference}{_time(ratio.value)}.")
    return None


def _time(speedup: float) -> str:
    """Format a speedup as a change in time; empty above 2, where the factor itself is clearer."""
    if speedup > 2:
        return ""
    if speedup < 0.5:
        return f", it takes {figures.three(1 / speedup)} times as long"
    return f", {figures.percent(abs(1 - 1 / speedup))} {'less' if speedup > 1 else 'more'} time"


def _table(case: ModelCase | FineTuningCase) -> Table:
    columns = model_columns(case)
    heads = ("implementation", *(column.head for column in columns[1:]))
    cells = zip(*(column.cells for column in columns), strict=True)
    rows = tuple((*line[:-1], figures.verdict(row, case)) for row, line in zip(case.rows, cells, strict=True))
    weights = f"; weights {figures.size(case.weights_bytes)}, memory is on top of them" if case.weights_bytes else ""
    return Table(f"{case.workload.label}{weights}", heads, rows, frozenset({"path", "verdict"}))


def _agreement(case: FineTuningCase) -> Finding | None:
    """Return the finding of the largest difference between loss curves."""
    apart = [row.loss_difference for row in case.rows if row.status == "ok" and row.loss_difference is not None]
    if not apart or case.reference is None:
        return None
    return Finding(
        f"{case.workload.label}: the losses differ from {case.reference}'s by at most {figures.percent(max(apart))}."
    )
