"""The state of a run: built from events, turned into result rows at any time."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct, field, structs

from attention import events as on
from attention import statistics
from attention.plan import AnyPlan, Plan
from attention.report import AnyCase, Case, Environment, Peaks, Ratio, Report, Row, Run, Summary
from attention.route import Route

LOG_LINES: Final = 10_000
INTERRUPTED: Final = "interrupted"
HIGHEST_EFFICIENCY: Final = 1.05
"""Above this the measured peak is not the device's peak (a matrix unit beside float32 rates); below it is noise."""
UNITY: Final = Ratio(value=1.0, low=1.0, high=1.0)


class Measured(Struct):
    """Everything measured of one implementation on one case."""

    implementation: str
    route: Route | None = None
    step: str | None = None
    """The current step, if any."""
    first_call_s: float | None = None
    latency_s: float | None = None
    check: on.Checked | None = None
    peak_bytes: int | None = None
    samples: list[float] = field(default_factory=list)
    """Seconds per call, one for each round; NaN for a round without a sample."""
    losses: list[float | None] = field(default_factory=list)
    calls: on.CallsCounted | None = None
    layers: on.LayersTimed | None = None
    ended: on.RowEnded | None = None

    def forget_times(self) -> None:
        """Drop what a repeated case will measure again; a row that has ended is unchanged."""
        if self.ended is None:
            self.step, self.samples, self.losses = None, [], []


class CaseRecord(Struct):
    """Everything measured on one case."""

    rows: dict[str, Measured]
    reference: str | None = None
    again: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    """Samples of the model whose attention returns its query unchanged."""
    weights_bytes: int | None = None
    shared_passes: bool = False
    stopped_by: str | None = None
    started: bool = False


P = TypeVar("P", bound=AnyPlan)
C = TypeVar("C")


class RunRecord(ABC, Generic[P, C]):
    """The state of a run, changed only by events; subclasses define its rows.

    Attributes:
        plan: the plan of the run.
        cases: one entry for each case of the plan.
        environment, peaks: empty until the worker reports them.
        progress: the latest Progress event, or None.
        last_rounds: the latest RoundsDone event, with its memory figures.
        log: the latest messages, at most LOG_LINES.
        refused: why nothing could run, or None.
        done: whether the worker reported completion.
    """

    def __init__(self, plan: P) -> None:
        self.plan = plan
        self.cases = [
            CaseRecord(rows={name: Measured(implementation=name) for name in plan.ordered}) for _ in plan.cases
        ]
        self.environment = Environment()
        self.peaks = Peaks()
        self.progress: on.Progress | None = None
        self.last_rounds: on.RoundsDone | None = None
        self.log: deque[on.Message] = deque(maxlen=LOG_LINES)
        self.refused: on.RunRefused | None = None
        self.current_case: int | None = None
        self.done = False

    def apply(self, event: on.AnyEvent) -> None:
        """Apply one event."""
        match event:
            case on.RunStarted():
                self.environment = event.environment
            case on.PeaksMeasured():
                self.peaks = event.peaks
            case on.Progress():
                self.progress = event
            case on.Message():
                self.log.append(event)
            case on.RunRefused():
                self.refused = event
            case on.RunDone():
                self.done = True
            case on.WorkerUnusable() | on.TrialStarted() | on.Tuned() | on.Switched():
                pass
            case _:
                self._apply_to_case(event, self.cases[event.case])

    def _apply_to_case(self, event: on.CaseEvent, case: CaseRecord) -> None:
        match event:
            case on.CaseStarted():
                self.current_case, case.started = event.case, True
                case.again, case.without = [], []
                for measured in case.rows.values():
                    measured.forget_times()
            case on.ReferenceChosen():
                case.reference = event.implementation
            case on.RoundsDone():
                self.last_rounds = event
                beside = {on.AGAIN: case.again, on.WITHOUT: case.without}
                for name, samples in event.samples.items():
                    into = beside[name] if name in beside else case.rows[name].samples
                    into.extend(math.nan if sample is None else sample for sample in samples)
            case on.PassesShared():
                case.shared_passes = True
            case on.WeightsMade():
                case.weights_bytes = event.weights_bytes
            case on.IterationDone():
                self._take_iteration(event, case)
            case on.CaseDone():
                case.stopped_by = event.stopped_by
            case on.Expected():
                pass
            case _:
                self._apply_to_row(event, case.rows[event.implementation])

    @staticmethod
    def _take_iteration(event: on.IterationDone, case: CaseRecord) -> None:
        again = event.implementation == on.AGAIN
        row = None if again else case.rows[event.implementation]
        if row:
            row.losses.append(event.loss)
        if event.number > 1:
            (row.samples if row else case.again).append(event.seconds)
        elif row:
            row.first_call_s = event.seconds  # compiling the step

    def _apply_to_row(self, event: on.RowEvent | on.ModelRowEvent, row: Measured) -> None:
        match event:
            case on.RouteFound():
                row.route = event.route
            case on.StepStarted():
                row.step = event.step
            case on.RowEnded():
                row.ended, row.step = event, None
            case on.FirstCall():
                row.first_call_s = event.seconds
            case on.Checked():
                row.check = event
            case on.MemoryMeasured():
                row.peak_bytes = event.peak_bytes
            case on.LatencyMeasured():
                row.latency_s = event.seconds
            case on.CallsCounted():
                row.calls = event
            case on.LayersTimed():
                row.layers = event

    @abstractmethod
    def case(self, index: int) -> C:
        """Makes the rows of one case from what is known so far."""

    @abstractmethod
    def report(self, run: Run) -> Report:
        """Makes the report of what is known so far; rows that have nothing to show yet are left out."""


