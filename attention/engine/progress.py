"""Progress of a worker: its events, the marker of the running implementation, and the estimated time left."""

import time
from collections.abc import Callable, Sequence
from typing import Final

from attention.core import events as on
from attention.core.plan import AnyPlan
from attention.core.results import MIN_ROUNDS
from attention.core.workload import Workload

Emit = Callable[[on.AnyEvent], None]
EMIT_INTERVAL_S: Final = 0.25
PREPARATION_SHARE: Final = 0.6
"""Assumed time of a case outside calls and rounds, as a share of its rounds, until a case has been measured."""
CALLS_OUTSIDE_ROUNDS: Final = 8
"""Calls of an implementation on a case outside its rounds: first, accuracy, memory, warm-up, latency."""
COUNTERPART_CALLS_OUTSIDE_ROUNDS: Final = 2
"""The same on a counterpart of the case: first, warm-up."""
MAX_COUNTERPART_SHARE: Final = 4.0
"""Calls on a counterpart are sampled if the fewest of them take at most this multiple of a case's time."""


def counterpart_calls(call_s: Sequence[float], case: object, seconds: float) -> list[float]:
    """Return the seconds of the calls on a case's counterparts that are sampled in its rounds, from their pairs.

    Args:
        call_s: seconds per call of each implementation on the case.
        case: the case; only workloads of attention have counterparts.
        seconds: time limit of the rounds.
    """
    if not isinstance(case, Workload):
        return []
    factors = [case.ranks / each.ranks * each.pairs / max(1, case.pairs) for each in case.counterparts.values()]
    beside = [each * factor for factor in factors for each in call_s]
    return [each for each in beside if MIN_ROUNDS * each <= MAX_COUNTERPART_SHARE * seconds]


def rounds_s(call_s: Sequence[float], seconds: float, beside_s: Sequence[float] = ()) -> float:
    """Estimate the seconds of a case's rounds; the reference (the first) is sampled twice in each."""
    return max(seconds, MIN_ROUNDS * (sum(call_s) + sum(call_s[:1]) + sum(beside_s)))


def case_s(call_s: Sequence[float], seconds: float, beside_s: Sequence[float] = ()) -> float:
    """Estimate the seconds of a case's calls: those before its rounds, and the rounds.

    Args:
        call_s: seconds per call of each implementation; the first is the reference.
        seconds: time limit of the rounds; at least MIN_ROUNDS are made however long they take.
        beside_s: seconds per call on the case's counterparts, see `counterpart_calls`.
    """
    outside = CALLS_OUTSIDE_ROUNDS * sum(call_s) + COUNTERPART_CALLS_OUTSIDE_ROUNDS * sum(beside_s)
    return outside + rounds_s(call_s, seconds, beside_s)


def timing_group(case: object) -> str:
    """Return a key of cases whose call times predict each other: "float16 forward"; one key for all other cases."""
    if not isinstance(case, Workload):
        return ""
    return f"{case.dtype} {case.pass_} {case.kv_format}" if case.quantized else f"{case.dtype} {case.pass_}"


