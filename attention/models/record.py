"""Result rows of model runs, built from events."""

import math
from collections.abc import Sequence
from typing import Any, Final

from msgspec import structs

from attention import events as on
from attention import statistics
from attention.plan import AnyPlan, FineTuningPlan, GenerationPlan, Plan
from attention.record import UNITY, AnyRecord, CaseRecord, Measured, Record, RunRecord, timed_row
from attention.report import (
    MIN_ROUNDS,
    FineTuningCase,
    FineTuningRow,
    ModelCase,
    ModelRow,
    NoiseFloor,
    Ratio,
    Report,
    Row,
    Run,
    Share,
)

PASSED_ON: Final = "passed on to MLX's own"
NEVER_CALLED: Final = "never called"
NO_CALL: Final = "no call of attention reached it: the model attends by itself, and that is what was timed"
LOSS_TOLERANCE: Final = {"float32": 3e-4, "float16": 3e-3, "bfloat16": 3e-3}
"""Relative difference of a loss from the reference's that rounding may cause at the start of a fine-tuning."""
GROWTH: Final = 10
"""The tolerance grows by itself per this many iterations: each step starts from the rounding of the last."""


def record_of(plan: AnyPlan) -> AnyRecord:
    """Return an empty record for a plan of any kind."""
    match plan:
        case GenerationPlan():
            return GenerationRecord(plan)
        case FineTuningPlan():
            return FineTuningRecord(plan)
        case Plan():
            return Record(plan)


class GenerationRecord(RunRecord[GenerationPlan, ModelCase]):
    """The state of a generation run."""

    def report(self, run: Run) -> Report:
        """Return the report so far; cases without results are omitted."""
        cases = tuple(self.case(index) for index in range(len(self.cases)))
        shown = tuple(case for case in cases if case.rows)
        return Report(run=run, environment=self.environment, peaks=self.peaks, models=shown)

    def case(self, index: int) -> ModelCase:
        """Return the rows of one case so far."""
        work, record = self.plan.cases[index], self.cases[index]
        reference = record.rows[record.reference].samples if record.reference else []
        floor = statistics.noise_floor(reference, record.again)
        throttled = statistics.drifted(reference, floor.floor) if floor else None
        rows = []
        for name, measured in record.rows.items():
            speedup = UNITY if name == record.reference else statistics.speedup(reference, measured.samples, floor)
            row = timed_row(measured, record, tokens=work.tokens, speedup=speedup, throttled=throttled)
            if row is not None:
                rows.append(_model_row(row, measured, record))
        return ModelCase(
            workload=work,
            reference=record.reference,
            noise_floor=floor,
            weights_bytes=record.weights_bytes,
            shared_passes=record.shared_passes,
            rows=tuple(rows),
        )


def _model_row(row: Row, measured: Measured, record: CaseRecord) -> ModelRow:
    layers, check = measured.layers, measured.check
    # The difference of two models' logits is no error against float64, and has a place of its own.
    fields = {**_fields(row, measured), "max_error": None, "rms_error": None}
    return ModelRow(
        **fields,
        attention_share=None if measured.ended else attention_share(measured.samples, record.without),
        layer_s=layers.layer_s if layers else None,
        fixed_s=layers.fixed_s if layers else None,
        logits_error=check.rms_error if check else None,
    )


def _fields(row: Row, measured: Measured) -> dict[str, Any]:
    """Return the fields common to both kinds of rows: those of every row, and the call counts."""
    calls = measured.calls
    return {
        **structs.asdict(row),
        **(_observed(row, calls) if calls and not measured.ended else {}),
        "predicted_bytes": None,  # one call's of attention, and no part of a model's figures
        "replaced_calls": calls.replaced if calls else None,
        "passed_on_calls": calls.passed_on if calls else None,
    }


def _observed(row: Row, calls: on.CallsCounted) -> dict[str, Any]:
    """Return the path that ran, if it differs from the route predicted for a layer."""
    if calls.replaced:
        path = calls.path or row.path
        return {"path": path, "fused": row.fused if path == row.path else None}
    reason = f"all calls went to MLX's own: {calls.reason}" if calls.passed_on else NO_CALL
    observed = {"path": PASSED_ON if calls.passed_on else NEVER_CALLED, "fused": None}
    return observed if row.status == "inaccurate" else {**observed, "reason": reason}


