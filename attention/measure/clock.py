"""Timing of calls: samples of queued calls evaluated together, and single calls."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import mlx.core as mx


class Runner(Protocol):
    """A call bound to converted inputs, which can be timed repeatedly."""

    def queue(self) -> object:
        """Queue one independent call and return its outputs, unevaluated."""
        ...

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate all outputs of the queued calls and wait for the device."""
        ...

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

Clock = Callable[[], float]
"""Returns seconds since an arbitrary start."""


def take_sample(runner: Runner, calls: int, clock: Clock = time.perf_counter) -> float:
    """Queue independent calls, evaluate every output, and return the seconds per call."""
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
    runner: Runner,
    call_s: float,
    least_s: float,
    sample_s: float,
    output_bytes: int,
    clock: Clock = time.perf_counter,
) -> float:
    """Repeat calls until two consecutive samples agree, for at least least_s and at most ten times as long.

    Args:
        runner: the bound call.
        call_s: seconds per call so far.
        least_s: minimum seconds of warm-up.
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
        if (settled and elapsed >= least_s) or elapsed >= 10 * least_s:
            return call_s


def latency(runner: Runner, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Return the median seconds of single calls, each evaluated before the next, within about `seconds`."""
    times: list[float] = []
    started = clock()
    while len(times) < LATENCY_CALLS and (len(times) < 3 or clock() - started < seconds):
        times.append(take_sample(runner, 1, clock))
    return median(times)
