"""Prescreening: call each candidate once or twice, so that rounds are spent only on plausible ones."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeVar

from attention.measure.clock import Clock, Runner, take_sample, warm_up
from attention.measure.rounds import Arm

MAX_SLOWDOWN: Final = 4.0
"""Candidates slower than this multiple of the best in the prescreening are not timed further."""
WARM_CALLS: Final = 3
"""Number of warm calls, of which the fastest counts: slower ones are due to other load on the processor."""
MAX_CHEAP_S: Final = 0.005
"""A call longer than this is not repeated: it is costly, and disturbances matter less to it."""
MIN_WARM_UP_S: Final = {True: 0.02, False: 0.002}
"""Seconds of warm-up per candidate, on a GPU (True) and on a CPU (False)."""
MIN_TIME_S: Final = 1e-9
"""Stands for a time that is not positive because the clock was set back."""
R = TypeVar("R")


class TimeBudget:
    """Time used by a trial, by a clock that may be set back meanwhile."""

    def __init__(self, clock: Clock) -> None:
        """Start at zero."""
        self.seconds = 0.0
        self._clock = clock

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count the time of the block."""
        started = self._clock()
        try:
            yield
        finally:
            self.seconds += max(0.0, self._clock() - started)


class Prescreen:
    """Call candidates for the first time.

    Attributes:
        spent: time used, as far as it counts against the budget.
        failed: candidates that raised, and their errors.
    """

    def __init__(self, budget_s: float, output_bytes: int, on_gpu: bool, clock: Clock) -> None:
        """Set the limits.

        Args:
            budget_s: seconds after which no further candidate is called, once one has run.
            output_bytes: size of the output of one call.
            on_gpu: on a GPU the first call compiles kernels, is not representative and does not count against the
                budget; samples follow an untimed one of the same length.
            clock: in seconds.
        """
        self.spent = TimeBudget(clock)
        self.failed: dict[str, str] = {}
        self._budget_s = budget_s
        self._output_bytes = output_bytes
        self._on_gpu = on_gpu
        self._clock = clock

    def time_all(self, runners: Mapping[str, Runner]) -> list[Arm]:
        """Call each runner until the time is up; return those that ran, with their time per call."""
        seen: list[Arm] = []
        for name, runner in runners.items():
            if seen and self.spent.seconds >= self._budget_s:
                break
            arm = Arm(name=name, runner=runner, call_s=math.inf, lead_in=self._on_gpu, clock=self._clock)
            best = min((each.call_s for each in seen), default=math.inf)
            if self.attempt(arm, lambda arm=arm, best=best: self._time_first_calls(arm, best)) is not None:  # type: ignore[misc]
                seen.append(arm)
        return seen

    def warm_up_promising(self, arms: list[Arm], sample_s: float) -> list[Arm]:
        """Warm up the plausible candidates and measure their time per call in a queue.

        The time of a single short call, which includes the wait for it, predicts that poorly: short ones are dropped
        only after this.
        """
        hopeful = _promising(arms, sample_s)
        for arm in hopeful:
            if arm.call_s < sample_s:
                self.attempt(arm, lambda arm=arm: self._warm_up(arm, sample_s))  # type: ignore[misc]
        return _promising([arm for arm in hopeful if arm.name not in self.failed])

    def attempt(self, arm: Arm, call: Callable[[], R]) -> R | None:
        """Run something with a candidate; None if it raises, and the error is recorded."""
        try:
            return call()
        except Exception as error:  # a candidate that cannot run is out, whatever it raises
            self.fail(arm, error)
            return None

    def fail(self, arm: Arm, error: BaseException) -> None:
        """Record that a candidate raised."""
        self.failed[arm.name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def _time_first_calls(self, arm: Arm, best: float) -> bool:
        """Time a cold call, and warm ones while they are cheap or the candidate is still plausible."""
        before = self.spent.seconds
        arm.call_s = self.time_call(arm)
        if self._on_gpu:
            self.spent.seconds = before
            arm.call_s = self.time_call(arm)
        for look in range(WARM_CALLS):
            dear = arm.call_s > MAX_CHEAP_S and (look > 0 or arm.call_s > MAX_SLOWDOWN * best)
            if dear or self.spent.seconds + arm.call_s >= self._budget_s:
                break
            arm.call_s = min(arm.call_s, self.time_call(arm))
        return True

    def time_call(self, arm: Arm) -> float:
        """Return the seconds of a single call, the wait for it included."""
        with self.spent.measure():
            return max(take_sample(arm.runner, 1, self._clock), MIN_TIME_S)

    def _warm_up(self, arm: Arm, sample_s: float) -> bool:
        least_s = MIN_WARM_UP_S[self._on_gpu]
        with self.spent.measure():
            # warm_up takes samples of half the length
            took = warm_up(arm.runner, arm.call_s, least_s, 2 * sample_s, self._output_bytes, self._clock)
        arm.call_s = max(took, MIN_TIME_S)
        return True


def _promising(arms: list[Arm], cheap_s: float = 0.0) -> list[Arm]:
    """Return the candidates close to the best, and those cheap enough to time again."""
    best = min((arm.call_s for arm in arms), default=0.0)
    return [arm for arm in arms if arm.call_s <= MAX_SLOWDOWN * best or arm.call_s < cheap_s]
