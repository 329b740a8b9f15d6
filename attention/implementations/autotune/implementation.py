"""The autotuner: picks the fastest candidate per workload class on first use, stores it, and monitors it in use."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal

import mlx.core as mx
from msgspec import structs

from attention.core import events as on
from attention.core.bounded_dict import BoundedDict
from attention.core.route import NO_NEEDS, Needs, Route, fitted
from attention.core.workload import Workload
from attention.implementations.autotune.active_choice import (
    ActiveChoice,
    active_choice_of,
    inherited_choice,
)
from attention.implementations.autotune.drift_detector import DriftDetector
from attention.implementations.autotune.halving import MIN_TIME_S
from attention.implementations.autotune.store import (
    Store,
    TrialResult,
    WorkloadClass,
    candidate_fingerprint,
    class_of,
    longest,
)
from attention.implementations.autotune.trial import (
    APPROXIMATE,
    NAME,
    SMALLEST_CANDIDATE,
    AccuracyCheck,
    BoundCall,
    Task,
    Trial,
    candidates,
    fitting_candidates,
)
from attention.implementations.calls import MlxRunner, call_signature, current_backend, record_path, try_evaluate
from attention.implementations.error_budget import BudgetExceededError, ErrorBudget, ErrorUnknownError
from attention.implementations.fp8 import PocFp8
from attention.implementations.fused import Poc
from attention.implementations.protocol import Implementation, build, needs_building
from attention.masks import Mask, of_workload
from attention.measure.device import Device, probe
from attention.measure.rounds import Clock
from attention.quantized_kv import kv_format_of

SAMPLES_PER_CHECK: Final = 8
"""One in this many samples is observed by the tuner: a few microseconds in each sample would distort the result."""
TRY_S: Final = 0.0003
"""Approximate seconds of a group of an alternative's calls: long compared with a wait for the device, short compared
with a sample."""


NOT_TRIED: Final = "not tried yet"
"""The path of a class of workloads before its trial."""


class DemoRunner(MlxRunner):
    """Repeat the tuned choice; monitor it with the samples of the run, so that nothing extra is evaluated."""

    def __init__(self, demo: "Demo", task: Task) -> None:
        """Bind the call; runs a trial if there was none."""
        super().__init__(demo, task.workload, task.inputs, task.scale)
        self._demo = demo
        self._task = task
        self._active = demo.active_choice(task)
        demo.check_budget(self._active, task)
        self._implementation = self._active.call
        self._monitoring = True
        self._began: float | None = None
        self._usual = self._waits = self._calls = 0
        self._few = 1

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs of all queued calls; then try a challenger, within the share of calls allowed."""
        super().wait(outputs)
        calls = len(outputs) if isinstance(outputs[0], list) else 1
        self._calls += calls
        self._waits += 1
        if self._began is not None:
            self._observe_sample((self._demo.clock() - self._began) / calls, calls)
            self._began = None
        if self._waits % SAMPLES_PER_CHECK == 0:
            self.queue = self._queue_timed  # type: ignore[method-assign]

    def _queue_timed(self) -> list[mx.array]:
        """Queue the first call of an observed sample; the calls of other samples bypass this method altogether."""
        del self.queue
        self._began = self._demo.clock()
        return self.queue()

    def _observe_sample(self, call_s: float, count: int) -> None:
        """Record the time of one call of a sample, and the sample's number of calls."""
        active = self._active
        active.calls, self._calls = active.calls + self._calls, 0
        if count != self._usual:
            self._usual = count
            active.drift.reset_usual()
        active.drift.observe(call_s)
        # Both halves of a pair are extra calls, beyond those of the run.
        self._few = max(1, min(count, round(TRY_S / max(call_s, MIN_TIME_S))))
        if self._monitoring and active.drift.may_try(active.calls // (2 * self._few)):
            self._demo.attempt_pair(active, self._try, self._task, queued=self._few > 1)
        self._implementation = active.call

    def peak_bytes(self) -> int | None:
        """Return the peak memory of the choice alone, in bytes."""
        self._monitoring = False
        try:
            return super().peak_bytes()
        finally:
            self._monitoring = True

    def _try(self, candidate: Implementation) -> None:
        """Run a few calls of a candidate, queued together like those of a sample."""
        runner = BoundCall(candidate, self._task)
        runner.wait([runner.queue() for _ in range(self._few)])


TRIAL_S: Final = 0.5
MIN_CALLS_IN_USE: Final = 64
"""Calls after which a class counts as in use: a neighbouring class then inherits its choice without a trial."""


class Demo:
    """Benchmark `poc`, `practical`, MLX SDPA plain and compiled, and `baseline`; use the fastest and monitor it.

    A call cannot know whether its gradient will be needed, so calls are tuned as forward passes;
    `Demo(pass_="training")` tunes forward and backward together.
    """

    name = NAME
    takes_patterns = takes_alibi = takes_quantized = takes_max_error = True

    def __init__(
        self,
        *,
        pass_: Literal["forward", "training"] = "forward",
        among: Mapping[str, Implementation] | None = None,
        store: Store | None = None,
        budget_s: float = TRIAL_S,
        clock: Clock = time.perf_counter,
        max_error: float | None = None,
    ) -> None:
        """Start with no workload tuned.

        Args:
            pass_: the pass that calls are tuned for.
            among: the exact candidates by name; all of them by default.
            store: where results of trials are stored; the user's file by default.
            budget_s: seconds of a trial.
            clock: in seconds.
            max_error: error budget of all calls, see `attention()`; with one, approximate candidates are tried too.
        """
        self._max_error = max_error
        self._budget = None if max_error is None else ErrorBudget(APPROXIMATE, max_error)
        self._within = BoundedDict[float, Demo](16)
        self.candidates = dict(candidates() if among is None else among)
        if max_error is not None:
            self.candidates.setdefault(APPROXIMATE, PocFp8())
        self.store = store or Store()
        self._untried = Poc()
        self._pass = pass_
        self._budget_s = budget_s
        self.clock = clock
        self._keys = BoundedDict[object, ActiveChoice]()
        self._classes: dict[WorkloadClass, ActiveChoice] = {}

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route of the tuned choice; before a trial, the route used where no trial can be made.

        ALiBi and the logsumexp are not tried: `poc` computes them.
        """
        if needs.alibi or needs.logsumexp:
            route = self._untried.route(workload, device, needs)
            return structs.replace(route, reason=f"ALiBi and the logsumexp are not tried; {route.reason}")
        active = self._stored_choice(
            self._class(workload, device, needs), lambda: self._fitting(workload, device, needs)
        )
        if active is None:
            route = self.candidates[self._default_candidate(workload, device, needs)].route(workload, device, needs)
            names = ", ".join(self._fitting(workload, device, needs))
            return structs.replace(route, path=NOT_TRIED, reason=f"takes the fastest on first use: tries {names}")
        route = self.candidates[active.name].route(workload, device, needs)
        return structs.replace(route, path=_path(active.name), reason=f"fastest in a trial; {route.reason}")

    def __call__(
        self,
        q: mx.array,
        k: Any,
        v: Any,
        *,
        scale: float,
        mask: Mask,
        softcap: float | None = None,
        max_error: float | None = None,
    ) -> mx.array:
        """Compute attention; shapes as in the protocol, `max_error` as in `attention()`.

        If the call is being traced and its class is not tuned yet, the trial runs during tracing, on random inputs.
        Traced calls are not timed.
        """
        if max_error is not None and max_error != self._max_error:
            return self.within(max_error)(q, k, v, scale=scale, mask=mask, softcap=softcap)
        untried = mask.alibi is not None
        if not isinstance(k, mx.array):  # a training pass with quantized ones is no workload
            untried |= self._pass == "training"
        if untried:
            return self._untried(q, k, v, scale=scale, mask=mask, softcap=softcap)
        key = _key(q, k, v, mask, softcap)
        active = self._keys.get(key)
        if active is None:
            active = self._admit(key, q, k, v, scale, mask, softcap)
        active.calls += 1
        if active.calls >= active.next_check:
            name, out = active.name, self._sampled_call(active, q, k, v, scale, mask, softcap)
        else:
            name, out = active.name, active.call(q, k, v, scale=scale, mask=mask, softcap=softcap)
        if name == APPROXIMATE and self._budget is not None:
            name, out = self._checked(self._budget, active, out, q, k, v, scale, mask)
        record_path(_path(name))
        return out

    def _checked(
        self,
        budget: ErrorBudget,
        active: ActiveChoice,
        out: mx.array,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        mask: Mask,
    ) -> tuple[str, mx.array]:
        """Return the approximate result, or that of the best exact candidate if its error is above the budget.

        If the error is unknown because the call is traced, this call alone goes to the exact candidate.
        """
        workload, needs = call_signature(q, k, v, mask, None)
        try:
            budget.check(workload, (q, k, v), scale, out)
        except ErrorUnknownError as unknown:
            name = next(iter(active.alternatives), None) or self._default_candidate(workload, probe(), needs)
            text = f"{NAME} goes to {name} in a traced call of {active.workload.label}: {unknown}"
            on.emit_tuning(on.Message(level="info", text=text))
            return name, self.candidates[name](q, k, v, scale=scale, mask=mask)
        except BudgetExceededError as excess:
            active.give_up(self.candidates, self._default_candidate(workload, probe(), needs))
            text = f"{NAME} goes to {active.name} for {active.workload.label}: {excess}"
            on.emit_tuning(on.Message(level="warning", text=text))
            return active.name, active.call(q, k, v, scale=scale, mask=mask)
        return APPROXIMATE, out

    def check_budget(self, active: ActiveChoice, task: Task) -> None:
        """Compare a task's approximate result with float64 once; if its error is above the budget, give it up."""
        if active.name == APPROXIMATE and self._budget is not None:
            q, k, v = task.inputs[:3]
            out = active.call(q, k, v, scale=task.scale, mask=task.mask)
            self._checked(self._budget, active, out, q, k, v, task.scale, task.mask)

    def within(self, max_error: float) -> "Demo":
        """Return the tuner of calls with an error budget; it shares the store."""
        if max_error not in self._within:
            self._within[max_error] = Demo(
                pass_=self._pass,
                among=self.candidates,
                store=self.store,
                budget_s=self._budget_s,
                clock=self.clock,
                max_error=max_error,
            )
        return self._within[max_error]

    def with_logsumexp(
        self, q: mx.array, k: Any, v: Any, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> tuple[mx.array, mx.array]:
        """Compute attention and the logsumexp of its rows, as in `ReturnsLogsumexp`."""
        return self._untried.with_logsumexp(q, k, v, scale=scale, mask=mask, softcap=softcap)

    def is_tuned(self, workload: Workload, device: Device) -> bool:
        """Whether a call would not have to try candidates first."""
        return self.route(workload, device).path != NOT_TRIED

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Return whether a candidate has to be compiled before a trial is fair."""
        return any(needs_building(one, workload, device) for one in self.candidates.values())

    def build_for(self, workload: Workload, on_message: Callable[[str], None]) -> None:
        """Compile what a trial of the workload would call."""
        for one in self.candidates.values():
            build(one, workload, on_message)

    def for_training(self) -> "Demo":
        """Return a tuner for training calls that shares the store and the choices of this one."""
        other = Demo(
            pass_="training",
            among=self.candidates,
            store=self.store,
            budget_s=self._budget_s,
            clock=self.clock,
            max_error=self._max_error,
        )
        other._classes = self._classes
        return other

    def runner(self, workload: Workload, inputs: Sequence[Any], scale: float) -> MlxRunner:
        """Return a bound call; a trial of the workload's pass, if needed, runs now, before anything is timed."""
        return DemoRunner(self, self._task(workload, [*inputs], scale, of_workload(workload), None))

    def tune(self, task: Task) -> TrialResult:
        """Run a trial on a task, even if its class is tuned already, and store the result.

        Raises:
            RuntimeError: no candidate could be run.
        """
        device = probe()
        task = task.with_informative_inputs(device.available_bytes // 2)
        for one in self.candidates.values():
            if needs_building(one, task.workload, device):
                build(one, task.workload, lambda text: on.emit_tuning(on.Message(level="info", text=text)))
        names = self._fitting(task.workload, device, task.needs)
        workload = self._class(task.workload, device, task.needs)
        trial = Trial(workload, task, budget_s=self._budget_s, device=device, clock=self.clock, now=self.store.now)
        entry = trial.run({name: self.candidates[name] for name in names})
        self.store.put(entry)
        active = self._classes[workload] = active_choice_of(entry, self.candidates)
        active.warm = set(entry.call_s)
        return entry

    def active_choice(self, task: Task) -> ActiveChoice:
        """Return the choice for a task; runs a trial if there was none."""
        device = probe()
        workload = self._class(task.workload, device, task.needs)
        known = self._stored_choice(workload, lambda: self._fitting(task.workload, device, task.needs))
        if known is None:
            self.tune(task)
            known = self._classes[workload]
        return known

    def attempt_pair(
        self, active: ActiveChoice, run: Callable[[Implementation], Any], task: Task, *, queued: bool
    ) -> None:
        """Time the choice against its challenger once, if there is one; `queued`: `run` runs several queued calls."""
        challenger = active.drift.challenger
        if challenger is not None:
            active.timed_pair(challenger, run, AccuracyCheck(task).error, self.candidates, self.clock, queued=queued)

    def _class(self, workload: Workload, device: Device, needs: Needs) -> WorkloadClass:
        return class_of(workload, device, needs, self._max_error)

    def _fitting(self, workload: Workload, device: Device, needs: Needs) -> list[str]:
        """Return the candidates that fit the longest lengths of the workload's class."""
        return fitting_candidates(self.candidates, longest(workload), device, needs)

    def _stored_choice(self, workload: WorkloadClass, fitting: Callable[[], Sequence[str]]) -> ActiveChoice | None:
        """Return the choice known to this process, or the stored one.

        A stored choice counts only if the code of the candidates is unchanged and every fitting candidate was tried.
        """
        active = self._classes.get(workload)
        if active is not None:
            return active
        entry = self.store.get(workload)
        if entry is None or entry.made_with != candidate_fingerprint():
            return None
        fit = fitting()
        if entry.winner not in fit or set(fit) - {*entry.call_s, *entry.untried}:
            return None
        return self._classes.setdefault(workload, active_choice_of(entry, self.candidates))

    def _admit(
        self, key: object, q: mx.array, k: Any, v: Any, scale: float, mask: Mask, softcap: float | None
    ) -> ActiveChoice:
        """Find the choice for a kind of call not seen before; slow, done once per kind."""
        signature, needs = call_signature(q, k, v, mask, softcap)
        workload = structs.replace(signature, pass_=self._pass)
        device = probe()
        fit = self._fitting(workload, device, needs)
        found = self._class(workload, device, needs)
        active = self._stored_choice(found, lambda: fit)
        if active is None:
            active = self._new_choice(found, self._task(workload, [q, k, v], scale, mask, softcap), fit, device)
        if active is None or active.name not in fit:
            name = self._default_candidate(workload, device, needs)
            plain = ActiveChoice(
                workload=found, name=name, call=self.candidates[name], alternatives={}, drift=DriftDetector({})
            )
            if active is None:
                return plain  # too large for a trial while tracing: the next call may find values to try with
            active = plain
        self._keys[key] = active
        return active

    def _task(self, workload: Workload, inputs: list[Any], scale: float, mask: Mask, softcap: float | None) -> Task:
        """Return a call as a task of a trial, within the error budget if there is one."""
        return Task(
            workload=workload, inputs=inputs, scale=scale, mask=mask, softcap=softcap, max_error=self._max_error
        )

    def _new_choice(self, found: WorkloadClass, task: Task, fit: Sequence[str], device: Device) -> ActiveChoice | None:
        """Choose for an unknown class: a neighbouring class's choice, or the result of a trial."""
        if not try_evaluate(*task.inputs, task.mask.array):
            stand_in = task.synthetic(device.available_bytes // 2)
            if stand_in is None:
                return None
            self.tune(stand_in)
            return self._classes[found]
        for neighbour in reversed(self._classes.values()):
            if neighbour.calls >= MIN_CALLS_IN_USE and neighbour.name in fit and neighbour.workload.next_to(found):
                active = self._classes[found] = inherited_choice(neighbour, found, fit)
                return active
        self.tune(task.with_cotangent())
        return self._classes[found]

    def _sampled_call(
        self,
        active: ActiveChoice,
        q: mx.array,
        k: Any,
        v: Any,
        scale: float,
        mask: Mask,
        softcap: float | None,
    ) -> mx.array:
        """Make a call; time it if its inputs are not traced and a timing is due."""
        began = self.clock()
        due = active.is_due(began)

        def attempt(candidate: Implementation) -> mx.array:
            out = candidate(q, k, v, scale=scale, mask=mask, softcap=softcap)
            mx.eval(out)
            return out

        def check_accuracy(candidate: Implementation) -> tuple[float, str]:
            workload, _ = call_signature(q, k, v, mask, softcap)
            return AccuracyCheck(self._task(workload, [q, k, v], scale, mask, softcap)).error(candidate)

        if not due or not try_evaluate(q, k, v, mask.array):
            return active.call(q, k, v, scale=scale, mask=mask, softcap=softcap)
        active.waited(self.clock() - began)
        out: mx.array = active.timed_call(attempt, check_accuracy, self.candidates, self.clock)
        return out

    def _default_candidate(self, workload: Workload, device: Device, needs: Needs) -> str:
        """Return the first fused candidate, otherwise the leanest; always an exact one."""
        exact = {name: one for name, one in self.candidates.items() if name != APPROXIMATE}
        fit = fitting_candidates(exact, workload, device, needs)
        fused = (name for name in fit if self.candidates[name].route(workload, device, needs).fused)
        return next(fused, SMALLEST_CANDIDATE if SMALLEST_CANDIDATE in self.candidates else fit[0])


@lru_cache(maxsize=256)
def _path(choice: str) -> str:
    return fitted(f"tuned: {choice}")


def _key(q: mx.array, k: Any, v: Any, mask: Mask, softcap: float | None) -> object:
    """Return the properties of a call that determine its choice; computed at every call, so it must be cheap."""
    batch, heads, seq, head_dim = q.shape
    _, kv_heads, kv_seq, _ = k.shape
    lengths = (seq - 1).bit_length(), (kv_seq - 1).bit_length()
    options = mask.causal, mask.window, mask.pattern, mask.array is not None, softcap is not None
    return (
        q.dtype,
        kv_format_of(k, v),
        batch,
        heads,
        kv_heads,
        head_dim,
        v.shape[3],
        *lengths,
        *options,
        current_backend(),
    )
