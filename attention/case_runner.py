"""What every kind of run does: cases one after the other, rows that fail, kernels that are built, rounds."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from msgspec import structs

from attention import events as on
from attention import implementations
from attention.device import Device, environment, probe
from attention.errors import InputsOverwrittenError, in_a_line
from attention.implementations.protocol import NeedsBuilding
from attention.measure.rounds import Arm, Limits, least_s, run_rounds, set_strides
from attention.plan import AnyPlan, Assignment
from attention.report import MIN_ROUNDS
from attention.route import Route, checked
from attention.teller import TELL_EVERY_S, Emit, Teller
from attention.tuning import news
from attention.workload import Workload

P = TypeVar("P", bound=AnyPlan)
M = TypeVar("M")
Mark = Callable[[int], None]
LONGER: Final = 1.5
"""A case whose fewest rounds take so many times its seconds says so before they begin."""
UNMARKED: Final[Mark] = lambda number: None  # noqa: E731


class DeviceUncertain(RuntimeError):
    """A failure after which the device may be in an unknown state; only a new process can go on."""


class CaseRunner(ABC, Generic[P]):
    """One worker's share of a run; what a case is, is its subclasses'."""

    def __init__(self, assignment: Assignment, plan: P, emit: Emit, mark: Mark = UNMARKED) -> None:
        """Takes what to run, where to tell of it, and where to mark the number of the implementation at work."""
        self._assignment = assignment
        self._plan = plan
        self._teller = Teller(plan, assignment.first_case, emit, mark)

    def run(self) -> None:
        """Measures all remaining cases.

        Raises:
            UsageError, NoBackendError: nothing can run.
            DeviceUncertain: a row was told as failed, and this process must not go on.
        """
        self._backend = (device := probe()).backend
        for name in self._plan.ordered:
            self._teller.at_work(name)
            implementations.get(name)
        self._teller.at_rest()
        self._teller.emit(on.RunStarted(environment=environment(device)))
        self._prepare_all(device)
        with news.heard_by(self._hear):
            for case in range(self._assignment.first_case, len(self._plan.cases)):
                self._teller.begin(case)
                self._teller.end(self._run_case(case))
        self._teller.emit(on.RunDone())

    def _hear(self, event: on.TuningEvent | on.Message) -> None:
        """Passes on what an implementation that chooses among others tells of it."""
        self._teller.emit(event)
        if isinstance(event, on.TrialStarted):
            self._teller.progress(f"{event.implementation}: tries {len(event.candidates)} candidates")

    @abstractmethod
    def _prepare_all(self, device: Device) -> None:
        """Does what has to be done once, before the first case."""

    @abstractmethod
    def _run_case(self, case: int) -> str:
        """Measures one case, and says in a word what ended it."""

    def _taken_route(self, name: str, workload: Workload, device: Device) -> Route | None:
        """Tells an implementation's route; where it fails or does not take the workload, ends its row: None."""
        self._teller.at_work(name)
        try:
            route = checked(implementations.get(name).route(workload, device))
        except BaseException as error:
            self._fail(name, error)
            return None
        self._teller.emit(on.RouteFound(case=self._teller.case, implementation=name, route=route))
        if route.supported:
            return route
        self._teller.end_row(name, "unsupported", route.reason)
        return None

    def _shared(self, names: Sequence[str], make: Callable[[], M]) -> M | None:
        """What all rows of a case share, outside of any row's own work; where that fails, all of them fail: None."""
        self._teller.at_rest()
        try:
            return make()
        except Exception as error:  # no memory for the inputs or the weights, say
            for name in names:
                self._fail(name, error)
            return None

    def _needs_building(self, name: str, workload: Workload, device: Device) -> bool:
        implementation = implementations.get(name)
        return isinstance(implementation, NeedsBuilding) and implementation.needs_building(workload, device)

    def _build(self, names: Sequence[str], workload: Workload, device: Device) -> None:
        """Lets implementations compile, outside every clock but their own."""
        for name in names:
            implementation = implementations.get(name)
            assert isinstance(implementation, NeedsBuilding)
            self._teller.step(name, "build")
            started = time.perf_counter()
            implementation.build(self._teller.say)
            seconds = time.perf_counter() - started
            if implementation.needs_building(workload, device):
                self._teller.say(f"{name}: built in {seconds:.0f} s, but it could not be kept")
            elif seconds > TELL_EVERY_S:
                self._teller.say(f"{name}: compiling and checking took {seconds:.0f} s")
        self._teller.at_rest()

    def _run_rounds(
        self, arms: Sequence[Arm], seconds: float, beside: Sequence[Arm] = (), min_rounds: int = MIN_ROUNDS
    ) -> str:
        """Takes samples of the implementations, the first of them twice, and of what is measured beside them."""
        reference = arms[0]
        again = structs.replace(reference, name=on.AGAIN, samples=[])
        rows = {id(arm) for arm in arms}
        self._teller.emit(on.ReferenceChosen(case=self._teller.case, implementation=reference.name))
        running = [reference, again, *arms[1:], *beside]
        set_strides(running, seconds)
        lasts_s = max(seconds, least_s(running, min_rounds))
        if lasts_s > LONGER * seconds:
            self._teller.say(
                f"{min_rounds} rounds of these take about {lasts_s:.0f} s, longer than the {seconds:g} s of a case; "
                "fewer would support no verdict"
            )
        stream = SampleStream(self._teller, lasts_s)
        try:
            return run_rounds(
                running,
                Limits(seconds=seconds, precision=self._plan.precision, min_rounds=min_rounds),
                seed=self._plan.seed,
                before=lambda arm: self._at_work(reference if arm is again else arm, rows),
                failed=lambda arm, error: self._lose(arm, error, rows),
                after=stream.take,
                catch=BaseException,  # this process is the worker's own: sys.exit() in a call is a failure of its row
            )
        finally:
            stream.flush()
            for arm in arms:
                self._tell_of(arm)

    def _at_work(self, arm: Arm, rows: set[int]) -> None:
        if id(arm) in rows:
            self._teller.at_work(arm.name)
        else:
            self._teller.at_rest()

    def _lose(self, arm: Arm, error: BaseException, rows: set[int]) -> None:
        if id(arm) in rows:
            self._fail(arm.name, error)
        else:
            self._teller.say(f"{arm.name} could not be measured any further: {in_a_line(error)}")

    def _tell_of(self, arm: Arm) -> None:
        """Tells what else an arm knows when the rounds are over."""

    def _fail(self, name: str, error: BaseException) -> None:
        """Ends a row; raises DeviceUncertain where the device or the inputs may be broken for the others too."""
        self._teller.end_row(name, "failed", in_a_line(error))
        broken = self._backend == "cuda" and isinstance(error, RuntimeError)
        if broken or isinstance(error, InputsOverwrittenError):
            self._teller.emit(on.WorkerUnusable(case=self._teller.case))
            raise DeviceUncertain from error


