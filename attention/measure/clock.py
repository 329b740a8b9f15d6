"""How long one call takes: queued calls evaluated together, and single calls evaluated by themselves."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from attention.implementations.protocol import Runner

QUEUED_BYTES: Final = 2**28
"""Outputs that the calls of one sample may hold together."""
MOST_CALLS: Final = 1000
SETTLED: Final = 0.03
ALIKE: Final = 1.6
"""Runners whose calls differ by less than this factor take samples of as many calls."""
LATENCY_CALLS: Final = 30

Clock = Callable[[], float]
"""Seconds since whenever."""


def take_sample(runner: Runner, calls: int, clock: Clock = time.perf_counter) -> float:
    """Queues some independent calls, evaluates every output, and returns the seconds that one of them took."""
    started = clock()
    runner.wait([runner.queue() for _ in range(calls)])
    return (clock() - started) / calls


def calls_for(call_s: float, sample_s: float, output_bytes: int) -> int:
    """Calls that make a sample last about sample_s seconds without holding too much memory in their outputs."""
    by_time = round(sample_s / call_s)
    return max(1, min(by_time, QUEUED_BYTES // output_bytes, MOST_CALLS))


def shared_calls(call_s: Sequence[float], sample_s: float, output_bytes: int) -> list[int]:
    """Calls of a sample for several runners at once: those of about one speed get the same number.

    What a sample costs beyond its calls is shared among them: with other numbers, two equal runners seem to differ.
    """
    calls = [0] * len(call_s)
    head_s, shared = 0.0, 0
    for index in sorted(range(len(call_s)), key=lambda index: call_s[index]):
        if not shared or call_s[index] > ALIKE * head_s:
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
    """Repeats calls until two samples in a row agree, for at least least_s and at most ten times as long.

    Args:
        runner: the bound call.
        call_s: seconds that a call took so far.
        least_s: seconds to warm up at the least.
        sample_s: seconds of one sample.
        output_bytes: what one call returns.
        clock: in seconds.

    Returns:
        Seconds a call.
    """
    started = clock()
    while True:
        before = call_s
        call_s = take_sample(runner, calls_for(call_s, sample_s / 2, output_bytes), clock)
        elapsed = clock() - started
        settled = abs(call_s - before) <= SETTLED * before
        if (settled and elapsed >= least_s) or elapsed >= 10 * least_s:
            return call_s


def latency(runner: Runner, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Median seconds of single calls, each evaluated and waited for before the next, within about `seconds`."""
    times: list[float] = []
    started = clock()
    while len(times) < LATENCY_CALLS and (len(times) < 3 or clock() - started < seconds):
        times.append(take_sample(runner, 1, clock))
    return median(times)
