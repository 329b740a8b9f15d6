"""The loop shared by all kinds of runs: cases in order, failed rows, kernel builds, timing rounds."""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from msgspec import structs

from attention import implementations
from attention.core import events as on
from attention.core.errors import InputsOverwrittenError, error_line
from attention.core.plan import AnyPlan, Assignment, ranks_of
from attention.core.results import MIN_ROUNDS, RankFigures
from attention.core.route import Route, unsupported, validated_route
from attention.core.workload import COUNTERPARTS, Counterpart, Workload
from attention.engine.progress import EMIT_INTERVAL_S, Emit, Progress
from attention.engine.turns import TURNS, Turns
from attention.implementations.protocol import Implementation, build, missing_feature, needs_building
from attention.measure.conditions import ConditionsWatch, fingerprint, machine_state
from attention.measure.device import Device, environment, probe
from attention.measure.energy import EnergyOfCalls, energy_counter, energy_of_calls, power_limit_w
from attention.measure.rounds import Arm, Limits, TakesSamples, min_rounds_s, run_rounds, set_strides

if TYPE_CHECKING:
    from attention.engine.ranks import Member

P = TypeVar("P", bound=AnyPlan)
M = TypeVar("M")
Mark = Callable[[int], None]
MAX_SLOWER: Final = 1.5
"""Calls whose energy is measured and that take more than this multiple of those in the rounds give none, as the device
idled or was not alone; nor do calls that are faster by as much, which were not like those of the rounds."""
MAX_POWER: Final = 1.05
"""Multiple of the device's power limit beyond which an energy counts as wrong."""
MAX_EXTENSION: Final = 1.5
"""If the minimum number of rounds takes this multiple of a case's time limit, that is announced beforehand."""
NO_MARK: Final[Mark] = lambda number: None  # noqa: E731


class DeviceStateUnknown(RuntimeError):
    """The device may be in an undefined state; the run must continue in a new process."""