class Forecast:
    """Estimate how long the cases of a run take, from the times of calls so far.

    A case without any data is assumed to take the seconds of its rounds and of the preparation.
    """

    def __init__(self, plan: AnyPlan) -> None:
        self._plan = plan
        self._s_per_flop: dict[tuple[str, str], float] = {}
        """Seconds of a call per unit of a case's size, by kind and implementation."""
        self._dropped: set[tuple[int, str]] = set()
        self._overhead_s: list[float] = []
        """Seconds of each complete case beyond calls and rounds: below zero where rounds ended early."""

    def record_call(self, case: int, name: str, seconds: float) -> None:
        """Record the time of a call."""
        self._s_per_flop[timing_group(self._plan.cases[case]), name] = seconds / self._size(case)

    def record_case(self, case: int, seconds: float) -> None:
        """Record the time of a case."""
        self._overhead_s.append(seconds - self._calls_s(case))

    def drop(self, case: int, name: str) -> None:
        """Record that an implementation has left a case."""
        self._dropped.add((case, name))

    def case_s(self, case: int) -> float:
        """Return the estimated seconds of a case."""
        further = self._overhead_s or [PREPARATION_SHARE * self._plan.seconds]
        return max(0.0, self._calls_s(case) + sum(further) / len(further))

    def rounds_s(self, case: int) -> float:
        """Return the estimated seconds of a case's rounds."""
        calls, seconds = self._calls(case), self._plan.seconds
        return rounds_s(calls, seconds, counterpart_calls(calls, self._plan.cases[case], seconds))

    def _calls_s(self, case: int) -> float:
        calls, seconds = self._calls(case), self._plan.seconds
        return case_s(calls, seconds, counterpart_calls(calls, self._plan.cases[case], seconds))

    def _calls(self, case: int) -> list[float]:
        """Return the seconds of a call of each implementation; an unknown one counts as the mean of the others."""
        names = [name for name in self._plan.ordered if (case, name) not in self._dropped]
        of_kind = timing_group(self._plan.cases[case])
        known = [self._s_per_flop[of_kind, name] for name in names if (of_kind, name) in self._s_per_flop]
        if not known:
            return []
        mean = sum(known) / len(known)
        return [self._s_per_flop.get((of_kind, name), mean) * self._size(case) for name in names]

    def _size(self, case: int) -> float:
        work = self._plan.cases[case]
        return max(1.0, work.flops) if isinstance(work, Workload) else 1.0


class Progress:
    """Report the progress of a worker.

    Attributes:
        emit: sends an event.
    """

    def __init__(self, plan: AnyPlan, first_case: int, emit: Emit, mark: Callable[[int], None]) -> None:
        """Create it with the plan, the first case, the sink for events and the marker of the running implementation."""
        self.emit = emit
        self._mark = mark
        self._numbers = {name: number for number, name in enumerate(plan.ordered, 1)}
        self._cases = len(plan.cases)
        self._case = self._first = first_case
        self._started = self._case_started = time.perf_counter()
        self._forecast = Forecast(plan)

    def begin_case(self, case: int) -> None:
        """Report that a case begins."""
        self._case, self._case_started = case, time.perf_counter()
        self.emit(on.CaseStarted(case=case))

    def end_case(self, stopped_by: str) -> None:
        """Report that the case is complete, and update the estimates of the other cases."""
        self.mark_idle()
        self.emit(on.CaseDone(case=self._case, stopped_by=stopped_by))
        self._forecast.record_case(self._case, time.perf_counter() - self._case_started)

    def mark_running(self, name: str) -> None:
        """Record which implementation is running, so that a crash is attributed to it."""
        self._mark(self._numbers[name])

    def mark_idle(self) -> None:
        """Record that no implementation is running."""
        self._mark(0)

    def begin_step(self, name: str, step: on.Step) -> None:
        """Report that an implementation begins a step of the case."""
        self.mark_running(name)
        self.emit(on.StepStarted(case=self._case, implementation=name, step=step))
        self.emit_progress(f"{name}: {step}")

    def log(self, text: str) -> None:
        """Report a log message."""
        self.emit(on.Message(level="info", text=text))

    def end_row(self, name: str, status: on.Ending, reason: str) -> None:
        """Report that an implementation's row has ended without result."""
        self._forecast.drop(self._case, name)
        self.emit(on.RowEnded(case=self._case, implementation=name, status=status, reason=reason))

    def record_call_s(self, name: str, seconds: float) -> None:
        """Record the time of an implementation's call on this case, for the estimate of the time left."""
        self._forecast.record_call(self._case, name, seconds)

    def emit_progress(self, now: str, remaining_s: float | None = None) -> None:
        """Report what runs now and the progress of the run; `remaining_s`: the time left of the case, if known."""
        passed = time.perf_counter()
        if remaining_s is None:  # before the rounds, all of which are still to come
            elapsed = passed - self._case_started
            remaining_s = max(self._forecast.case_s(self._case) - elapsed, self._forecast.rounds_s(self._case))
        left = remaining_s + sum(self._forecast.case_s(case) for case in range(self._case + 1, self._cases))
        before = self._first / self._cases
        share = (passed - self._started) / (passed - self._started + left) if left else 1.0
        done = before + (1 - before) * share
        self.emit(on.Progress(done=min(done, 0.99), remaining_s=left, now=now))

    @property
    def case(self) -> int:
        """Index of the current case."""
        return self._case
