"""The rounds: order, pairing, stopping, and the effect of one implementation's failure on the others."""

import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from attention.core.results import MIN_ROUNDS
from attention.core.statistics import log_ratios
from attention.measure import rounds as measure_rounds
from attention.measure.rounds import MIN_ROUNDS_FOR_PRECISION, Arm, Limits, run_rounds, set_strides
from tests.support.tuning_examples import FakeTime

NOW = FakeTime()


class Calls:
    """A call that advances the clock by a given time when it is waited for."""

    def __init__(self, seconds: float, fails_at: int | None = None) -> None:
        self.seconds, self.fails_at, self.calls = seconds, fails_at, 0

    def queue(self) -> object:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("planted")
        return self.seconds

    def wait(self, outputs: Sequence[object]) -> None:
        NOW.now += self.seconds * len(outputs)

    def results(self) -> list[object]:
        return []

    def peak_bytes(self) -> int | None:
        return None


def rounds(arms: list[Arm], seconds: float = 0.2, precision: float = 0.01) -> tuple[str, list[str], list[str]]:
    order: list[str] = []
    failures: list[str] = []
    stopped_by = run_rounds(
        arms,
        Limits(seconds=seconds, precision=precision),
        seed=0,
        before=lambda arm: order.append(arm.name),
        failed=lambda arm, error: failures.append(f"{arm.name}: {error}"),
        after=lambda arms: None,
        clock=NOW,
    )
    return stopped_by, order, failures


def arm(name: str, seconds: float = 0.001, fails_at: int | None = None, lead_in: bool = False) -> Arm:
    return Arm(name=name, runner=Calls(seconds, fails_at), call_s=seconds, lead_in=lead_in, clock=NOW)


def test_each_round_takes_every_arm_once_in_changing_order() -> None:
    _, order, _ = rounds([arm("a"), arm("b"), arm("c")], precision=0)
    in_rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in in_rounds)
    assert len(set(in_rounds)) > 2


def test_rounds_stop_when_the_interval_is_narrow_enough() -> None:
    stopped_by, order, _ = rounds([arm("a", 0.002), arm("b", 0.002)], seconds=20, precision=0.5)
    assert stopped_by == "precision"
    assert len(order) == 2 * MIN_ROUNDS_FOR_PRECISION


def test_a_preview_of_a_slow_arm_ends_by_its_time() -> None:
    arms = [arm("a", 0.005), arm("again", 0.005), arm("slow", 0.08)]
    set_strides(arms, 1.0)
    assert arms[2].stride > MIN_ROUNDS_FOR_PRECISION  # one sample when the intervals are looked at
    limits = Limits(seconds=1.0, precision=0.01, min_rounds=1)
    stopped_by = run_rounds(
        arms,
        limits,
        seed=0,
        before=lambda arm: None,
        failed=lambda arm, error: None,
        after=lambda arms: None,
        clock=NOW,
    )
    assert stopped_by == "time"


def test_rounds_stop_when_the_time_is_up_but_never_before_six() -> None:
    stopped_by, order, _ = rounds([arm("a", 0.05), arm("b", 0.05)], seconds=0.01, precision=0)
    assert stopped_by == "time"
    assert len(order) == 2 * MIN_ROUNDS == 12
    stopped_by, order, _ = rounds([arm("a", 0.05), arm("b", 0.05)], seconds=0.75, precision=0)
    assert stopped_by == "time"
    assert len(order) == 16


def test_a_slow_arm_sits_rounds_out_and_stays_paired() -> None:
    arms = [arm("reference", 0.02), arm("fast", 0.01), arm("slow", 0.5)]
    set_strides(arms, 3)
    rounds(list(arms), seconds=3, precision=0)
    reference, fast, slow = arms
    assert len(slow.valid_samples) == MIN_ROUNDS
    assert len(reference.valid_samples) >= 3 * len(slow.valid_samples)
    assert len(reference.samples) == len(slow.samples)
    pairs = log_ratios(reference.samples, slow.samples)
    assert pairs == pytest.approx([math.log(0.02 / 0.5)] * MIN_ROUNDS)
    assert len(log_ratios(reference.samples, fast.samples)) == len(fast.valid_samples)


def test_every_arm_takes_part_where_there_is_time() -> None:
    arms = [arm("reference", 0.001), arm("slow", 0.05)]
    set_strides(arms, 3)
    assert [each.stride for each in arms] == [1, 1]


def test_a_slow_reference_still_gives_six_rounds() -> None:
    arms = [arm("reference", 0.9), arm("again", 0.9), arm("fast", 0.02)]
    set_strides(arms, 1)
    rounds(list(arms), seconds=1, precision=0.01)
    assert [len(each.valid_samples) for each in arms] == [MIN_ROUNDS] * 3


def test_rounds_stop_on_request_and_go_on_without_a_removed_arm() -> None:
    arms = [arm("a"), arm("b")]

    def after(left: list[Arm]) -> str | None:
        if len(left[0].samples) == 2:
            del left[1:]
        return "enough" if len(left[0].samples) == 5 else None

    limits = Limits(seconds=9, precision=0)
    reported = run_rounds(
        [*arms], limits, seed=0, before=lambda a: None, failed=lambda a, e: None, after=after, clock=NOW
    )
    assert reported == "enough"
    assert [len(each.samples) for each in arms] == [5, 2]


