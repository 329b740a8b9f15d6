"""How often a monitor counts and times calls, so that monitoring stays within its share of a program's time."""

import math
import random
import time
from collections.abc import Callable
from typing import Final

from attention.measure.clock import Clock

BUDGET_PART: Final = 0.375
"""Part of the share for counting calls (uncounted ones included), and as much again for timing.

The rest is a reserve for indirect costs: cold caches and extra synchronisation.
"""
MIN_COUNTING_PART: Final = 0.25
"""Minimum share of the counting part that remains for counted calls, whatever uncounted ones cost."""
CALIBRATION_CALLS: Final = 100
"""Calls timed together to measure the cost of one."""
MAX_STRIDE: Final = 1 << 12
MAX_GAP: Final = 64
"""Counted calls between two decisions whether one may be timed."""


def call_cost_s(attend: Callable[..., object], array: object) -> float:
    """Return the seconds of overhead of a call with the arguments of MLX's SDPA: the minimum of five rounds."""
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(CALIBRATION_CALLS):
            attend(array, array, array, scale=1.0, mask=None)
        best = min(best, time.perf_counter() - started)
    return best / CALIBRATION_CALLS


class SamplingBudget:
    """Decide which calls are counted (every one, unless they come too fast) and which are timed.

    Attributes:
        stride: one in this many calls is counted, on average.
        looks: number of calls counted.
        spent_s: seconds that timed calls took, their own work included.
    """

    def __init__(self, share: float, sample_s: float, skip_s: float = 0.0, clock: Clock = time.perf_counter) -> None:
        """Start now.

        Args:
            share: share of elapsed time that monitoring may take.
            sample_s: seconds of overhead of a counted call.
            skip_s: seconds of overhead of an uncounted call.
            clock: in seconds.
        """
        self.stride = 1
        self.spent_s = 0.0
        self.sampled = 0
        self._share, self._sample_s, self._skip_s, self._clock = share, sample_s, skip_s, clock
        self._began = self._latest = clock()
        self._sampled_then = 0
        self._draw = random.Random(0)

    def next_sample(self) -> int:
        """Count a call; return the distance to the next one to count, drawn so as not to hit the same layer."""
        self.sampled += 1
        return 1 if self.stride == 1 else self._draw.randint(1, 2 * self.stride - 1)

    def may_time(self, cost_s: float) -> bool:
        """Return whether a call of about `call_cost_s` seconds may be timed now; adapts the stride."""
        now = self._clock()
        self._adapt(now)
        return self.spent_s + cost_s <= BUDGET_PART * self._share * (now - self._began)

    @property
    def overhead_s(self) -> float:
        """Seconds spent on monitoring, the work of timed calls included."""
        return self.spent_s + self.sampled * self._sample_s

    def _adapt(self, now: float) -> None:
        """Choose the stride from the rate of calls since the last time."""
        looks, passed = self.sampled - self._sampled_then, now - self._latest
        if looks < MAX_GAP or passed <= 0:
            return
        call_s = passed / (looks * self.stride)
        needed = self._sample_s / self._counting_budget_s(call_s) if self._share else MAX_STRIDE
        self.stride = 1
        while self.stride < min(needed, MAX_STRIDE):
            self.stride *= 2
        self._latest, self._sampled_then = now, self.sampled

    def _counting_budget_s(self, call_s: float) -> float:
        """Return the seconds per call that counting may take; uncounted calls alone may exceed it."""
        part = BUDGET_PART * self._share * call_s
        return part if self._skip_s > part else max(part - self._skip_s, MIN_COUNTING_PART * part)


class CallStream:
    """One stream of calls, of which some are counted.

    Attributes:
        turn: number of calls so far.
        look_at: number of the next call to count.
    """

    def __init__(self) -> None:
        """Start with no calls; the first one will be counted."""
        self.seen = self.next_sample = self._last_sample = 0

    def take_sample(self, budget: SamplingBudget) -> int:
        """Return how many calls the counted call represents (those since the last), and choose the next one."""
        passed, self._last_sample = self.seen - self._last_sample, self.seen
        self.next_sample = self.seen + budget.next_sample()
        return passed
