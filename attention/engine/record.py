"""The state of a run: built from events, turned into result rows at any time."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct, field, structs

from attention.core import events as on
from attention.core import statistics, stream
from attention.core.plan import AnyPlan, FineTuningPlan, GenerationPlan, Plan, StreamPlan
from attention.core.results import (
    MIN_ROUNDS,
    AnyCase,
    Case,
    Conditions,
    Environment,
    FineTuningCase,
    FineTuningRow,
    Fingerprint,
    Interval,
    ModelCase,
    ModelRow,
    NoiseFloor,
    Peaks,
    RankFigures,
    Ratio,
    Report,
    Row,
    Run,
    Share,
    StreamCase,
    StreamRow,
    Summary,
)
from attention.core.route import Route
from attention.core.workload import Counterpart, Workload

LOG_LINES: Final = 10_000
INTERRUPTED: Final = "interrupted"
MAX_EFFICIENCY: Final = 1.05
"""Above this the measured peak is not the device's peak (a matrix unit beside float32 rates); below it is noise."""
UNITY: Final = Ratio(value=1.0, low=1.0, high=1.0)


class RowState(Struct):
    """Everything measured of one implementation on one case."""

    implementation: str
    route: Route | None = None
    step: str | None = None
    """The current step, if any."""
    first_call_s: float | None = None
    latency_s: float | None = None
    accuracy: on.AccuracyChecked | None = None
    peak_bytes: int | None = None
    joules: float | None = None
    """Energy of one call."""
    samples: list[float] = field(default_factory=list)
    """Seconds per call, one for each round; NaN for a round without a sample."""
    counterparts: dict[Counterpart, list[float]] = field(default_factory=dict)
    """The same on the case's counterparts."""
    losses: list[float | None] = field(default_factory=list)
    calls: on.CallsCounted | None = None
    layers: on.LayersTimed | None = None
    blocks: list[stream.StreamBlock] = field(default_factory=list)
    """The blocks of a stream's tokens so far."""
    bound_s: float | None = None
    bare_bins: dict[int, int] = field(default_factory=dict)
    ended: on.RowEnded | None = None
    per_rank: tuple[RankFigures, ...] = ()

    def forget_times(self) -> None:
        """Drop what a repeated case will measure again; a row that has ended is unchanged."""
        if self.ended is None:
            self.step, self.samples, self.counterparts, self.losses, self.blocks = None, [], {}, [], []
            self.joules = None


class RankState(Struct):
    """What is known of one rank's process."""

    started: on.RankStarted | None = None
    alive: on.RankAlive | None = None
    failed: str | None = None


class CaseState(Struct):
    """Everything measured on one case."""

    rows: dict[str, RowState]
    reference: str | None = None
    repeated_reference: list[float] = field(default_factory=list)
    without_attention: list[float] = field(default_factory=list)
    """Samples of the model whose attention returns its query unchanged."""
    weights_bytes: int | None = None
    cache: on.CacheMeasured | None = None
    shared_passes: bool = False
    stopped_by: str | None = None
    started: bool = False


P = TypeVar("P", bound=AnyPlan)
C = TypeVar("C", bound=AnyCase)


