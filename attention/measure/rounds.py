"""Timing: samples of queued calls, warm-up, latency, and interleaved rounds of several implementations.

A round takes one sample of every implementation, in random order; rounds end when the speedups are precise enough. If
a case's time allows few rounds, an arm much slower than the reference takes part in some of them only.
"""

import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import expm1
from statistics import median
from typing import TYPE_CHECKING, Final, Protocol, cast, runtime_checkable

from msgspec import Struct, field

from attention.core.results import MIN_ROUNDS, RankFigures
from attention.core.statistics import log_ratios, ratio_interval
from attention.core.workload import Counterpart

if TYPE_CHECKING:
    import mlx.core as mx


class TimedCall(Protocol):
    """A call bound to its inputs, which can be repeated."""

    def queue(self) -> object:
        """Queue one independent call and return its outputs, unevaluated."""
        ...

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate all outputs of the queued calls and wait for the device."""
        ...


@runtime_checkable
class TakesSamples(Protocol):
    """A call that times its samples itself, because other processes take part in them."""

    def take_sample(self, calls: int) -> float:
        """Make some calls, and return the seconds per call."""
        ...

    def begin_rounds(self) -> None:
        """Forget the samples taken before the rounds."""
        ...

    def figures(self) -> tuple[RankFigures, ...]:
        """Return the figures of each process, from the samples of the rounds."""
        ...


class Runner(TimedCall, Protocol):
    """A call bound to converted inputs, which can be checked too."""

    def results(self) -> "list[mx.array]":
        """Run one call and return its evaluated results: the output, and in training dQ, dK and dV."""
        ...

    def peak_bytes(self) -> int | None:
        """Run one call and return the peak memory above the inputs in bytes, or None if unknown."""
        ...


QUEUED_BYTES: Final = 2**28
"""Maximum total size of the outputs of one sample's calls."""
MAX_CALLS: Final = 1000
SETTLED_TOLERANCE: Final = 0.03
SIMILAR_SPEED: Final = 1.6
"""Runners whose call times differ by less than this factor use the same number of calls per sample."""
LATENCY_CALLS: Final = 30

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
LARGEST_KEPT: Final = 2**25
"""Bytes of the largest block that glibc takes from memory it keeps; its own maximum."""


def keep_freed_memory() -> None:
    """Make glibc keep the freed outputs of a sample for the next one.

    It returns to the system what exceeds twice the largest block freed so far, so that the outputs of a sample's calls,
    queued together, were new pages in each sample: up to a quarter of a call's time, for some implementations and not
    for others. A call whose output is freed before the next pays for no pages. Other C libraries stay as they are.
    """
    with suppress(AttributeError, OSError, TypeError):  # no glibc; on Windows there is no library of the process
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, QUEUED_BYTES)


Clock = Callable[[], float]
"""Returns seconds since an arbitrary start."""


def take_sample(runner: TimedCall, calls: int, clock: Clock = time.perf_counter) -> float:
    """Queue independent calls, evaluate every output, and return the seconds per call."""
    if hasattr(runner, "take_sample"):  # isinstance of a protocol takes 10 us
        return cast("TakesSamples", runner).take_sample(calls)
    started = clock()
    runner.wait([runner.queue() for _ in range(calls)])
    return (clock() - started) / calls


def calls_for(call_s: float, sample_s: float, output_bytes: int) -> int:
    """Return the number of calls for a sample of about sample_s seconds, limited by the memory of their outputs."""
    by_time = round(sample_s / call_s)
    return max(1, min(by_time, QUEUED_BYTES // output_bytes, MAX_CALLS))


def shared_calls(call_s: Sequence[float], sample_s: float, output_bytes: int) -> list[int]:
    """Return the number of calls per sample for several runners: runners of similar speed get the same number.

    A sample's fixed cost is spread over its calls: with different numbers, two equal runners would seem to differ.
    """
    calls = [0] * len(call_s)
    head_s, shared = 0.0, 0
    for index in sorted(range(len(call_s)), key=lambda index: call_s[index]):
        if not shared or call_s[index] > SIMILAR_SPEED * head_s:
            head_s, shared = call_s[index], calls_for(call_s[index], sample_s, output_bytes)
        calls[index] = shared
    return calls


def warm_up(
    runner: TimedCall,
    call_s: float,
    min_s: float,
    sample_s: float,
    output_bytes: int,
    clock: Clock = time.perf_counter,
) -> float:
    """Repeat calls until two consecutive samples agree, for at least min_s and at most ten times as long.

    Args:
        runner: the bound call.
        call_s: seconds per call so far.
        min_s: minimum seconds of warm-up.
        sample_s: seconds of one sample.
        output_bytes: size of the output of one call.
        clock: in seconds.

    Returns:
        Seconds per call.
    """
    started = clock()
    while True:
        before = call_s
        call_s = take_sample(runner, calls_for(call_s, sample_s / 2, output_bytes), clock)
        elapsed = clock() - started
        settled = abs(call_s - before) <= SETTLED_TOLERANCE * before
        if (settled and elapsed >= min_s) or elapsed >= 10 * min_s:
            return call_s


def latency(runner: TimedCall, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Return the median seconds of single calls, each evaluated before the next, within about `seconds`."""
    times: list[float] = []
    started = clock()
    while len(times) < LATENCY_CALLS and (len(times) < 3 or clock() - started < seconds):
        times.append(take_sample(runner, 1, clock))
    return median(times)


AMPLE_ROUNDS: Final = 30
"""If a case's time allows this many rounds, every arm takes part in each of them."""
MIN_ROUNDS_FOR_PRECISION: Final = 10
"""Rounds between checks of the intervals: with fewer they are narrow by chance too often, and a check takes time."""


class Arm(Struct, kw_only=True, eq=False):
    """One implementation in the rounds."""

    name: str
    runner: TimedCall
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
    counterpart: Counterpart | None = None
    """What it runs instead of the case, beside the arm of the same name."""
    scratch_bytes: int = 0
    """Memory that a call takes outside MLX's allocator, as its route declares."""

    @property
    def valid_samples(self) -> list[float]:
        """The samples without NaN."""
        return [sample for sample in self.samples if not math.isnan(sample)]

    @property
    def sample_s(self) -> float:
        """Expected seconds of one sample."""
        return self.calls * self.call_s * (2 if self.lead_in else 1)

    def make_calls(self) -> int:
        """Make the calls of a sample, and return their number."""
        take_sample(self.runner, self.calls, self.clock)
        return self.calls

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
        due = [arm for arm in arms if arm is arms[0] or _takes_part(arm, count, late, limits)]
        paired = {arm.name for arm in due if arm.counterpart}  # a sample of a counterpart is a pair with the arm's own
        turns = [arm for arm in arms if arm in due or arm.name in paired]
        for arm in arms:
            if arm not in turns:
                arm.samples.append(math.nan)
        with gc_disabled():
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
    """Return whether the interval of every arm's ratio to the first is narrower than the precision.

    Fewer than MIN_ROUNDS pairs, as of a slow arm in a preview, have no interval, and are not precise.
    """
    reference = arms[0].samples
    for arm in arms[1:]:
        logs = log_ratios(reference, arm.samples)
        if len(logs) < MIN_ROUNDS:
            return False
        _, low, high = ratio_interval(logs)
        if expm1(high - low) > precision:
            return False
    return True


def _fresh_generation() -> Iterator[int]:
    count = 0
    while True:
        count += 1
        yield count


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Keep Python's garbage collector from running in the context; leave it as it was after."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
