"""Table columns of generation and fine-tuning, and the notes below the tables."""

from typing import Final

from attention.models.record import NEVER_CALLED
from attention.report import FineTuningCase, FineTuningRow, ModelCase, ModelRow
from fatui import figures
from fatui.columns import IMPLEMENTATION, Column, shortened, starred

STEPS: Final = {"prefill": "to 1st token", "decode": "per token"}
BARS: Final = "▁▂▃▄▅▆▇█"
CURVE_WIDTH: Final = 40


def model_columns(case: ModelCase | FineTuningCase) -> list[Column]:
    """Return the columns of a case."""
    return _generation(case) if isinstance(case, ModelCase) else _fine_tuning(case)


def _generation(case: ModelCase) -> list[Column]:
    rows, best = case.rows, _stars(case)
    return [
        Column(IMPLEMENTATION, [shortened(row.implementation) for row in rows]),
        Column("path", [row.path or figures.UNKNOWN for row in rows]),
        Column("tokens/s", [starred(row, best) for row in rows]),
        Column(STEPS[case.workload.phase], [figures.interval_text(row.call_s) for row in rows]),
        Column("speedup", [figures.speedup_text(row.speedup) for row in rows]),
        Column("attention", [figures.share_text(row.attention_share) for row in rows]),
        Column("memory", [figures.size(row.peak_bytes) for row in rows]),
        Column("off", [figures.error(row.logits_error) for row in rows]),
        Column("verdict", [figures.word(row, case) for row in rows]),
    ]


def _fine_tuning(case: FineTuningCase) -> list[Column]:
    rows, best = case.rows, _stars(case)
    return [
        Column(IMPLEMENTATION, [shortened(row.implementation) for row in rows]),
        Column("path", [row.path or figures.UNKNOWN for row in rows]),
        Column("it/s", [figures.rate(row.iterations_per_second) for row in rows]),
        Column("tokens/s", [starred(row, best) for row in rows]),
        Column("per iteration", [figures.interval_text(row.call_s) for row in rows]),
        Column("speedup", [figures.speedup_text(row.speedup) for row in rows]),
        Column("memory", [figures.size(row.peak_bytes) for row in rows]),
        Column("loss", [loss_text(row) for row in rows]),
        Column("off", [figures.error(row.loss_difference) for row in rows]),
        Column("verdict", [figures.word(row, case) for row in rows]),
    ]


def _stars(case: ModelCase | FineTuningCase) -> tuple[str, ...]:
    best = figures.best_of(case)
    return () if len(best) == sum(row.status == figures.OK for row in case.rows) else best


def loss_text(row: FineTuningRow) -> str:
    """Format the first and the last loss."""
    known = [loss for loss in row.losses if loss is not None]
    return f"{known[0]:.3f} → {known[-1]:.3f}" if known else figures.UNKNOWN


def model_notes(case: ModelCase | FineTuningCase) -> list[str]:
    """Return the notes below the table: estimates, call counts, and loss curves."""
    notes = []
    if case.weights_bytes:
        notes.append(f"weights {figures.size(case.weights_bytes)}; memory is on top of them")
    if isinstance(case, ModelCase):
        if case.shared_passes:
            notes.append("implementations shared passes: a time is that of its own attention and of the common rest")
        notes += _layer_notes(case)
    counted = [row for row in case.rows if row.replaced_calls]
    if counted:
        computed = ", ".join(f"{shortened(row.implementation)} {row.replaced_calls:,}" for row in counted)
        notes.append(f"attention calls that reached it: {computed}")
    for row in case.rows:
        if row.path == NEVER_CALLED:
            notes.append(f"{shortened(row.implementation)}: no call reached it; the model computes attention itself")
        if row.passed_on_calls:
            total = row.passed_on_calls + (row.replaced_calls or 0)
            notes.append(f"{shortened(row.implementation)}: {row.passed_on_calls} of {total} calls went to MLX's own")
    if isinstance(case, FineTuningCase):
        width = max((len(shortened(row.implementation)) for row in case.rows), default=0)
        notes += [f"{shortened(row.implementation):<{width}} {curve(row)}" for row in case.rows if row.losses]
    return notes


def _layer_notes(case: ModelCase) -> list[str]:
    """Return the time of one layer and of the rest, if the whole model was estimated from them."""
    known = [row for row in case.rows if row.layer_s is not None and row.fixed_s is not None]
    if not known:
        return []
    layers = ", ".join(f"{shortened(row.implementation)} {figures.seconds(row.layer_s)}" for row in known)
    rests = ", ".join(f"{shortened(row.implementation)} {_rest(row)}" for row in known)
    part = f"{case.workload.running_layers} of {case.workload.layers} layers ran"
    return [f"{part}; a layer takes: {layers}", f"the rest takes: {rests}"]


def _rest(row: ModelRow) -> str:
    return figures.seconds(row.fixed_s) if row.fixed_s and row.fixed_s > 0 else "too little to measure"


def curve(row: FineTuningRow, width: int = CURVE_WIDTH) -> str:
    """Draw the losses as bars, scaled from the smallest to the largest; a gap where one is not a number."""
    losses = row.losses
    picked = [losses[index * len(losses) // width] for index in range(width)] if len(losses) > width else losses
    known = [loss for loss in picked if loss is not None]
    if not known:
        return "no number"
    low, high = min(known), max(known)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(" " if loss is None else BARS[round((loss - low) / step)] for loss in picked)