class RunRecord(ABC, Generic[P, C]):
    """The state of a run, changed only by events; subclasses define its rows.

    Attributes:
        plan: the plan of the run.
        cases: one entry for each case of the plan.
        environment, peaks: empty until the worker reports them.
        conditions: other load on the machine, the worst of the cases so far; None before the first is complete.
        fingerprint: None until the worker reports it.
        progress: the latest Progress event, or None.
        last_rounds: the latest RoundsDone event, with its memory figures.
        log: the latest messages, at most LOG_LINES.
        refused: why nothing could run, or None.
        ranks: the processes of a run over several devices, by rank.
        done: whether the worker reported completion.
    """

    def __init__(self, plan: P) -> None:
        self.plan = plan
        self.cases = [
            CaseState(rows={name: RowState(implementation=name) for name in plan.ordered}) for _ in plan.cases
        ]
        self.environment = Environment()
        self.peaks = Peaks()
        self.conditions: Conditions | None = None
        self.fingerprint: Fingerprint | None = None
        self.progress: on.Progress | None = None
        self.last_rounds: on.RoundsDone | None = None
        self.log: deque[on.Message] = deque(maxlen=LOG_LINES)
        self.refused: on.RunRefused | None = None
        self.current_case: int | None = None
        self.ranks: dict[int, RankState] = {}
        self.done = False

    def apply(self, event: on.AnyEvent) -> None:
        """Apply one event."""
        match event:
            case on.RunStarted():
                self.environment = event.environment
                self.fingerprint = self.fingerprint or event.fingerprint  # of the first worker of a run
            case on.PeaksMeasured():
                self.peaks = event.peaks
            case on.ConditionsMeasured():
                before = self.conditions
                self.conditions = before.worst(event.conditions) if before else event.conditions
            case on.Progress():
                self.progress = event
            case on.Message():
                self.log.append(event)
            case on.RunRefused():
                self.refused = event
            case on.RunDone():
                self.done = True
                if self.fingerprint:
                    self.fingerprint = structs.replace(self.fingerprint, after=event.state)
            case on.RankStarted() | on.RankAlive() | on.RankFailed():
                self._take_rank(event)
            case on.WorkerUnusable() | on.TrialStarted() | on.Tuned() | on.Switched():
                pass
            case _:
                self._apply_to_case(event, self.cases[event.case])

    def _take_rank(self, event: on.RankEvent) -> None:
        state = self.ranks.setdefault(event.rank, RankState())
        match event:
            case on.RankStarted():
                self.ranks[event.rank] = RankState(started=event)
            case on.RankAlive():
                state.alive = event
            case on.RankFailed():
                state.failed = event.reason

    def _apply_to_case(self, event: on.CaseEvent, case: CaseState) -> None:
        match event:
            case on.CaseStarted():
                self.current_case, case.started = event.case, True
                case.repeated_reference, case.without_attention = [], []
                for measured in case.rows.values():
                    measured.forget_times()
            case on.ReferenceChosen():
                case.reference = event.implementation
            case on.RoundsDone():
                self.last_rounds = event
                beside = {on.REPEATED_REFERENCE: case.repeated_reference, on.WITHOUT_ATTENTION: case.without_attention}
                for name, samples in event.samples.items():
                    into = beside[name] if name in beside else case.rows[name].samples
                    into.extend(math.nan if sample is None else sample for sample in samples)
                for counterpart, by_name in event.counterparts.items():
                    for name, samples in by_name.items():
                        into = case.rows[name].counterparts.setdefault(counterpart, [])
                        into.extend(math.nan if sample is None else sample for sample in samples)
            case on.PassesShared():
                case.shared_passes = True
            case on.WeightsLoaded():
                case.weights_bytes = event.weights_bytes
            case on.CacheMeasured():
                case.cache = event
            case on.IterationDone():
                self._take_iteration(event, case)
            case on.CaseDone():
                case.stopped_by = event.stopped_by
            case on.CaseTimeEstimated() | on.CallTimed():
                pass
            case _:
                self._apply_to_row(event, case.rows[event.implementation])

    @staticmethod
    def _take_iteration(event: on.IterationDone, case: CaseState) -> None:
        again = event.implementation == on.REPEATED_REFERENCE
        row = None if again else case.rows[event.implementation]
        if row:
            row.losses.append(event.loss)
        if event.number > 1:
            (row.samples if row else case.repeated_reference).append(event.seconds)
        elif row:
            row.first_call_s = event.seconds  # compiling the step

    def _apply_to_row(self, event: on.RowEvent | on.ModelRowEvent | on.StreamRowEvent, row: RowState) -> None:
        match event:
            case on.RouteFound():
                row.route = event.route
            case on.StepStarted():
                row.step = event.step
            case on.RowEnded():
                row.ended, row.step = event, None
            case on.FirstCall():
                row.first_call_s = event.seconds
            case on.AccuracyChecked():
                row.accuracy = event
            case on.MemoryMeasured():
                row.peak_bytes = event.peak_bytes
            case on.LatencyMeasured():
                row.latency_s = event.seconds
            case on.CallsCounted():
                row.calls = event
            case on.LayersTimed():
                row.layers = event
            case on.StreamAdvanced():
                row.blocks += event.blocks
            case on.BoundMeasured():
                row.bound_s = event.seconds
            case on.BareLoopMeasured():
                row.bare_bins = event.bins
            case on.EnergyMeasured():
                row.joules = event.joules
            case on.RanksMeasured():
                row.per_rank = event.per_rank

    @abstractmethod
    def case(self, index: int) -> C:
        """Return the rows of one case so far."""

    def report(self, run: Run, cases: Sequence[C] | None = None) -> Report:
        """Return the report so far; cases without results are omitted.

        Args:
            run: the run's identity.
            cases: all cases of the plan, if their rows are known; by default they are computed.
        """
        cases = [self.case(index) for index in range(len(self.cases))] if cases is None else cases
        shown = tuple(case for case in cases if case.rows)
        return Report(
            run=run,
            environment=self.environment,
            peaks=self.peaks,
            conditions=self.conditions,
            fingerprint=self.fingerprint,
            **self._results(shown),
        )

    @abstractmethod
    def _results(self, cases: tuple[C, ...]) -> dict[str, Any]:
        """Return the fields of a report that hold these cases."""