def test_an_arm_that_raises_leaves_and_the_others_stay_paired() -> None:
    arms = [arm("a"), arm("b", fails_at=4), arm("c")]
    left = list(arms)
    _, _, failures = rounds(left, precision=0)
    assert failures == ["b: planted"]
    assert [one.name for one in left] == ["a", "c"]
    assert len(arms[0].samples) == len(arms[2].samples) > 4
    assert len(arms[1].samples) == 3


def test_rounds_end_when_no_arm_is_left() -> None:
    stopped_by, _, failures = rounds([arm("a", fails_at=2)], precision=0)
    assert stopped_by == "failed"
    assert len(failures) == 1


def test_a_lead_in_is_as_long_as_the_sample_and_untimed() -> None:
    with_lead_in = arm("a", 0.002, lead_in=True)
    with_lead_in.sample()
    assert with_lead_in.runner.calls == 2  # type: ignore[attr-defined]
    assert with_lead_in.samples[0] == pytest.approx(0.002)


def test_calls_of_a_sample_fill_its_time_within_memory() -> None:
    assert measure_rounds.calls_for(0.001, 0.02, output_bytes=1) == 20
    assert measure_rounds.calls_for(3.0, 0.02, output_bytes=1) == 1
    assert measure_rounds.calls_for(1e-6, 0.02, output_bytes=1) == measure_rounds.MAX_CALLS
    assert measure_rounds.calls_for(1e-6, 0.02, output_bytes=2**27) == 2
    assert measure_rounds.calls_for(1e-6, 0.02, output_bytes=2**30) == 1


def test_runners_of_equal_speed_take_samples_of_as_many_calls() -> None:
    assert measure_rounds.shared_calls([0.0030, 0.0036, 0.0004, 0.02], 0.005, output_bytes=1) == [2, 2, 12, 1]
    assert measure_rounds.shared_calls([], 0.005, output_bytes=1) == []


def test_warm_up_lasts_until_two_samples_agree_and_its_minimum() -> None:
    class Warming(Calls):
        def wait(self, outputs: Sequence[object]) -> None:
            self.seconds = max(0.001, 0.8 * self.seconds)
            super().wait(outputs)

    runner, began = Warming(0.004), NOW.now
    settled = measure_rounds.warm_up(runner, call_s=0.004, min_s=0.02, sample_s=0.01, output_bytes=1, clock=NOW)
    assert settled == pytest.approx(0.001)
    assert 0.02 <= NOW.now - began < 0.2


def test_warming_up_ends_where_nothing_settles() -> None:
    class Unsettled(Calls):
        def wait(self, outputs: Sequence[object]) -> None:
            self.seconds = 0.003 - self.seconds
            super().wait(outputs)

    began = NOW.now
    measure_rounds.warm_up(Unsettled(0.001), call_s=0.001, min_s=0.02, sample_s=0.01, output_bytes=1, clock=NOW)
    assert 0.2 <= NOW.now - began < 0.25


def test_latency_is_of_single_calls() -> None:
    runner = Calls(0.001)
    assert measure_rounds.latency(runner, seconds=0.02, clock=NOW) == pytest.approx(0.001)
    assert runner.calls == 20
    assert measure_rounds.latency(runner, seconds=0.0, clock=NOW) == pytest.approx(0.001)
    assert runner.calls == 23
    measure_rounds.latency(runner, seconds=9.0, clock=NOW)
    assert runner.calls == 23 + measure_rounds.LATENCY_CALLS


def test_the_clock_is_the_machines_unless_another_is_given() -> None:
    started = time.perf_counter()
    seconds = measure_rounds.take_sample(Sleeping(), 3)
    assert 0.002 <= seconds <= (time.perf_counter() - started) / 3


class Sleeping(Calls):
    """A call that takes real time."""

    def __init__(self) -> None:
        super().__init__(0.002)

    def wait(self, outputs: Sequence[object]) -> None:
        time.sleep(self.seconds * len(outputs))


def test_an_arm_shares_rounds_with_its_dense_shape() -> None:
    masked, dense = arm("b", 0.03), arm("b", 0.02)
    dense.counterpart, masked.stride, dense.stride = "dense", 3, 2
    rounds([arm("a", 0.001), masked, dense], seconds=0.3, precision=0)
    assert len(log_ratios(dense.samples, masked.samples)) >= MIN_ROUNDS
    assert len(masked.samples) == len(dense.samples)


FAULTS = """
import sys
sys.stdin = type("NoInput", (), {"buffer": None})  # the worker fails at the assignment, and is set up by then
from contextlib import suppress
from attention.engine import worker
with suppress(AttributeError):
    worker.main()
import os
import numpy as np
from attention.measure.rounds import QUEUED_BYTES
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
before, count = resident(), QUEUED_BYTES * 3 // 4 >> 20
print(count << 20, file=sys.stderr)
for _ in range(3):
    for output in [np.empty(1 << 20, np.uint8) for _ in range(count)]:
        output[::4096] = 1
    del output
    print(resident() - before, file=sys.stderr)
"""
"""Prints the bytes of a sample's outputs, and how many are still resident once the outputs of a sample are freed; the
number of page faults depends on the size of the system's pages, too."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc")
def test_a_workers_samples_use_the_memory_of_those_before():
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, stderr=subprocess.PIPE, text=True)
    size, first, *_, last = map(int, done.stderr.split())
    assert first > 0.9 * size  # 192 MiB, which the next sample takes again
    assert abs(last - first) < 0.1 * size
