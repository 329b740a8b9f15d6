"""Progress of a worker: its events, the marker of the running implementation, and the estimated time left."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from attention.core import events as on
from attention.core.plan import AnyPlan, KnownTimes
from attention.core.results import MIN_ROUNDS
from attention.core.workload import Workload

Emit = Callable[[on.AnyEvent], None]
EMIT_INTERVAL_S: Final = 0.25
PREPARATION_SHARE: Final = 0.6
"""Assumed time of a case outside calls and rounds, as a share of its rounds, until a case has been measured."""
SET_UP_S: Final = 0.4
"""The least that is assumed for each implementation: accuracy, memory, warm-up and latency take it for any size."""
MAX_SCALE: Final = 64.0
"""A call of this many times more or fewer FLOPs than all known ones is not estimated from them."""
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


def kind_of_call(name: str, case: object) -> str:
    """Return the kind of calls that are estimated from each other: "poc float16 forward"."""
    return f"{name} {timing_group(case)}"


def scaled_call_s(
    known: Sequence[tuple[float, float]], size: float, max_scale: float = MAX_SCALE, fixed_s: float = 0.0
) -> float | None:
    """Scale the time of the known call nearest in size; None if there is none near enough.

    What a call takes at any size stays as it is, and no call takes less than a known one that is smaller.

    Args:
        known: size and seconds of calls of the same kind.
        size: FLOPs of the call.
        max_scale: how many times larger or smaller the known call may be.
        fixed_s: what a call takes at least at any size, such as a launch.
    """
    if not known or size <= 0:
        return None
    nearest, seconds = min(known, key=lambda each: abs(math.log(each[0] / size)))
    if not 1 / max_scale <= size / nearest <= max_scale:
        return None
    fixed = min(fixed_s, *(each for _, each in known))
    smaller = (each for flops, each in known if flops <= size)
    return max(fixed + (seconds - fixed) * size / nearest, *smaller, 0.0)


def costliest_cases(cases: Sequence[Workload]) -> list[int]:
    """Return the index of the case with the most FLOPs of each kind, in order."""
    found: dict[str, int] = {}
    for index, case in enumerate(cases):
        kind = timing_group(case)
        if kind not in found or case.flops > cases[found[kind]].flops:
            found[kind] = index
    return sorted(found.values())


class Forecast:
    """Estimate how long the cases of a run take, from the times of its calls so far and those known before it.

    A case without any data is assumed to take the seconds of its rounds and of the preparation. The estimate before a
    run, and the time left during it, are both made here.
    """

    def __init__(self, plan: AnyPlan, known: KnownTimes | None = None) -> None:
        """Create it for a plan; `known`: times from before the run."""
        self._plan = plan
        before = known or KnownTimes()
        self._times = {kind: dict(sizes) for kind, sizes in before.calls.items()}
        """Seconds of calls by kind and size."""
        self._timed: set[str] = set()
        """The kinds of calls that were timed in the run itself."""
        self._set_up_s = before.set_up_s
        self._dropped: set[tuple[int, str]] = set()
        self._overhead_s: list[float] = []
        """Seconds of each complete case beyond calls and rounds: below zero where rounds ended early."""

    def record_call(self, case: int, name: str, seconds: float) -> None:
        """Record the time of a call."""
        kind = kind_of_call(name, self._plan.cases[case])
        self._timed.add(kind)
        self._times.setdefault(kind, {})[self._size(case)] = seconds

    def record_case(self, case: int, seconds: float) -> None:
        """Record the time of a case."""
        self._overhead_s.append(seconds - self._calls_s(case))

    def drop(self, case: int, name: str) -> None:
        """Record that an implementation has left a case."""
        self._dropped.add((case, name))

    def case_s(self, case: int) -> float:
        """Return the estimated seconds of a case."""
        further = self._overhead_s or [self._assumed_s(case)]
        return max(0.0, self._calls_s(case) + sum(further) / len(further))

    def _assumed_s(self, case: int) -> float:
        """Return the assumed seconds of a case outside calls and rounds."""
        count = len(self._names(case))
        if self._set_up_s is not None:
            return self._set_up_s * count
        least = SET_UP_S * count if isinstance(self._plan.cases[case], Workload) else 0.0
        return max(PREPARATION_SHARE * self._plan.seconds, least)

    def knows(self, case: int) -> bool:
        """Whether the estimate of a case rests on times of all its calls, or on those of another case of a model."""
        work, names = self._plan.cases[case], self._names(case)
        if not isinstance(work, Workload):
            return bool(self._overhead_s)
        return all(
            kind_of_call(name, work) in self._timed or self._call_s(name, case, MAX_SCALE) is not None for name in names
        )

    def knows_any(self, case: int, max_scale: float = MAX_SCALE) -> bool:
        """Whether a call of a case is known, or one at most `max_scale` times as large or small."""
        return any(self._call_s(name, case, max_scale) is not None for name in self._names(case))

    def rounds_s(self, case: int) -> float:
        """Return the estimated seconds of a case's rounds."""
        calls, seconds = self._calls(case), self._plan.seconds
        return rounds_s(calls, seconds, counterpart_calls(calls, self._plan.cases[case], seconds))

    def _calls_s(self, case: int) -> float:
        calls, seconds = self._calls(case), self._plan.seconds
        return case_s(calls, seconds, counterpart_calls(calls, self._plan.cases[case], seconds))

    def _calls(self, case: int) -> list[float]:
        """Return the seconds of a call of each implementation; an unknown one counts as the mean of the others."""
        found = [self._call_s(name, case) for name in self._names(case)]
        known = [seconds for seconds in found if seconds is not None]
        if not known:
            return []
        mean = sum(known) / len(known)
        return [mean if seconds is None else seconds for seconds in found]

    def _names(self, case: int) -> list[str]:
        return [name for name in self._plan.ordered if (case, name) not in self._dropped]

    def _call_s(self, name: str, case: int, max_scale: float = math.inf) -> float | None:
        known = self._times.get(kind_of_call(name, self._plan.cases[case]), {})
        return scaled_call_s(list(known.items()), self._size(case), max_scale)

    def _size(self, case: int) -> float:
        work = self._plan.cases[case]
        return max(1.0, work.flops) if isinstance(work, Workload) else 1.0