AnyRecord = RunRecord[Any, Any]


class Record(RunRecord[Plan, Case]):
    """The state of a run over attention shapes."""

    def report(self, run: Run) -> Report:
        """Makes the report of what is known so far; rows that have nothing to show yet are left out."""
        cases = tuple(self.case(index) for index in range(len(self.cases)))
        return Report(
            run=run,
            environment=self.environment,
            peaks=self.peaks,
            cases=tuple(case for case in cases if case.rows),
            summary=summarise(cases, self.plan.ordered),
        )

    def case(self, index: int) -> Case:
        """Makes the rows of one case from what is known so far."""
        record = self.cases[index]
        reference = record.rows[record.reference].samples if record.reference else []
        floor = statistics.noise_floor(reference, record.again)
        throttled = statistics.drifted(reference, floor.floor) if floor else None
        workload = self.plan.cases[index]
        made = [
            timed_row(
                measured,
                record,
                tokens=workload.tokens,
                speedup=UNITY if name == record.reference else statistics.speedup(reference, measured.samples, floor),
                throttled=throttled,
            )
            for name, measured in record.rows.items()
        ]
        rows = tuple(_with_rates(row, workload.flops, self.peaks) for row in made if row is not None)
        return Case(workload=workload, reference=record.reference, noise_floor=floor, rows=rows)


def _with_rates(row: Row, flops: int, peaks: Peaks) -> Row:
    """Return the row with its FLOP/s and its efficiency."""
    if row.call_s is None:
        return row
    flops_per_s = flops / row.call_s.median
    return structs.replace(row, flops_per_s=flops_per_s, efficiency=_efficiency(flops_per_s, peaks))


def timed_row(
    measured: Measured, record: CaseRecord, *, tokens: int, speedup: Ratio | None, throttled: bool | None
) -> Row | None:
    """Return the fields common to all rows, for calls that produce `tokens` tokens; None if there are none yet."""
    ended, route, check = measured.ended, measured.route, measured.check
    if ended is None and all(map(math.isnan, measured.samples)):
        return None
    accurate = check is None or check.accurate
    taken = tuple(sample for sample in measured.samples if not math.isnan(sample))
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
        samples=taken,
        stopped_by="failed" if ended else record.stopped_by or INTERRUPTED,
        throttled=throttled,
    )


def _efficiency(flops_per_s: float, peaks: Peaks) -> float | None:
    if not peaks.flops_per_s:
        return None
    share = flops_per_s / peaks.flops_per_s
    return share if share <= HIGHEST_EFFICIENCY else None


def _reason(measured: Measured) -> str | None:
    if measured.ended:
        return measured.ended.reason
    if measured.check and not measured.check.accurate:
        return measured.check.detail
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
