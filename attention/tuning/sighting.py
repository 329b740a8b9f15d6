"""First looks: each candidate called once or twice, so that rounds are spent only on those that stand a chance."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeVar

from attention.implementations.protocol import Runner
from attention.measure.clock import Clock, take_sample, warm_up
from attention.measure.rounds import Arm

HOPELESS: Final = 4.0
"""How many times the best a candidate may have taken on first sight to be timed further."""
WARM_LOOKS: Final = 3
"""Warm calls of which the fastest counts: whatever else the processor does just then is no candidate's fault."""
CHEAP_S: Final = 0.005
"""What a longer call would take several of is too dear; and less disturbs it."""
LEAST_WARM_UP_S: Final = {True: 0.02, False: 0.002}
"""Seconds that each candidate warms up on a GPU, and on a CPU."""
SHORTEST_S: Final = 1e-9
"""A clock that was set back says nothing; this stands for it."""
R = TypeVar("R")


class Spending:
    """How much time a trial has taken, by a clock that may be set back meanwhile."""

    def __init__(self, clock: Clock) -> None:
        """Nothing is spent yet."""
        self.seconds = 0.0
        self._clock = clock

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what is done inside."""
        started = self._clock()
        try:
            yield
        finally:
            self.seconds += max(0.0, self._clock() - started)


class Sighting:
    """Calls candidates for the first time.

    Attributes:
        spent: the time that counts.
        failed: those that raised, and what.
    """

    def __init__(self, budget_s: float, output_bytes: int, on_gpu: bool, clock: Clock) -> None:
        """Sets the limits.

        Args:
            budget_s: seconds after which no further candidate is looked at, once one has been seen.
            output_bytes: what one call returns.
            on_gpu: there a first call compiles or makes plans, tells nothing, and is outside of the budget; samples
                follow an untimed one of the same length.
            clock: in seconds.
        """
        self.spent = Spending(clock)
        self.failed: dict[str, str] = {}
        self._budget_s = budget_s
        self._output_bytes = output_bytes
        self._on_gpu = on_gpu
        self._clock = clock

    def look(self, runners: Mapping[str, Runner]) -> list[Arm]:
        """Takes a first look at each, until the time is up; those that run, with what a call took."""
        seen: list[Arm] = []
        for name, runner in runners.items():
            if seen and self.spent.seconds >= self._budget_s:
                break
            arm = Arm(name=name, runner=runner, call_s=math.inf, lead_in=self._on_gpu, clock=self._clock)
            best = min((each.call_s for each in seen), default=math.inf)
            if self.tried(arm, lambda arm=arm, best=best: self._sight(arm, best)) is not None:  # type: ignore[misc]
                seen.append(arm)
        return seen

    def warm(self, arms: list[Arm], sample_s: float) -> list[Arm]:
        """Warms up those that stand a chance, and learns what a call takes among others that are queued with it.

        A short call that is waited for tells little of that, whatever it took: it is given up only after this.
        """
        hopeful = _hopeful(arms, sample_s)
        for arm in hopeful:
            if arm.call_s < sample_s:
                self.tried(arm, lambda arm=arm: self._warm_up(arm, sample_s))  # type: ignore[misc]
        return _hopeful([arm for arm in hopeful if arm.name not in self.failed])

    def tried(self, arm: Arm, call: Callable[[], R]) -> R | None:
        """Does something with a candidate; None where it raises, which is remembered."""
        try:
            return call()
        except Exception as error:  # a candidate that cannot run is out, whatever it says
            self.fail(arm, error)
            return None

    def fail(self, arm: Arm, error: BaseException) -> None:
        """Remembers that a candidate raised."""
        self.failed[arm.name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def _sight(self, arm: Arm, best: float) -> bool:
        """Takes a first look: a cold call, and warm ones while they are cheap or the cold one leaves hope."""
        before = self.spent.seconds
        arm.call_s = self.once(arm)
        if self._on_gpu:
            self.spent.seconds = before
            arm.call_s = self.once(arm)
        for look in range(WARM_LOOKS):
            dear = arm.call_s > CHEAP_S and (look > 0 or arm.call_s > HOPELESS * best)
            if dear or self.spent.seconds + arm.call_s >= self._budget_s:
                break
            arm.call_s = min(arm.call_s, self.once(arm))
        return True

    def once(self, arm: Arm) -> float:
        """Seconds of a call that is waited for."""
        with self.spent.counted():
            return max(take_sample(arm.runner, 1, self._clock), SHORTEST_S)

    def _warm_up(self, arm: Arm, sample_s: float) -> bool:
        least_s = LEAST_WARM_UP_S[self._on_gpu]
        with self.spent.counted():
            # warm_up takes samples of half the length
            took = warm_up(arm.runner, arm.call_s, least_s, 2 * sample_s, self._output_bytes, self._clock)
        arm.call_s = max(took, SHORTEST_S)
        return True


def _hopeful(arms: list[Arm], cheap_s: float = 0.0) -> list[Arm]:
    """Those that come near the best, or that cost next to nothing to be looked at again."""
    best = min((arm.call_s for arm in arms), default=0.0)
    return [arm for arm in arms if arm.call_s <= HOPELESS * best or arm.call_s < cheap_s]