class Progress:
    """Report the progress of a worker.

    Attributes:
        emit: sends an event.
    """

    def __init__(
        self,
        plan: AnyPlan,
        first_case: int,
        emit: Emit,
        mark: Callable[[int], None],
        known: KnownTimes | None = None,
    ) -> None:
        """Create it for a worker.

        Args:
            plan: the plan.
            first_case: the worker's first case.
            emit: the sink for events.
            mark: marks the running implementation.
            known: times from before the run.
        """
        self.emit = emit
        self._mark = mark
        self._numbers = {name: number for number, name in enumerate(plan.ordered, 1)}
        self._cases = len(plan.cases)
        self._by_calls = isinstance(plan.cases[0], Workload)
        self._case = self._first = first_case
        self._started = self._case_started = time.perf_counter()
        self._forecast = Forecast(plan, known)

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
        forecast, passed = self._forecast, time.perf_counter()
        elapsed, least_s = passed - self._case_started, 0.0
        sure = bool(remaining_s) or (self._by_calls and remaining_s is not None)  # models give 0 for unknown
        if remaining_s is None:  # before the rounds, all of which are still to come
            least_s, sure = forecast.rounds_s(self._case), forecast.knows(self._case)
            remaining_s = max(forecast.case_s(self._case) - elapsed, least_s)
        others = range(self._case + 1, self._cases)
        after_s = sum(self._other_case_s(case, elapsed + remaining_s) for case in others)
        left = remaining_s + after_s
        before = self._first / self._cases
        share = (passed - self._started) / (passed - self._started + left) if left else 1.0
        done = before + (1 - before) * share
        self.emit(
            on.Progress(
                done=min(done, 0.99),
                remaining_s=left,
                now=now,
                case_s=remaining_s,
                least_s=least_s + after_s,
                sure=sure and all(self._guessed_well(case) for case in others),
            )
        )

    def _other_case_s(self, case: int, current_s: float) -> float:
        """Estimate a later case: of a model as long as the current one, until one is complete."""
        return self._forecast.case_s(case) if self._by_calls or self._forecast.knows(case) else current_s

    def _guessed_well(self, case: int) -> bool:
        return self._forecast.knows(case) if self._by_calls else True

    @property
    def case_s(self) -> float:
        """The estimated seconds of the whole current case."""
        return self._forecast.case_s(self._case)

    @property
    def case(self) -> int:
        """Index of the current case."""
        return self._case
