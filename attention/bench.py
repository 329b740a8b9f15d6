"""Runs an assignment: cases one after the other, every implementation on each, told as events."""

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Final

from msgspec import structs

from attention import events as on
from attention import implementations
from attention.device import Device, environment, probe
from attention.implementations.protocol import NeedsBuilding
from attention.measure.clock import shared_calls
from attention.measure.rounds import Arm, Limits, run_rounds
from attention.plan import Assignment
from attention.roofline import measure_peaks
from attention.teller import TELL_EVERY_S, Emit, Teller
from attention.tuning import news
from attention.workload import Workload

if TYPE_CHECKING:
    from attention.measure.prepare import CaseSetting

ROUNDS_WANTED: Final = 400
"""Many short samples beat few long ones: the two of a pair then find the machine in the same state."""
SHORTEST_SAMPLE_S: Final = 0.005
LONGEST_SAMPLE_S: Final = 0.1
FIRST_LOOK_S: Final = 1.0


class DeviceUncertain(RuntimeError):
    """A failure after which the device may be in an unknown state; only a new process can go on."""


class Bench:
    """One worker's share of a run."""

    def __init__(self, assignment: Assignment, emit: Emit, mark: Callable[[int], None] = lambda number: None) -> None:
        """Takes what to run, where to tell of it, and where to mark the number of the implementation at work."""
        self._assignment = assignment
        self._plan = assignment.plan
        self._teller = Teller(assignment.plan, assignment.first_case, emit, mark)

    def run(self) -> None:
        """Measures all remaining cases.

        Raises:
            UsageError, NoBackendError: nothing can run.
            DeviceUncertain: a row was told as failed, and this process must not go on.
        """
        self._backend = (device := probe()).backend
        for name in self._plan.ordered:
            implementations.get(name)
        self._teller.emit(on.RunStarted(environment=environment(device)))
        if self._assignment.peaks is None:
            self._measure_peaks(device)
        with news.heard_by(self._hear):
            for case in range(self._assignment.first_case, len(self._plan.cases)):
                self._teller.begin(case)
                self._teller.end(self._run_case(case, self._plan.cases[case]))
        self._teller.emit(on.RunDone())

    def _hear(self, event: on.TuningEvent | on.Message) -> None:
        """Passes on what an implementation that chooses among others tells of it, and the path that it takes now."""
        self._teller.emit(event)
        if isinstance(event, on.TrialStarted):
            self._teller.progress(f"{event.implementation}: tries {len(event.candidates)} candidates")
        elif isinstance(event, on.Switched):
            workload = self._plan.cases[self._teller.case]
            route = implementations.get(event.implementation).route(workload, probe())
            found = on.RouteFound(case=self._teller.case, implementation=event.implementation, route=route)
            self._teller.emit(found)

    def _measure_peaks(self, device: Device) -> None:
        self._teller.progress("what this machine can do at best")
        self._teller.emit(on.PeaksMeasured(peaks=measure_peaks(device)))

    def _run_case(self, case: int, workload: Workload) -> str:
        device = probe()  # what is free now, not when the run began
        names = [name for name in self._assignment.remaining(case) if self._is_to_run(name, workload, device)]
        if not names:
            return "nothing to run"
        self._teller.at_rest()
        try:
            setting = self._setting(workload, device, len(names))
        except Exception as error:  # no memory for the inputs, say
            for name in names:
                self._fail(name, error)
            return "failed"
        slow = [name for name in names if self._needs_building(name, workload, device)]
        if slow:
            self._first_look([name for name in names if name not in slow], setting)
            self._build(slow)
            self._measure_peaks(device)  # what was built may know a better one
            self._teller.begin(case)  # all are measured together, anew
        arms = self._arms(names, setting)
        return self._run_rounds(arms, self._plan.seconds) if arms else "failed"

    def _is_to_run(self, name: str, workload: Workload, device: Device) -> bool:
        """Asks an implementation for its route; ends its row where it does not take the case, or will not fit."""
        self._teller.at_work(name)
        try:
            route = implementations.get(name).route(workload, device)
        except Exception as error:
            self._fail(name, error)
            return False
        self._teller.emit(on.RouteFound(case=self._teller.case, implementation=name, route=route))
        if not route.supported:
            self._teller.end_row(name, "unsupported", route.reason)
            return False
        needed = workload.input_bytes + (route.predicted_bytes or 0)
        limit = self._plan.memory_limit_bytes or device.available_bytes
        if needed > limit and not self._plan.force:
            self._teller.end_row(name, "refused", f"needs {needed / 2**30:.4g} GiB of {limit / 2**30:.4g}")
            return False
        return True

    def _needs_building(self, name: str, workload: Workload, device: Device) -> bool:
        implementation = implementations.get(name)
        return isinstance(implementation, NeedsBuilding) and implementation.needs_building(workload, device)

    def _first_look(self, ready: list[str], setting: "CaseSetting") -> None:
        """Shows what the others do while there is nothing else to see; none of it enters the result."""
        arms = self._arms(ready, setting)
        if arms:
            self._run_rounds(arms, FIRST_LOOK_S)
        seen = {arm.name: setting.workload.tokens / median(arm.samples) for arm in arms if arm.samples}
        if seen:
            rates = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in seen.items())
            self._teller.say(f"a first look: {rates}; the others are being built")

    def _build(self, names: list[str]) -> None:
        """Lets implementations compile, outside every clock but their own."""
        for name in names:
            implementation = implementations.get(name)
            assert isinstance(implementation, NeedsBuilding)
            self._teller.step(name, "build")
            started = time.perf_counter()
            implementation.build(self._teller.say)
            seconds = time.perf_counter() - started
            if seconds > TELL_EVERY_S:
                self._teller.say(f"{name}: ready after {seconds:.0f} s, and kept for the next time")
        self._teller.at_rest()

    def _setting(self, workload: Workload, device: Device, count: int) -> "CaseSetting":
        from attention.implementations.runner import make_inputs
        from attention.measure.accuracy import Judge
        from attention.measure.prepare import CaseSetting

        inputs = make_inputs(workload, self._plan.seed)
        sample_s = self._plan.seconds / (ROUNDS_WANTED * (count + 1))
        return CaseSetting(
            workload=workload,
            device=device,
            inputs=inputs,
            judge=Judge(workload, inputs),
            sample_s=min(max(sample_s, SHORTEST_SAMPLE_S), LONGEST_SAMPLE_S),
            teller=self._teller,
        )

    def _arms(self, names: list[str], setting: "CaseSetting") -> list[Arm]:
        arms = [arm for name in names if (arm := self._prepare(name, setting)) is not None]
        numbers = shared_calls([arm.call_s for arm in arms], setting.sample_s, setting.workload.output_bytes)
        for arm, calls in zip(arms, numbers, strict=True):
            arm.calls = calls
        return arms

    def _prepare(self, name: str, setting: "CaseSetting") -> Arm | None:
        from attention.measure.prepare import prepare

        try:
            return prepare(name, implementations.get(name), setting)
        except Exception as error:
            self._fail(name, error)
            return None

    def _run_rounds(self, arms: list[Arm], seconds: float) -> str:
        reference = arms[0]
        again = structs.replace(reference, name=on.AGAIN, samples=[])
        self._teller.emit(on.ReferenceChosen(case=self._teller.case, implementation=reference.name))
        stream = SampleStream(self._teller)
        try:
            return run_rounds(
                [reference, again, *arms[1:]],
                Limits(seconds=seconds, precision=self._plan.precision),
                seed=self._plan.seed,
                before=lambda arm: self._teller.at_work(reference.name if arm is again else arm.name),
                failed=lambda arm, error: None if arm is again else self._fail(arm.name, error),
                after=stream.take,
            )
        finally:
            stream.flush()
            for arm in arms:
                self._tell_latency(arm)

    def _tell_latency(self, arm: Arm) -> None:
        """A sample of one call is a latency too: for slow calls the only one, for others the surer one."""
        if arm.calls == 1 and arm.samples:
            seconds = median(arm.samples)
            self._teller.emit(on.LatencyMeasured(case=self._teller.case, implementation=arm.name, seconds=seconds))

    def _fail(self, name: str, error: Exception) -> None:
        """Ends a row; raises DeviceUncertain where a failure may have broken the device for the others too."""
        first_line = next(iter(str(error).splitlines()), "")
        self._teller.end_row(name, "failed", f"{type(error).__name__}: {first_line}".rstrip(": "))
        if self._backend == "cuda" and isinstance(error, RuntimeError):
            self._teller.emit(on.WorkerUnusable(case=self._teller.case))
            raise DeviceUncertain from error


class SampleStream:
    """Collects the rounds' samples and tells them a few times a second, so that telling does not disturb the clock."""

    def __init__(self, teller: Teller) -> None:
        """Takes the voice to tell them with; MLX's peak memory is counted from here on."""
        import mlx.core as mx

        self._teller = teller
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
        fresh = {arm.name: arm.samples[self._told.get(arm.name, 0) :] for arm in self._arms}
        self._told = {arm.name: len(arm.samples) for arm in self._arms}
        if any(fresh.values()):
            rounds = max(self._told.values())
            active, peak = mx.get_active_memory(), mx.get_peak_memory()
            event = on.RoundsDone(case=self._teller.case, samples=fresh, active_bytes=active, peak_bytes=peak)
            self._teller.emit(event)
            self._teller.progress(f"round {rounds}")