class CaseRunner(ABC, Generic[P]):
    """The part of a run that one worker executes; subclasses define what a case is."""

    def __init__(
        self, assignment: Assignment, plan: P, emit: Emit, mark: Mark = NO_MARK, member: "Member | None" = None
    ) -> None:
        """Create it for one worker.

        Args:
            assignment: the part of the plan that it runs.
            plan: the plan.
            emit: the sink for events.
            mark: marks the running implementation.
            member: rank 0 of the group that cases of several ranks run on; None for cases on one device.
        """
        self._assignment = assignment
        self._plan = plan
        self._member = member
        self._progress = Progress(plan, assignment.first_case, emit, mark, assignment.known)
        self._turns = Turns(None)
        self._in_turns = False
        """Whether another version is measured beside this one, so that only what is compared is measured."""
        self._sampled: list[Arm] = []
        """The rows' arms that were sampled to the end of the latest rounds."""

    def run(self) -> None:
        """Measure all remaining cases, up to the first one for another number of ranks.

        Raises:
            UsageError, NoBackendError: nothing can run.
            DeviceStateUnknown: a row was reported as failed, and this process must not continue.
        """
        self._backend = (device := probe()).backend
        self._load_implementations()
        self._progress.emit(on.RunStarted(environment=environment(device), fingerprint=fingerprint(device)))
        self._turns = Turns(os.environ.get(TURNS))  # two versions load at the same time, and prepare one by one
        self._in_turns = not self._turns.alone
        self._prepare_all(device)
        conditions = ConditionsWatch(device)
        with on.listening_to_tuning(self._on_tuning_event):
            for case in range(self._assignment.first_case, len(self._plan.cases)):
                if ranks_of(self._plan.cases[case]) != self._ranks:
                    return
                self._progress.begin_case(case)
                stopped_by = self._run_case(case)
                self._progress.emit(on.ConditionsMeasured(conditions=conditions.read()))
                self._progress.end_case(stopped_by)
        self._turns.end()
        self._progress.emit(on.RunDone(state=machine_state(device)))

    def measure_cost(self) -> None:
        """Run until the time of the first case is estimated from a timed call; the worker ends then."""
        emit = self._progress.emit

        def until_estimated(event: on.AnyEvent) -> None:
            emit(event)
            if isinstance(event, on.CaseTimeEstimated):
                emit(on.RunDone())
                os._exit(0)

        self._progress.emit = until_estimated
        self.run()

    def _load_implementations(self) -> None:
        """Load all implementations, so that an unknown or a broken one ends the run before it has begun."""
        for name in self._plan.ordered:
            self._progress.mark_running(name)
            implementations.load_implementation(name)
        self._progress.mark_idle()

    @property
    def _ranks(self) -> int:
        """Number of ranks of this worker's group."""
        return self._member.group.size() if self._member else 1

    def _route(self, implementation: Implementation, workload: Workload, device: Device) -> Route:
        """Return an implementation's route on this worker's group."""
        if self._member:
            from attention.engine.ranks import ranks_route

            return ranks_route(implementation, workload, device, self._member.conditions)
        if missing := missing_feature(implementation, workload):
            return unsupported(missing)
        return validated_route(implementation.route(workload, device))

    def _on_tuning_event(self, event: on.TuningEvent | on.Message) -> None:
        """Emit an event of an autotuning implementation."""
        self._progress.emit(event)
        if isinstance(event, on.TrialStarted):
            self._progress.emit_progress(f"{event.implementation}: tries {len(event.candidates)} candidates")

    @abstractmethod
    def _prepare_all(self, device: Device) -> None:
        """Set up once, before the first case."""

    @abstractmethod
    def _run_case(self, case: int) -> str:
        """Measure one case; return the reason it ended, in a word."""

    def _supported_route(self, name: str, workload: Workload, device: Device) -> Route | None:
        """Emit and return an implementation's route; if it fails or is unsupported, end the row and return None."""
        self._progress.mark_running(name)
        try:
            route = self._route(implementations.load_implementation(name), workload, device)
        except BaseException as error:
            self._fail(name, error)
            return None
        self._progress.emit(on.RouteFound(case=self._progress.case, implementation=name, route=route))
        if route.supported:
            return route
        self._progress.end_row(name, "unsupported", route.reason)
        return None

    def _make_shared(self, names: Sequence[str], make: Callable[[], M]) -> M | None:
        """Make what all rows of a case share; if that fails, all rows fail and None is returned."""
        self._progress.mark_idle()
        try:
            return make()
        except Exception as error:  # no memory for the inputs or the weights, say
            for name in names:
                self._fail(name, error)
            return None

    def _needs_building(self, name: str, workload: Workload, device: Device) -> bool:
        return needs_building(implementations.load_implementation(name), workload, device)

    def _build(self, names: Sequence[str], workload: Workload, device: Device) -> None:
        """Compile implementations, timed separately from the measurement."""
        for name in names:
            implementation = implementations.load_implementation(name)
            self._progress.begin_step(name, "build")
            started = time.perf_counter()
            build(implementation, workload, self._progress.log)
            seconds = time.perf_counter() - started
            if needs_building(implementation, workload, device):
                self._progress.log(f"{name}: built in {seconds:.0f} s, but it could not be kept")
            elif seconds > EMIT_INTERVAL_S:
                self._progress.log(f"{name}: compiling and checking took {seconds:.0f} s")
        self._progress.mark_idle()

    def _run_rounds(
        self,
        arms: Sequence[Arm],
        seconds: float,
        beside: Sequence[Arm] = (),
        min_rounds: int = MIN_ROUNDS,
        then_s: float = 0.0,
    ) -> str:
        """Sample the implementations in rounds, the first of them twice, together with the `beside` arms.

        In turns with another version the first is sampled once, since that version's rounds are what it is compared
        with, and the rounds end by time, so that both have about as many.

        `then_s`: estimated seconds of the case after these rounds.
        """
        reference = arms[0]
        again = structs.replace(reference, name=on.REPEATED_REFERENCE, samples=[])
        rows = {id(arm) for arm in arms}
        self._progress.emit(on.ReferenceChosen(case=self._progress.case, implementation=reference.name))
        for arm in arms:
            if isinstance(arm.runner, TakesSamples):
                arm.runner.begin_rounds()
            self._progress.emit(on.StepStarted(case=self._progress.case, implementation=arm.name, step="rounds"))
        running = [reference, *([] if self._in_turns else [again]), *arms[1:], *beside]
        set_strides(running, seconds)
        estimated_s = max(seconds, min_rounds_s(running, min_rounds))
        if estimated_s > MAX_EXTENSION * seconds:
            self._progress.log(longer_text(min_rounds, estimated_s, seconds))
        self._turns.pass_on()  # what another version has to prepare comes before the first round of either
        stream = SampleStream(self._progress, seconds, estimated_s, min_rounds, then_s)
        try:
            return run_rounds(
                running,
                Limits(seconds=seconds, precision=0 if self._in_turns else self._plan.precision, min_rounds=min_rounds),
                seed=self._plan.seed,
                before=lambda arm: self._mark_running(reference if arm is again else arm, rows),
                failed=lambda arm, error: self._drop_arm(arm, error, rows),
                after=lambda arms: self._after_round(stream, arms),
                clock=self._turns.clock,
                catch=BaseException,  # this process is the worker's own: sys.exit() in a call is a failure of its row
            )
        finally:
            stream.flush()
            self._sampled = [arm for arm in running if id(arm) in rows and arm.valid_samples]
            for arm in arms:
                self._emit_arm_results(arm)

    def _after_round(self, stream: "SampleStream", arms: list[Arm]) -> None:
        """Collect the samples of a round; then it is another version's turn, if one is measured beside this."""
        stream.collect(arms)
        self._turns.pass_on()

    def _measure_energy(self, device: Device) -> None:
        """Measure the energy of a call of each sampled implementation, if the device counts it; not in turns."""
        counter = energy_counter(device) if self._member is None and not self._in_turns else None
        if counter is None:
            return
        limit_w = power_limit_w(device)
        for arm in self._sampled:
            self._progress.begin_step(arm.name, "energy")
            try:
                found = energy_of_calls(arm.make_calls, counter)
            except Exception as error:
                self._fail(arm.name, error)
                continue
            problem = energy_problem(found, median(arm.valid_samples), limit_w)
            if problem is not None:
                self._progress.log(f"{arm.name}: no energy: {problem}")
            elif found.joules is not None:
                event = on.EnergyMeasured(case=self._progress.case, implementation=arm.name, joules=found.joules)
                self._progress.emit(event)
        self._progress.mark_idle()

    def _mark_running(self, arm: Arm, rows: set[int]) -> None:
        if id(arm) in rows or arm.counterpart:
            self._progress.mark_running(arm.name)
        else:
            self._progress.mark_idle()

    def _drop_arm(self, arm: Arm, error: BaseException, rows: set[int]) -> None:
        if id(arm) in rows:
            self._fail(arm.name, error)
        else:
            which = f"{arm.name} {COUNTERPARTS[arm.counterpart]}" if arm.counterpart else arm.name
            self._progress.log(f"{which} could not be measured any further: {error_line(error)}")

    def _emit_arm_results(self, arm: Arm) -> None:
        """Emit an arm's further results after the rounds."""

    def _fail(self, name: str, error: BaseException) -> None:
        """End a row; raise DeviceStateUnknown if the device or the inputs may be broken for the other rows too.

        On several ranks the others may be waiting for this one: the whole group ends.
        """
        if self._member:
            from attention.engine.ranks import failure

            self._progress.emit(failure(0, error, name))
            raise DeviceStateUnknown from error
        self._progress.end_row(name, "failed", error_line(error))
        broken = self._backend == "cuda" and isinstance(error, RuntimeError)
        if broken or isinstance(error, InputsOverwrittenError):
            self._progress.emit(on.WorkerUnusable(case=self._progress.case))
            raise DeviceStateUnknown from error