AnyRecord = RunRecord[Any, Any]


class Record(RunRecord[Plan, Case]):
    """The state of a run over attention shapes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._earlier: list[CaseState] = []

    def extend(self, earlier: "Record") -> None:
        """Count the rounds of an earlier run of the same cases too: its samples come before this run's."""
        self._earlier = [earlier._state(index) for index in range(len(earlier.cases))]

    def _state(self, index: int) -> CaseState:
        return joined(self._earlier[index], self.cases[index]) if self._earlier else self.cases[index]

    def _results(self, cases: tuple[Case, ...]) -> dict[str, Any]:
        return {"cases": cases, "summary": summarise(cases, self.plan.ordered)}

    def case(self, index: int) -> Case:
        """Return the rows of one case so far."""
        workload, record = self.plan.cases[index], self._state(index)
        floor, made = paired_rows(record, workload.tokens)
        rows = tuple(_with_rates(row, workload, self.peaks) for row, _ in made)
        return Case(
            workload=workload,
            reference=record.reference,
            noise_floor=floor,
            kv_token_bytes=workload.kv_token_bytes,
            rows=rows,
        )


def joined(first: CaseState, second: CaseState) -> CaseState:
    """Return the state of a case that was measured twice, with the rounds of both.

    Rounds stay paired: an implementation without a sample in a round has NaN there. If the two have different
    references, only the second counts.
    """
    if first.reference is None or second.reference not in (None, first.reference):
        return second
    rounds = max(map(len, (first.repeated_reference, *(row.samples for row in first.rows.values()))))
    return structs.replace(
        second,
        rows={name: _joined_row(first.rows[name], row, rounds) for name, row in second.rows.items()},
        reference=first.reference,
        repeated_reference=[*_padded(first.repeated_reference, rounds), *second.repeated_reference],
        stopped_by=second.stopped_by if second.started else first.stopped_by,
        started=True,
    )


def _joined_row(first: RowState, second: RowState, rounds: int) -> RowState:
    before = first if first.ended is None else RowState(implementation=first.implementation)
    names = {*before.counterparts, *second.counterparts}
    return structs.replace(
        second,
        route=second.route or before.route,
        first_call_s=before.first_call_s if before.first_call_s is not None else second.first_call_s,
        latency_s=second.latency_s if second.latency_s is not None else before.latency_s,
        accuracy=second.accuracy or before.accuracy,
        peak_bytes=second.peak_bytes if second.peak_bytes is not None else before.peak_bytes,
        per_rank=second.per_rank or before.per_rank,
        samples=[*_padded(before.samples, rounds), *second.samples],
        counterparts={
            name: [*_padded(before.counterparts.get(name, []), rounds), *second.counterparts.get(name, [])]
            for name in names
        },
    )


def _padded(samples: Sequence[float], rounds: int) -> list[float]:
    return [*samples, *[math.nan] * (rounds - len(samples))]


def _with_rates(row: Row, workload: Workload, peaks: Peaks) -> Row:
    """Return the row with its FLOP/s and its efficiency; peaks are those of each rank's device."""
    if row.call_s is None:
        return row
    flops_per_s = workload.flops / row.call_s.median
    efficiency = _efficiency(flops_per_s / workload.ranks, peaks)
    return structs.replace(row, flops_per_s=flops_per_s, efficiency=efficiency)