def attention_share(times: Sequence[float], without: Sequence[float]) -> Share | None:
    """Return the share of a model's time saved without attention, from paired rounds; None below MIN_ROUNDS."""
    logs = statistics.log_ratios(times, without)
    if len(logs) < MIN_ROUNDS:
        return None
    middle, low, high = (1 - math.exp(-log) for log in statistics.ratio_interval(logs))
    return Share(value=middle, low=low, high=high)


class FineTuningRecord(RunRecord[FineTuningPlan, FineTuningCase]):
    """The state of a run of fine-tunings."""

    def report(self, run: Run) -> Report:
        """Return the report so far; cases without results are omitted."""
        cases = tuple(self.case(index) for index in range(len(self.cases)))
        shown = tuple(case for case in cases if case.rows)
        return Report(run=run, environment=self.environment, peaks=self.peaks, fine_tunings=shown)

    def case(self, index: int) -> FineTuningCase:
        """Return the rows of one case so far.

        Fine-tunings run one after the other, so their times are unpaired: speedups are ratios of two runs.
        """
        work, record = self.plan.cases[index], self.cases[index]
        reference = record.rows[record.reference] if record.reference else None
        floor = _unpaired_floor(reference.samples, record.again) if reference else None
        rows = []
        for name, measured in record.rows.items():
            speedup = UNITY if name == record.reference else _unpaired(reference, measured, floor)
            row = timed_row(measured, record, tokens=work.tokens, speedup=speedup, throttled=None)
            if row is not None:
                rows.append(_tuning_row(row, measured, reference, LOSS_TOLERANCE[work.dtype]))
        return FineTuningCase(
            workload=work,
            reference=record.reference,
            noise_floor=floor,
            weights_bytes=record.weights_bytes,
            rows=tuple(rows),
        )


def _unpaired_floor(first: Sequence[float], second: Sequence[float]) -> NoiseFloor | None:
    ratio = statistics.unpaired_ratio(first, second)
    if ratio is None:
        return None
    floor = max(ratio.high - 1, 1 / ratio.low - 1, statistics.SMALLEST_FLOOR)
    return NoiseFloor(value=ratio.value, low=ratio.low, high=ratio.high, floor=floor)


def _unpaired(reference: Measured | None, measured: Measured, floor: NoiseFloor | None) -> Ratio | None:
    if reference is None:
        return None
    return statistics.unpaired_ratio(reference.samples, measured.samples, floor.floor if floor else math.inf)


def _tuning_row(row: Row, measured: Measured, reference: Measured | None, tolerance: float) -> FineTuningRow:
    differences = loss_differences(reference.losses, measured.losses) if reference else []
    fields = _fields(row, measured)
    apart = _first_apart(differences, tolerance)
    if apart is not None and row.status == "ok":
        fields["status"], fields["reason"] = "inaccurate", apart
    known = [difference for difference in differences if math.isfinite(difference)]
    return FineTuningRow(
        **fields,
        iterations_per_second=1 / row.call_s.median if row.call_s else None,
        losses=tuple(measured.losses),
        loss_difference=max(known) if known and len(known) == len(differences) else None,
    )


def loss_differences(reference: Sequence[float | None], losses: Sequence[float | None]) -> list[float]:
    """Return the relative differences of two loss curves up to the shorter one; infinite if a loss is not finite."""
    return [
        math.inf if first is None or loss is None else abs(loss - first) / max(abs(first), 1e-9)
        for first, loss in zip(reference, losses, strict=False)
    ]


def _first_apart(differences: Sequence[float], tolerance: float) -> str | None:
    """Describe where a curve first departs from the reference's by more than rounding, or return None."""
    for index, difference in enumerate(differences):
        allowed = tolerance * (1 + index / GROWTH)
        if difference > allowed:
            off = f"{difference:.2%} off the reference's" if math.isfinite(difference) else "no number"
            return f"the loss of iteration {index + 1} is {off}; {allowed:.2%} is allowed"
    return None