class SampleStream:
    """Collect the rounds' samples and emit them a few times a second, so that emitting does not disturb the timing."""

    def __init__(
        self,
        progress: Progress,
        seconds: float,
        estimated_s: float,
        min_rounds: int = MIN_ROUNDS,
        then_s: float = 0.0,
    ) -> None:
        """Create it at the start of the rounds; resets MLX's peak memory.

        Args:
            progress: the progress reporter.
            seconds: time limit of the rounds.
            estimated_s: estimated seconds of the rounds, used until all implementations have a sample.
            min_rounds: samples that every implementation takes, however long that lasts.
            then_s: estimated seconds of the case after the rounds.
        """
        import mlx.core as mx

        self._progress, self._then_s = progress, then_s
        self._seconds, self._estimated_s, self._min_rounds = seconds, estimated_s, min_rounds
        self._began = time.perf_counter()
        self._emitted: dict[tuple[str, Counterpart | None], int] = {}
        self._arms: list[Arm] = []
        self._last = time.perf_counter()
        mx.reset_peak_memory()

    def collect(self, arms: list[Arm]) -> None:
        """Collect the arms' samples after a round; emit them if due."""
        self._arms = list(arms)
        if time.perf_counter() - self._last >= EMIT_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Emit the samples not yet emitted."""
        import mlx.core as mx

        self._last = time.perf_counter()
        samples: dict[str, list[float | None]] = {}
        counterparts: dict[Counterpart, dict[str, list[float | None]]] = {}
        for arm in self._arms:
            known = self._emitted.get((arm.name, arm.counterpart), 0)
            into = counterparts.setdefault(arm.counterpart, {}) if arm.counterpart else samples
            into[arm.name] = _json_samples(arm.samples[known:])
        self._emitted = {(arm.name, arm.counterpart): len(arm.samples) for arm in self._arms}
        if any(samples.values()):
            rounds = max(self._emitted.values())
            active, peak = mx.get_active_memory(), mx.get_peak_memory()
            self._progress.emit(
                on.RoundsDone(
                    case=self._progress.case,
                    samples=samples,
                    counterparts=counterparts,
                    active_bytes=active,
                    peak_bytes=peak,
                )
            )
            self._emit_ranks()
            self._progress.emit_progress(f"round {rounds}", self._left_s())

    def _emit_ranks(self) -> None:
        """Emit the figures of each rank so far, of implementations that run on several."""
        for arm in self._arms:
            if isinstance(arm.runner, TakesSamples) and arm.name != on.REPEATED_REFERENCE:
                figures = tuple(_with_scratch(each, arm.scratch_bytes) for each in arm.runner.figures())
                case = self._progress.case
                self._progress.emit(on.RanksMeasured(case=case, implementation=arm.name, per_rank=figures))

    def _left_s(self) -> float:
        """Estimate the seconds left: of the time limit, or of the rounds still missing at the pace so far."""
        elapsed = self._last - self._began
        taken = min(len(arm.valid_samples) for arm in self._arms)
        missing = max(0, self._min_rounds - taken)
        rounds_s = missing * elapsed / taken if taken else self._estimated_s - elapsed
        return max(0.0, self._seconds - elapsed, rounds_s) + self._then_s


def _with_scratch(figures: RankFigures, scratch_bytes: int) -> RankFigures:
    """Return a rank's figures with the memory outside MLX's allocator in its peak, as in the row's."""
    if figures.peak_bytes is None:
        return figures
    return structs.replace(figures, peak_bytes=figures.peak_bytes + scratch_bytes)


