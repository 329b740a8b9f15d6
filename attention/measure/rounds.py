"""Interleaved rounds: every implementation once a round, in an order that changes, until the speedups are known.

Where a case's time allows few rounds, an arm much slower than the reference takes part in some of them only.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import expm1
from typing import Final

from msgspec import Struct, field

from attention.implementations.protocol import Runner
from attention.measure.clock import Clock, take_sample
from attention.report import MIN_ROUNDS
from attention.statistics import log_ratios, ratio_interval

PLENTY_OF_ROUNDS: Final = 30
"""Rounds that a case's time must allow for every arm to take part in each of them."""
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
    stride: int = 1
    """The arm takes part in one of so many rounds."""
    samples: list[float] = field(default_factory=list)
    """Seconds a call, one for each round; NaN for a round that the arm sat out."""
    clock: Clock = time.perf_counter

    @property
    def taken(self) -> list[float]:
        """The samples without the rounds sat out."""
        return [sample for sample in self.samples if not math.isnan(sample)]

    @property
    def sample_s(self) -> float:
        """Seconds that one sample is expected to take."""
        return self.calls * self.call_s * (2 if self.lead_in else 1)

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
    min_rounds: int = MIN_ROUNDS
    """Samples that every arm takes, however long that lasts."""


def set_strides(arms: Sequence[Arm], seconds: float) -> None:
    """Let arms slower than the reference, the first, sit out rounds where `seconds` allows few of them.

    The slower the arm, the more it sits out, as long as it still gets MIN_ROUNDS samples in that time.
    """
    reference_s = arms[0].sample_s
    if sum(arm.sample_s for arm in arms) * PLENTY_OF_ROUNDS <= seconds:
        return
    rounds = seconds / sum(arm.sample_s for arm in arms if arm.sample_s <= reference_s)
    for arm in arms[1:]:
        slower = max(1, round(arm.sample_s / reference_s))
        arm.stride = max(1, min(slower, int(rounds / MIN_ROUNDS)))


def least_s(arms: Sequence[Arm], min_rounds: int = MIN_ROUNDS) -> float:
    """Seconds that the fewest rounds are expected to take."""
    return min_rounds * sum(arm.sample_s for arm in arms)


def run_rounds(
    arms: list[Arm],
    limits: Limits,
    *,
    seed: int,
    before: Callable[[Arm], None],
    failed: Callable[[Arm, BaseException], None],
    after: Callable[[list[Arm]], str | None],
    catch: type[BaseException] = Exception,
    clock: Clock = time.perf_counter,
) -> str:
    """Takes samples round by round; the first arm is the reference.

    Args:
        arms: taken in a new random order each round, as their strides say; one that raises is dropped.
        limits: when to stop.
        seed: of the order.
        before: called before each sample.
        failed: called with an arm that raised, and what it raised.
        after: called with the arms that are still in, after each round; it may take some out, or say why to stop.
        catch: what counts as an arm's failure when it is raised.
        clock: in seconds.

    Returns:
        "precision", "time", what `after` said, or "failed" when no arm is left.
    """
    draw = random.Random(seed)
    started = clock()
    late = False
    for count in _count_from_one():
        turns = [arm for arm in arms if arm is arms[0] or _takes_part(arm, count, late, limits)]
        for arm in arms:
            if arm not in turns:
                arm.samples.append(math.nan)
        with _no_collection():
            for arm in draw.sample(turns, len(turns)):
                before(arm)
                try:
                    arm.sample()
                except catch as error:  # whatever an implementation raises is its own row's failure
                    arms.remove(arm)
                    failed(arm, error)
        told = after(arms)
        if not arms:
            return "failed"
        if told:
            return told
        late = clock() - started >= limits.seconds
        if not late and count % FEWEST_FOR_PRECISION:
            continue
        if any(len(arm.taken) < limits.min_rounds for arm in arms):
            continue
        if late:
            return "time"
        if narrow_enough(arms, limits.precision):
            return "precision"
    raise AssertionError("rounds end by a limit")


def _takes_part(arm: Arm, count: int, late: bool, limits: Limits) -> bool:
    """Whether a round is an arm's turn; once the time is up, only arms that lack samples go on."""
    return len(arm.taken) < limits.min_rounds if late else (count - 1) % arm.stride == 0


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