def paired_rows(record: CaseState, tokens: int) -> tuple[NoiseFloor | None, list[tuple[Row, RowState]]]:
    """Return the noise floor of interleaved rounds, and each row that has results beside its measurements.

    `tokens`: produced by one call.
    """
    reference = record.rows[record.reference].samples if record.reference else []
    floor = statistics.noise_floor(reference, record.repeated_reference)
    throttled = statistics.slowed_down(reference, floor.floor) if floor else None
    rows = []
    for name, measured in record.rows.items():
        speedup = UNITY if name == record.reference else statistics.speedup(reference, measured.samples, floor)
        row = timed_row(measured, record, tokens=tokens, speedup=speedup, throttled=throttled)
        if row is not None:
            rows.append((_beside_counterparts(row, measured, floor), measured))
    return floor, rows


def _beside_counterparts(row: Row, measured: RowState, floor: NoiseFloor | None) -> Row:
    """Return the row with its times on the case's counterparts, of those that were measured."""
    fields: dict[str, Any] = {}
    for counterpart, samples in measured.counterparts.items():
        valid = [sample for sample in samples if not math.isnan(sample)]
        if valid:
            fields[f"over_{counterpart}"] = statistics.speedup(samples, measured.samples, floor)
            fields[f"{counterpart}_s"] = statistics.median_interval(valid)
    return row if measured.ended else structs.replace(row, **fields)


def timed_row(
    measured: RowState, record: CaseState, *, tokens: int, speedup: Ratio | None, throttled: bool | None
) -> Row | None:
    """Return the fields common to all rows, for calls that produce `tokens` tokens; None if there are none yet."""
    ended, route, check = measured.ended, measured.route, measured.accuracy
    if ended is None and all(map(math.isnan, measured.samples)):
        return None
    accurate = check is None or check.accurate
    taken = tuple([sample for sample in measured.samples if sample == sample])  # not NaN; the app does it every second
    call = statistics.median_interval(taken) if taken else None
    return Row(
        implementation=measured.implementation,
        status=ended.status if ended else ("ok" if accurate else "inaccurate"),
        path=route.path if route else None,
        fused=route.fused if route and route.supported else None,
        reason=_reason(measured),
        tokens_per_second=tokens / call.median if call else None,
        call_s=call,
        latency_s=measured.latency_s,
        first_call_s=measured.first_call_s,
        speedup=None if ended else speedup,
        peak_bytes=measured.peak_bytes,
        predicted_bytes=route.predicted_bytes if route else None,
        max_error=check.max_error if check else None,
        rms_error=check.rms_error if check else None,
        kv_error=check.kv_error if check else None,
        joules_per_token=None if measured.joules is None else measured.joules / tokens,
        approximate=route.approximate if route else None,
        per_rank=measured.per_rank,
        samples=taken,
        stopped_by="failed" if ended else record.stopped_by or INTERRUPTED,
        throttled=throttled,
    )


def _efficiency(flops_per_s: float, peaks: Peaks) -> float | None:
    if not peaks.flops_per_s:
        return None
    share = flops_per_s / peaks.flops_per_s
    return share if share <= MAX_EFFICIENCY else None


def _reason(measured: RowState) -> str | None:
    if measured.ended:
        return measured.ended.reason
    if measured.accuracy and not measured.accuracy.accurate:
        return measured.accuracy.detail
    if measured.accuracy and measured.route and measured.route.approximate:
        return f"{measured.route.reason}; {measured.accuracy.detail}"
    return measured.route.reason if measured.route else None


def summarise(cases: Sequence[AnyCase], implementations: tuple[str, ...]) -> tuple[Summary, ...]:
    """Return one summary per implementation: the geometric mean of its speedups over the cases it ran accurately."""
    lines = []
    for name in implementations:
        rows = [row for case in cases for row in case.rows if row.implementation == name]
        speedups = [row.speedup for row in rows if row.speedup and row.status == "ok"]
        not_ok = sum(row.status != "ok" for row in rows)
        if rows:
            mean = statistics.geometric_mean(speedups)
            lines.append(Summary(implementation=name, cases=len(speedups), speedup=mean, not_ok=not_ok))
    return tuple(lines)


PASSED_ON_REASON: Final = "passed on to MLX's own"
NEVER_CALLED: Final = "never called"
NO_CALL: Final = "no call of attention reached it: the model attends by itself, and that is what was timed"
LOSS_TOLERANCE: Final = {"float32": 3e-4, "float16": 3e-3, "bfloat16": 3e-3}
"""Relative difference of a loss from the reference's that rounding may cause at the start of a fine-tuning."""
TOLERANCE_GROWTH: Final = 10
"""The tolerance grows by itself per this many iterations: each step starts from the rounding of the last."""