def _json_samples(samples: Sequence[float]) -> list[float | None]:
    """Return samples with None for NaN, which JSON lacks."""
    return [None if math.isnan(sample) else sample for sample in samples]


def longer_text(rounds: int, takes_s: float, seconds: float) -> str:
    """Return why a case takes longer than the seconds it was given: below 10 s in two figures, "0.13 s"."""
    takes = f"{takes_s:.0f}" if takes_s >= 10 else f"{takes_s:.2g}"
    what = "1 round of these takes" if rounds == 1 else f"{rounds} rounds of these take"
    return f"{what} about {takes} s, longer than the {seconds:g} s of a case; fewer would support no verdict"


def energy_problem(found: EnergyOfCalls, rounds_s: float, limit_w: float | None) -> str | None:
    """Return why an energy is no figure for a row whose calls took `rounds_s` in the rounds; None if it is one."""
    slower = found.call_s / rounds_s
    if not 1 / MAX_SLOWER <= slower <= MAX_SLOWER:
        return f"its calls took {slower:.2g} times those of the rounds"
    if found.watts and limit_w and found.watts > MAX_POWER * limit_w:
        return f"{found.watts:.0f} W, beyond the {limit_w:.0f} W of the device"
    return None


def shortage_text(needed: float, limit: float, *, about: bool = False) -> str:
    """Say how much memory a case needs of how much there is; without an exponent, however much it is."""
    return f"needs {'about ' if about else ''}{_gib(needed)} GiB of {_gib(limit)}"


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:,.0f}" if gib >= 1000 else f"{gib:.4g}"
