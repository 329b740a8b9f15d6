"""Interleaved rounds: every implementation once per round, in random order, until the speedups are precise enough.

If a case's time allows few rounds, an arm much slower than the reference takes part in some of them only.
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

from attention.core.results import MIN_ROUNDS
from attention.core.statistics import log_ratios, ratio_interval
from attention.measure.clock import Clock, Runner, take_sample

AMPLE_ROUNDS: Final = 30
"""If a case's time allows this many rounds, every arm takes part in each of them."""
MIN_ROUNDS_FOR_PRECISION: Final = 10
"""Rounds between checks of the intervals: with fewer they are narrow by chance too often, and a check takes time."""


class Arm(Struct, kw_only=True, eq=False):
    """One implementation in the rounds."""

    name: str
    runner: Runner
    call_s: float
    """Seconds per call measured before the rounds."""
    calls: int = 1
    """Number of calls per sample."""
    lead_in: bool = False
    """Whether an untimed sample of the same length precedes each sample, to equalise clocks and power."""
    stride: int = 1
    """The arm takes part in one round of this many."""
    samples: list[float] = field(default_factory=list)
    """Seconds per call, one for each round; NaN for a round without a sample."""
    clock: Clock = time.perf_counter

    @property
    def valid_samples(self) -> list[float]:
        """The samples without NaN."""
        return [sample for sample in self.samples if not math.isnan(sample)]

    @property
    def sample_s(self) -> float:
        """Expected seconds of one sample."""
        return self.calls * self.call_s * (2 if self.lead_in else 1)

    def sample(self) -> None:
        """Append one sample, in seconds per call."""
        if self.lead_in:
            take_sample(self.runner, self.calls, self.clock)
        self.samples.append(take_sample(self.runner, self.calls, self.clock))


class Limits(Struct, frozen=True, kw_only=True):
    """Conditions that end the rounds."""

    seconds: float
    precision: float
    """Relative interval width at which the rounds end; 0.01 is 1 %."""
    min_rounds: int = MIN_ROUNDS
    """Minimum number of samples of every arm, however long they take."""


def set_strides(arms: Sequence[Arm], seconds: float) -> None:
    """Let arms slower than the reference (the first) skip rounds if `seconds` allows few of them.

    The slower the arm, the more rounds it skips, as long as it still gets MIN_ROUNDS samples in that time.
    """
    reference_s = arms[0].sample_s
    if sum(arm.sample_s for arm in arms) * AMPLE_ROUNDS <= seconds:
        return
    rounds = seconds / sum(arm.sample_s for arm in arms if arm.sample_s <= reference_s)
    for arm in arms[1:]:
        slower = max(1, round(arm.sample_s / reference_s))
        arm.stride = max(1, min(slower, int(rounds / MIN_ROUNDS)))


def min_rounds_s(arms: Sequence[Arm], min_rounds: int = MIN_ROUNDS) -> float:
    """Return the expected seconds of the minimum number of rounds."""
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
    """Sample all arms round by round; the first arm is the reference.

    Args:
        arms: sampled in a new random order each round, according to their strides; an arm that raises is dropped.
        limits: conditions that end the rounds.
        seed: of the order.
        before: called before each sample.
        failed: called with an arm that raised, and the exception.
        after: called after each round with the remaining arms; it may remove some, or return a reason to stop.
        catch: exception types that count as an arm's failure.
        clock: in seconds.

    Returns:
        "precision", "time", the reason returned by `after`, or "failed" if no arm is left.
    """
    draw = random.Random(seed)
    started = clock()
    late = False
    for count in _fresh_generation():
        turns = [arm for arm in arms if arm is arms[0] or _takes_part(arm, count, late, limits)]
        for arm in arms:
            if arm not in turns:
                arm.samples.append(math.nan)
        with _gc_disabled():
            for arm in draw.sample(turns, len(turns)):
                before(arm)
                try:
                    arm.sample()
                except catch as error:  # whatever an implementation raises is its own row's failure
                    arms.remove(arm)
                    failed(arm, error)
        stopped_by = after(arms)
        if not arms:
            return "failed"
        if stopped_by:
            return stopped_by
        late = clock() - started >= limits.seconds
        if not late and count % MIN_ROUNDS_FOR_PRECISION:
            continue
        if any(len(arm.valid_samples) < limits.min_rounds for arm in arms):
            continue
        if late:
            return "time"
        if is_precise(arms, limits.precision):
            return "precision"
    raise AssertionError("rounds end by a limit")


def _takes_part(arm: Arm, count: int, late: bool, limits: Limits) -> bool:
    """Return whether an arm takes part in a round; once the time is up, only arms that lack samples do."""
    return len(arm.valid_samples) < limits.min_rounds if late else (count - 1) % arm.stride == 0


def is_precise(arms: list[Arm], precision: float) -> bool:
    """Return whether the interval of every arm's ratio to the first is narrower than the precision."""
    reference = arms[0].samples
    for arm in arms[1:]:
        _, low, high = ratio_interval(log_ratios(reference, arm.samples))
        if expm1(high - low) > precision:
            return False
    return True


def _fresh_generation() -> Iterator[int]:
    count = 0
    while True:
        count += 1
        yield count


@contextmanager
def _gc_disabled() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