def record_of(plan: AnyPlan) -> AnyRecord:
    """Return an empty record for a plan of any kind."""
    match plan:
        case GenerationPlan():
            return GenerationRecord(plan)
        case FineTuningPlan():
            return FineTuningRecord(plan)
        case StreamPlan():
            return StreamRecord(plan)
        case Plan():
            return Record(plan)


class GenerationRecord(RunRecord[GenerationPlan, ModelCase]):
    """The state of a generation run."""

    def _results(self, cases: tuple[ModelCase, ...]) -> dict[str, Any]:
        return {"models": cases}

    def case(self, index: int) -> ModelCase:
        """Return the rows of one case so far."""
        work, record = self.plan.cases[index], self.cases[index]
        floor, made = paired_rows(record, work.tokens)
        rows = [_model_row(row, measured, record) for row, measured in made]
        return ModelCase(
            workload=work,
            reference=record.reference,
            noise_floor=floor,
            weights_bytes=record.weights_bytes,
            kv_token_bytes=record.cache.kv_token_bytes if record.cache else None,
            cache_bytes=record.cache.cache_bytes if record.cache else None,
            shared_passes=record.shared_passes,
            rows=tuple(rows),
        )


def _model_row(row: Row, measured: RowState, record: CaseState) -> ModelRow:
    layers, check = measured.layers, measured.accuracy
    # The difference of two models' logits is no error against float64, and has a place of its own.
    fields = {**_fields(row, measured), "max_error": None, "rms_error": None}
    return ModelRow(
        **fields,
        attention_share=None if measured.ended else attention_share(measured.samples, record.without_attention),
        layer_s=layers.layer_s if layers else None,
        fixed_s=layers.fixed_s if layers else None,
        logits_error=check.rms_error if check else None,
        kl_divergence=check.kl_divergence if check else None,
    )


def _fields(row: Row, measured: RowState) -> dict[str, Any]:
    """Return the fields common to both kinds of rows: those of every row, and the call counts."""
    calls = measured.calls
    return {
        **structs.asdict(row),
        **(_observed_path(row, calls) if calls and not measured.ended else {}),
        "predicted_bytes": None,  # one call's of attention, and no part of a model's figures
        "replaced_calls": calls.replaced if calls else None,
        "passed_on_calls": calls.passed_on if calls else None,
    }


def _observed_path(row: Row, calls: on.CallsCounted) -> dict[str, Any]:
    """Return the path that ran, if it differs from the route predicted for a layer."""
    if calls.replaced:
        path = calls.path or row.path
        return {"path": path, "fused": row.fused if path == row.path else None}
    reason = f"all calls went to MLX's own: {calls.reason}" if calls.passed_on else NO_CALL
    observed = {"path": PASSED_ON_REASON if calls.passed_on else NEVER_CALLED, "fused": None}
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

    def _results(self, cases: tuple[FineTuningCase, ...]) -> dict[str, Any]:
        return {"fine_tunings": cases}

    def case(self, index: int) -> FineTuningCase:
        """Return the rows of one case so far.

        Fine-tunings run one after the other, so their times are unpaired: speedups are ratios of two runs.
        """
        work, record = self.plan.cases[index], self.cases[index]
        reference = record.rows[record.reference] if record.reference else None
        floor = _unpaired_floor(reference.samples, record.repeated_reference) if reference else None
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
    floor = max(ratio.high - 1, 1 / ratio.low - 1, statistics.MIN_FLOOR)
    return NoiseFloor(value=ratio.value, low=ratio.low, high=ratio.high, floor=floor)


def _unpaired(reference: RowState | None, measured: RowState, floor: NoiseFloor | None) -> Ratio | None:
    if reference is None:
        return None
    return statistics.unpaired_ratio(reference.samples, measured.samples, floor.floor if floor else math.inf)


def _tuning_row(row: Row, measured: RowState, reference: RowState | None, tolerance: float) -> FineTuningRow:
    differences = loss_differences(reference.losses, measured.losses) if reference else []
    fields = _fields(row, measured)
    apart = _first_divergence(differences, tolerance)
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


