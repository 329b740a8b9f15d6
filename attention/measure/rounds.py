"""Interleaved rounds: every implementation once a round, in an order that changes, until the speedups are known."""

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import expm1
from typing import Final

from msgspec import Struct, field

from attention.implementations.protocol import Runner
from attention.measure.clock import Clock, take_sample
from attention.statistics import log_ratios, ratio_interval

FEWEST_ROUNDS: Final = 3
FEWEST_FOR_PRECISION: Final = 10
"""Rounds between looks at the intervals: fewer agree by chance too often, and looking takes time."""


class Arm(Struct, kw_only=True, eq=False):
    """One implementation in the rounds."""

    name: str
    runner: Runner
    call_s: float
    """Seconds that a call took before the rounds."""
    calls: int = 1
    """Calls of one sample."""
    lead_in: bool = False
    """Whether each sample follows an untimed one of the same length, so that all find the same clocks and power."""
    samples: list[float] = field(default_factory=list)
    clock: Clock = time.perf_counter

    def sample(self) -> None:
        """Adds one sample, in seconds a call."""
        if self.lead_in:
            take_sample(self.runner, self.calls, self.clock)
        self.samples.append(take_sample(self.runner, self.calls, self.clock))


class Limits(Struct, frozen=True, kw_only=True):
    """When the rounds end."""

    seconds: float
    precision: float
    """Relative width of an interval that is narrow enough; 0.01 is 1 %."""


def run_rounds(
    arms: list[Arm],
    limits: Limits,
    *,
    seed: int,
    before: Callable[[Arm], None],
    failed: Callable[[Arm, Exception], None],
    after: Callable[[list[Arm]], str | None],
    clock: Clock = time.perf_counter,
) -> str:
    """Takes samples round by round; the first arm is the reference.

    Args:
        arms: taken in a new random order each round; one that raises is dropped.
        limits: when to stop.
        seed: of the order.
        before: called before each sample.
        failed: called with an arm that raised, and what it raised.
        after: called with the arms that are still in, after each round; it may take some out, or say why to stop.
        clock: in seconds.

    Returns:
        "precision", "time", what `after` said, or "failed" when no arm is left.
    """
    draw = random.Random(seed)
    started = clock()
    for count in _count_from_one():
        with _no_collection():
            for arm in draw.sample(arms, len(arms)):
                before(arm)
                try:
                    arm.sample()
                except Exception as error:  # whatever an implementation raises is its own row's failure
                    arms.remove(arm)
                    failed(arm, error)
        told = after(arms)
        if not arms:
            return "failed"
        if told:
            return told
        if count % FEWEST_FOR_PRECISION == 0 and narrow_enough(arms, limits.precision):
            return "precision"
        if count >= FEWEST_ROUNDS and clock() - started >= limits.seconds:
            return "time"
    raise AssertionError("rounds end by a limit")


def narrow_enough(arms: list[Arm], precision: float) -> bool:
    """Whether the interval of every arm's ratio to the first is narrower than the precision."""
    reference = arms[0].samples
    for arm in arms[1:]:
        _, low, high = ratio_interval(log_ratios(reference, arm.samples))
        if expm1(high - low) > precision:
            return False
    return True


def _count_from_one() -> Iterator[int]:
    count = 0
    while True:
        count += 1
        yield count


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