class SampleStream:
    """Collects the rounds' samples and tells them a few times a second, so that telling does not disturb the clock."""

    def __init__(self, teller: Teller, lasts_s: float) -> None:
        """Take the teller, and the seconds that the rounds may last; MLX's peak memory is counted from here on."""
        import mlx.core as mx

        self._teller = teller
        self._ends = time.perf_counter() + lasts_s
        self._told: dict[str, int] = {}
        self._arms: list[Arm] = []
        self._last = time.perf_counter()
        mx.reset_peak_memory()

    def take(self, arms: list[Arm]) -> None:
        """Takes in what the arms hold after a round; tells it if it is time to."""
        self._arms = list(arms)
        if time.perf_counter() - self._last >= TELL_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Tells what has not been told."""
        import mlx.core as mx

        self._last = time.perf_counter()
        fresh = {arm.name: _sendable(arm.samples[self._told.get(arm.name, 0) :]) for arm in self._arms}
        self._told = {arm.name: len(arm.samples) for arm in self._arms}
        if any(fresh.values()):
            rounds = max(self._told.values())
            active, peak = mx.get_active_memory(), mx.get_peak_memory()
            event = on.RoundsDone(case=self._teller.case, samples=fresh, active_bytes=active, peak_bytes=peak)
            self._teller.emit(event)
            self._teller.progress(f"round {rounds}", max(0.0, self._ends - self._last))


def _sendable(samples: Sequence[float]) -> list[float | None]:
    """Samples as JSON has them: None for NaN."""
    return [None if math.isnan(sample) else sample for sample in samples]
