"""Benchmark attention shapes: measure every implementation on each case and emit events."""

from statistics import median
from typing import TYPE_CHECKING, Final, cast

from attention import implementations
from attention.core import events as on
from attention.core.errors import error_line
from attention.core.plan import Plan
from attention.core.results import MIN_ROUNDS
from attention.core.route import Route, validated_route
from attention.core.workload import Counterpart, Workload
from attention.engine.case_runner import CaseRunner, shortage_text
from attention.engine.peaks import measure_peaks
from attention.engine.progress import MAX_COUNTERPART_SHARE, costliest_cases
from attention.measure.device import Device, environment, probe
from attention.measure.rounds import Arm, Runner, shared_calls

if TYPE_CHECKING:
    from attention.engine.prepare import CaseSetting
    from attention.engine.ranks import RankCalls

TARGET_ROUNDS: Final = 400
"""Target number of rounds. Many short samples beat few long ones: both of a pair then see the same machine state."""
MIN_SAMPLE_S: Final = 0.005
MAX_SAMPLE_S: Final = 0.1
PREVIEW_S: Final = 1.0
SHARE_OF_SLOWEST: Final = 0.05
"""Minimum length of fast calls' samples, as a share of the slowest call: cheap, and it reduces their noise."""


class Bench(CaseRunner[Plan]):
    """The part of a run over attention shapes that one worker executes."""

    def measure_cost(self) -> None:
        """Time a call of each implementation on the costliest case of each kind, or on a smaller one if that is long.

        What would be refused is reported as in a run; what has to be compiled first is not timed.
        """
        from attention.engine.cost import time_calls

        self._backend = (device := probe()).backend
        self._load_implementations()
        self._progress.emit(on.RunStarted(environment=environment(device)))
        for case in costliest_cases(self._plan.cases):
            self._progress.begin_case(case)
            workload = self._plan.cases[case]
            names = [name for name in self._plan.ordered if self._admit(name, workload, device)]
            ready = [name for name in names if not self._needs_building(name, workload, device)]
            time_calls(ready, workload, self._plan.seed, self._progress)
            self._progress.end_case("cost")
        self._progress.emit(on.RunDone())

    def _load_implementations(self) -> None:
        super()._load_implementations()
        import attention.engine.prepare
        import attention.measure.accuracy  # noqa: F401 - with the rest, before this worker takes a turn

    def _prepare_all(self, device: Device) -> None:
        if self._member:
            self._progress.log(f"{self._ranks} ranks with {self._member.conditions.text}")
        if self._assignment.peaks is None:
            self._measure_peaks(device)

    def _on_tuning_event(self, event: on.TuningEvent | on.Message) -> None:
        """Emit the event; after a switch also the route now in use."""
        super()._on_tuning_event(event)
        if isinstance(event, on.Switched):
            workload = self._plan.cases[self._progress.case]
            route = self._route(implementations.load_implementation(event.implementation), workload, probe())
            found = on.RouteFound(case=self._progress.case, implementation=event.implementation, route=route)
            self._progress.emit(found)

    def _measure_peaks(self, device: Device) -> None:
        if self._in_turns:
            return
        self._progress.emit_progress("measuring peak rates")
        self._progress.emit(on.PeaksMeasured(peaks=measure_peaks(device)))

    def _run_case(self, case: int) -> str:
        workload = self._plan.cases[case]
        device = probe()  # what is free now, not when the run began
        names = [name for name in self._assignment.remaining(case) if self._admit(name, workload, device)]
        if not names:
            return "nothing to run"
        setting = self._make_shared(names, lambda: self._setting(workload, device, len(names)))
        if setting is None:
            return "failed"
        slow = [name for name in names if self._needs_building(name, workload, device)]
        if slow:
            if self._member is None and not self._in_turns:
                self._preview([name for name in names if name not in slow], setting)
            self._build(slow, workload, device)
            self._measure_peaks(device)  # a new kernel may reach a higher one
            self._progress.begin_case(case)  # all are measured together again
        arms = self._arms(names, setting)
        if not arms:
            return "failed"
        beside = self._counterpart_arms(arms, setting)
        self._set_calls([*arms, *beside], setting)
        stopped_by = self._run_rounds(arms, self._plan.seconds, beside)
        self._check_again(setting)
        self._measure_energy(device)
        return stopped_by

    def _admit(self, name: str, workload: Workload, device: Device) -> bool:
        """Query an implementation's route; end its row if the case is unsupported or will not fit in memory."""
        route = self._supported_route(name, workload, device)
        if route is None:
            return False
        shortage = self._shortage(workload, route, device)
        if shortage is not None:
            self._progress.end_row(name, "refused", shortage)
        return shortage is None

    def _shortage(self, workload: Workload, route: Route, device: Device) -> str | None:
        """Return that a case needs more memory than there is, unless the run is forced, or None."""
        needed = workload.held_bytes + (route.predicted_bytes or 0)
        limit = self._plan.memory_limit_bytes or device.available_bytes
        return shortage_text(needed, limit) if needed > limit and not self._plan.force else None

    def _preview(self, ready: list[str], setting: "CaseSetting") -> None:
        """Report provisional speeds of the ready implementations while the others compile; not part of the result."""
        arms = self._arms(ready, setting)
        if arms:
            self._set_calls(arms, setting)
            self._run_rounds(arms, PREVIEW_S, min_rounds=1, then_s=self._progress.case_s)
        seen = {arm.name: setting.workload.tokens / median(arm.valid_samples) for arm in arms if arm.valid_samples}
        if seen:
            rates = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in seen.items())
            self._progress.log(f"a first look: {rates}; the others are being built")

    def _setting(self, workload: Workload, device: Device, count: int) -> "CaseSetting":
        from attention.engine.prepare import CaseSetting, SharedInputs
        from attention.implementations.calls import make_inputs
        from attention.measure.accuracy import AccuracyChecker

        inputs = make_inputs(workload, self._plan.seed)
        before = workload.counterparts.get("unquantized")
        unquantized = [inputs[0], *make_inputs(before, self._plan.seed)[1:]] if before else None
        sample_s = self._plan.seconds / (TARGET_ROUNDS * (count + 1))
        return CaseSetting(
            workload=workload,
            device=device,
            inputs=SharedInputs(inputs),
            unquantized=SharedInputs(unquantized) if unquantized else None,
            accuracy=AccuracyChecker(workload, inputs, unquantized=unquantized),
            sample_s=min(max(sample_s, MIN_SAMPLE_S), MAX_SAMPLE_S),
            progress=self._progress,
            route=lambda implementation: self._route(implementation, workload, device),
            bind=self._bind_on_ranks if self._member else None,
            latencies=not self._in_turns,
        )

    def _bind_on_ranks(self, name: str) -> "RankCalls":
        """Bind an implementation to the case's inputs on all ranks."""
        from attention.engine.ranks import RankCalls

        assert self._member is not None
        return RankCalls(self._member, self._progress.case, name, self._plan.ordered)

    def _arms(self, names: list[str], setting: "CaseSetting") -> list[Arm]:
        return [arm for name in names if (arm := self._prepare(name, setting)) is not None]

    def _set_calls(self, arms: list[Arm], setting: "CaseSetting") -> None:
        """Set the number of calls per sample of all arms that are sampled together."""
        slowest_s = max((arm.call_s for arm in arms), default=0.0)
        sample_s = max(setting.sample_s, min(SHARE_OF_SLOWEST * slowest_s, MAX_SAMPLE_S))
        numbers = shared_calls([arm.call_s for arm in arms], sample_s, setting.workload.output_bytes)
        for arm, calls in zip(arms, numbers, strict=True):
            arm.calls = calls

    def _counterpart_arms(self, arms: list[Arm], setting: "CaseSetting") -> list[Arm]:
        """Return the arms of a case's counterparts, where they fit and are not too slow.

        They are sampled in the same rounds, so that the speedups over dense and over unquantized are paired.
        """
        from attention.engine.prepare import prepare_counterpart

        made = []
        for counterpart, workload in setting.workload.counterparts.items():
            for arm in arms:
                implementation = implementations.load_implementation(arm.name)
                obstacle = self._counterpart_obstacle(arm, counterpart, setting)
                if obstacle is None:
                    try:
                        if self._needs_building(arm.name, workload, setting.device):
                            self._build([arm.name], workload, setting.device)
                        made.append(prepare_counterpart(arm.name, implementation, counterpart, setting))
                    except Exception as error:
                        obstacle = error_line(error)
                if obstacle is not None:
                    self._progress.log(f"{arm.name}: no speedup over {counterpart}: {obstacle}")
        return made

    def _counterpart_obstacle(self, arm: Arm, counterpart: Counterpart, setting: "CaseSetting") -> str | None:
        """Return why an implementation is not measured on a counterpart, or None."""
        workload = setting.workload.counterparts[counterpart]
        route = validated_route(implementations.load_implementation(arm.name).route(workload, setting.device))
        if not route.supported:
            return route.reason
        shortage = self._shortage(setting.workload, route, setting.device)
        if shortage is not None:
            return shortage
        call_s = arm.call_s * workload.pairs / max(1, setting.workload.pairs) if route.fused else arm.call_s
        call_s *= setting.workload.ranks / workload.ranks
        if MIN_ROUNDS * call_s > MAX_COUNTERPART_SHARE * self._plan.seconds and not self._plan.force:
            return f"a call takes about {call_s:.2g} s, too long for the {self._plan.seconds:g} s of a case"
        return None

    def _prepare(self, name: str, setting: "CaseSetting") -> Arm | None:
        from attention.engine.prepare import prepare

        try:
            return prepare(name, implementations.load_implementation(name), setting)
        except BaseException as error:  # sys.exit() in a call is a failure of its row
            self._fail(name, error)
            return None

    def _check_again(self, setting: "CaseSetting") -> None:
        """Compare a later call of each sampled implementation whose first one was accurate."""
        from attention.engine.prepare import check_again

        for arm in [each for each in self._sampled if each.name not in setting.inaccurate]:
            try:
                runner = cast("Runner", arm.runner)  # as `prepare` bound it
                check_again(arm.name, implementations.load_implementation(arm.name), runner, setting)
            except BaseException as error:  # as in `_prepare`
                self._sampled.remove(arm)
                self._fail(arm.name, error)
        self._progress.mark_idle()

    def _emit_arm_results(self, arm: Arm) -> None:
        """Record samples of single calls as latencies: the only ones for slow calls, the more reliable for others."""
        if arm.calls == 1 and arm.valid_samples:
            seconds = median(arm.valid_samples)
            self._progress.emit(on.LatencyMeasured(case=self._progress.case, implementation=arm.name, seconds=seconds))