def _first_divergence(differences: Sequence[float], tolerance: float) -> str | None:
    """Describe where a curve first departs from the reference's by more than rounding, or return None."""
    for index, difference in enumerate(differences):
        allowed = tolerance * (1 + index / TOLERANCE_GROWTH)
        if difference > allowed:
            off = f"{difference:.2%} off the reference's" if math.isfinite(difference) else "no number"
            return f"the loss of iteration {index + 1} is {off}; {allowed:.2%} is allowed"
    return None


class StreamRecord(RunRecord[StreamPlan, StreamCase]):
    """The state of a run over a stream."""

    def _results(self, cases: tuple[StreamCase, ...]) -> dict[str, Any]:
        return {"streams": cases}

    def case(self, index: int) -> StreamCase:
        """Return the rows of one case so far."""
        work, record = self.plan.cases[index], self.cases[index]
        made = (stream_row(measured, record, work) for measured in record.rows.values())
        return StreamCase(
            workload=work, weights_bytes=record.weights_bytes, rows=tuple(row for row in made if row is not None)
        )


def stream_row(measured: RowState, record: CaseState, work: stream.Stream) -> StreamRow | None:
    """Return the row of one way of keeping a stream's tokens; None if nothing of it is known yet."""
    blocks, full = measured.blocks, measured.implementation == stream.FULL
    if not blocks and measured.ended is None:
        return None
    ended, route = measured.ended, measured.route
    common: dict[str, Any] = {
        "implementation": measured.implementation,
        "status": ended.status if ended else "ok",
        "path": route.path if route else None,
        "fused": route.fused if route and route.supported else None,
        "reason": ended.reason if ended else route.reason if route else None,
        "first_call_s": measured.first_call_s,
        "stopped_by": "failed" if ended else record.stopped_by or INTERRUPTED,
    }
    if not blocks:
        return StreamRow(**common)
    samples = () if full else tuple(block.seconds for block in blocks)
    call = statistics.median_interval(samples) if samples else Interval(median=blocks[-1].seconds)
    return StreamRow(
        **common,
        call_s=call,
        tokens_per_second=1 / call.median,
        samples=samples,
        tokens=blocks[-1].end,
        blocks=tuple(blocks),
        **(_climb(blocks, work) if full else _steadiness(measured, call.median, work)),
        **_stream_losses(blocks, work),
    )


def _climb(blocks: Sequence[stream.StreamBlock], work: stream.Stream) -> dict[str, Any]:
    """Return the cost of full attention at the end of the stream, extrapolated if it was not measured to there."""
    if blocks[-1].end >= work.tokens:
        return {"end_s": blocks[-1].seconds}
    line = stream.fitted_line(blocks)
    return {"end_s": line.at(work.tokens), "extrapolated": True} if line else {}


def _steadiness(measured: RowState, typical_s: float, work: stream.Stream) -> dict[str, Any]:
    """Return the fields on how time and memory stay the same over a stream."""
    blocks = measured.blocks
    bins = stream.merged_bins(blocks)
    tenths = stream.tenths(blocks, work.tokens)
    filled = next((index for index, block in enumerate(blocks) if block.end >= work.kept), len(blocks) - 1)
    start = blocks[min(filled + 1, len(blocks) - 1)]  # the first block with a full window throughout
    p99_s, slowest_s = stream.quantile_s(bins, 0.99), max(block.slowest_s for block in blocks)
    return {
        "p99_s": None if p99_s is None else min(p99_s, slowest_s),  # a quantile is known to a bin
        "slowest_s": slowest_s,
        "slow_tokens": stream.slow_steps(bins, typical_s),
        "bare_bins": measured.bare_bins,
        "tenth_s": tuple(tenths),
        "spread": stream.spread(tenths, work.tokens, work.kept),
        "start_bytes": start.resident_bytes,
        "end_bytes": blocks[-1].resident_bytes,
        "device_start_bytes": start.device_bytes,
        "device_end_bytes": blocks[-1].device_bytes,
        "end_s": tenths[-1] if tenths else blocks[-1].seconds,
        "bound_s": measured.bound_s,
        "bound_share": measured.bound_s / typical_s if measured.bound_s else None,
    }


def _stream_losses(blocks: Sequence[stream.StreamBlock], work: stream.Stream) -> dict[str, Any]:
    """Return the mean losses of the tokens before and after the first one that falls out of the window."""
    return {
        "loss_inside": stream.mean_loss([block for block in blocks if block.end <= work.kept]),
        "loss_beyond": stream.mean_loss([block for block in blocks if block.end > work.kept]),
    }
