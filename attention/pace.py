"""How often a monitor looks at calls and times them, so that watching stays within its share of a program's time."""

import math
import random
import time
from collections.abc import Callable
from typing import Final

from attention.measure.clock import Clock

PART: Final = 0.375
"""Of the share: so much for counting, with what goes by uncounted, and as much for timing.

The rest is for what neither foresees: caches that they make cold, and waiting that would not have been.
"""
LEAST: Final = 0.25
"""Of the first part: what is left to counting, however much calls that go by cost."""
CALIBRATING: Final = 100
"""Calls that are timed together to learn what one costs."""
MOST_STRIDE: Final = 1 << 12
MOST_GAP: Final = 64
"""Calls that are looked at between two questions whether one may be timed."""


def cost_s(attend: Callable[..., object], array: object) -> float:
    """Seconds that a call costs here whose arguments are those of MLX's SDPA: the least of five rounds."""
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(CALIBRATING):
            attend(array, array, array, scale=1.0, mask=None)
        best = min(best, time.perf_counter() - started)
    return best / CALIBRATING


class Pace:
    """Says which calls are looked at, every one unless they come too fast for that, and which are timed.

    Attributes:
        stride: every how manyth call is looked at, on average.
        looks: how many were looked at.
        spent_s: seconds that timed calls took, although their work had to be done.
    """

    def __init__(self, share: float, look_s: float, pass_s: float = 0.0, clock: Clock = time.perf_counter) -> None:
        """Begins now.

        Args:
            share: of the time that passes, what watching may take.
            look_s: seconds that looking at a call costs.
            pass_s: seconds that a call costs which goes by.
            clock: in seconds.
        """
        self.stride = 1
        self.spent_s = 0.0
        self.looks = 0
        self._share, self._look_s, self._pass_s, self._clock = share, look_s, pass_s, clock
        self._began = self._latest = clock()
        self._looks_then = 0
        self._draw = random.Random(0)

    def next_look(self) -> int:
        """Counts a look, and says how many calls on the next one is: drawn, lest it be the same layer each time."""
        self.looks += 1
        return 1 if self.stride == 1 else self._draw.randint(1, 2 * self.stride - 1)

    def may_time(self, cost_s: float) -> bool:
        """Whether a call that costs about so much may be timed now; adapts the stride on the way."""
        now = self._clock()
        self._adapt(now)
        return self.spent_s + cost_s <= PART * self._share * (now - self._began)

    @property
    def watching_s(self) -> float:
        """Seconds that watching took, the work of timed calls included."""
        return self.spent_s + self.looks * self._look_s

    def _adapt(self, now: float) -> None:
        """Chooses the stride by how fast calls came since the last time."""
        looks, passed = self.looks - self._looks_then, now - self._latest
        if looks < MOST_GAP or passed <= 0:
            return
        call_s = passed / (looks * self.stride)
        needed = self._look_s / self._room_s(call_s) if self._share else MOST_STRIDE
        self.stride = 1
        while self.stride < min(needed, MOST_STRIDE):
            self.stride *= 2
        self._latest, self._looks_then = now, self.looks

    def _room_s(self, call_s: float) -> float:
        """Seconds a call that counting may take; where going by alone takes more, counting less would not help."""
        part = PART * self._share * call_s
        return part if self._pass_s > part else max(part - self._pass_s, LEAST * part)


class Lane:
    """Calls that come one way, of which some are looked at.

    Attributes:
        turn: how many came.
        look_at: the number of the next one that is looked at.
    """

    def __init__(self) -> None:
        """None came yet, and the first will be looked at."""
        self.turn = self.look_at = self._looked = 0

    def passed(self, pace: Pace) -> int:
        """A call is looked at: for how many it stands, those since the last; sets the next one."""
        passed, self._looked = self.turn - self._looked, self.turn
        self.look_at = self.turn + pace.next_look()
        return passed
