"""The monitor counts every call once, times some, and writes a report that fatui can store."""

import contextlib
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import pytest

import attention
from attention.core.errors import UsageError
from attention.core.results import Row
from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import Workload
from attention.implementations.autotune.implementation import Demo
from attention.implementations.autotune.store import Store
from attention.implementations.baseline import Baseline
from attention.measure.device import Device
from attention.monitoring.monitor import MAX_GAP, SHARE, Monitor, SamplingBudget
from tests.support.tuning_examples import FakeTime


def arrays(seq: int = 8) -> tuple[mx.array, mx.array, mx.array]:
    q, k, v = mx.random.normal((3, 1, 2, seq, 16), key=mx.random.key(0))
    return q, k, v


def rows_of(monitor: Monitor) -> list[Row]:
    return [row for case in monitor.report().cases for row in case.rows]


def rows(monitor: Monitor) -> dict[str, Row]:
    return {row.implementation: row for case in monitor.report().cases for row in case.rows}


def test_every_way_of_attending_is_counted_once() -> None:
    q, k, v = arrays()
    original = mx.fast.scaled_dot_product_attention
    with attention.monitor() as monitor:
        attention.attention(q, k, v, implementation="practical")  # calls MLX's own inside
        attention.attention(q, k, v, implementation="baseline")
        mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert mx.fast.scaled_dot_product_attention is original
    assert {name: row.reason.split(" calls")[0] for name, row in rows(monitor).items() if row.reason} == {
        "practical": "1",
        "baseline": "1",
        "mlx": "1",
    }
    assert rows(monitor)["baseline"].path == "manual, unfused"


def test_calls_of_a_patched_model_are_the_implementations() -> None:
    base = pytest.importorskip("mlx_lm.models.base")
    q, k, v = arrays()
    with attention.patch_mlx_lm("baseline"), attention.monitor() as monitor:
        base.scaled_dot_product_attention(q, k, v, None, 1.0, "causal")
    assert list(rows(monitor)) == ["baseline"]
    assert monitor.report().cases[0].workload.mask == "causal"


def a_models_direct_call(*arrays: mx.array, **more: object) -> mx.array:
    """A call of MLX's function by a module of mlx-lm."""
    names = {"__name__": "mlx_lm.models.direct", "mx": mx}
    exec("def call(*arrays, **more): return mx.fast.scaled_dot_product_attention(*arrays, scale=1.0, **more)", names)
    called: mx.array = names["call"](*arrays, **more)  # type: ignore[operator]
    return called


@pytest.mark.parametrize("monitored_first", [True, False])
def test_a_patched_direct_call_is_monitored_once(monitored_first: bool) -> None:
    pytest.importorskip("mlx_lm")
    monitor, patch = attention.monitor(), attention.patch_mlx_lm("practical")
    with monitor if monitored_first else patch, patch if monitored_first else monitor:
        for seq in (8, 9, 9):
            a_models_direct_call(*arrays(seq))
        a_models_direct_call(*arrays(9), stream=mx.cpu)  # is not taken
    assert (patch.calls_taken, patch.calls_handed) == (3, 1)
    assert [row.implementation for row in rows_of(monitor)] == ["practical", "practical", "mlx"]
    assert monitor.calls == 4


def test_what_a_patch_hands_to_mlx_lms_own_function_is_mlxs() -> None:
    base = pytest.importorskip("mlx_lm.models.base")
    q, k, v = arrays()
    with attention.patch_mlx_lm("baseline") as patch, attention.monitor() as monitor:
        base.scaled_dot_product_attention(q, k, v, None, 1.0, None, sinks=mx.zeros((2,)))
    assert patch.calls_handed == 1
    assert list(rows(monitor)) == ["mlx"]


class Asked(Baseline):
    """An implementation that counts the requests for its route."""

    name = "requested"
    times = 0

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        self.times += 1
        return super().route(workload, device, needs)


def test_growing_lengths_need_no_route_until_the_report() -> None:
    requested = Asked()
    with attention.monitor() as monitor:
        for seq in range(1, 40):
            attention.attention(*arrays(seq), implementation=requested)
        assert requested.times == 0
    assert [row.path for row in rows_of(monitor)] == ["manual, unfused"] * 39


def test_the_path_of_demo_is_what_its_trial_chose(tmp_path: Path) -> None:
    demo = Demo(store=Store(tmp_path / "tuning.toml"), budget_s=0.05)
    with attention.monitor() as monitor:
        attention.attention(*arrays(), implementation=demo)
    assert (rows(monitor)["demo"].path or "").startswith("tuned: ")


def test_timed_calls_have_time_and_memory() -> None:
    q, k, v = arrays(64)
    with attention.monitor(share=1e9) as monitor:
        for _ in range(3):
            mx.eval(attention.attention(q, k, v, implementation="baseline"))
    row = rows(monitor)["baseline"]
    assert len(row.samples) == 3
    assert row.call_s is not None
    assert row.peak_bytes is not None
    assert row.peak_bytes >= 2 * 64 * 64 * 4


@pytest.mark.compiles
def test_calls_that_are_traced_are_counted_and_not_timed() -> None:
    q, k, v = arrays()
    with attention.monitor(share=1e9) as monitor:
        mx.eval(mx.compile(lambda *a: attention.attention(*a, implementation="baseline"))(q, k, v))
    assert monitor.calls == 1
    assert rows(monitor)["baseline"].samples == ()


def test_an_exception_ends_the_watch_and_passes() -> None:
    original = mx.fast.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="mine"), attention.monitor():
        raise RuntimeError("mine")
    assert mx.fast.scaled_dot_product_attention is original


def test_a_saved_run_is_shown_by_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fatui.cli.main import main

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with attention.monitor(share=1e9) as monitor:
        attention.attention(*arrays(), implementation="baseline")
    monitor.save(tmp_path / "run.json")
    assert main(["history", "add", str(tmp_path / "run.json")]) == 0
    assert main(["history"]) == 0
    assert monitor.report().cases
    assert "monitor" in capsys.readouterr().out
    assert main(["history", "show", "last"]) == 0
    assert "baseline" in capsys.readouterr().out
    (tmp_path / "wrong.json").write_text("[]")
    assert main(["history", "add", str(tmp_path / "wrong.json")]) == 2
    assert main(["history", "add", str(tmp_path / "missing.json")]) == 2


def test_what_is_no_path_to_save_to_is_named() -> None:
    with pytest.raises(attention.UsageError, match=r"path: got 3; it takes a str or a pathlib\.Path"):
        attention.monitor().save(3)  # type: ignore[arg-type]


def test_a_full_disk_leaves_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = attention.monitor()
    path = tmp_path / "run.json"
    path.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        monitor.save(path)
    assert path.read_text() == "before"


class Program:
    """A series of calls of one length on a fake clock, which inspecting and timing advance too."""

    LOOK_S = 1.5e-6

    def __init__(self, call_s: float, share: float = SHARE, pass_s: float = 0.0) -> None:
        self.clock = FakeTime()
        self.call_s, self.pass_s = call_s, pass_s
        self.pace = SamplingBudget(share, self.LOOK_S, pass_s, self.clock)
        self.watching_s, self.timed, self.look_in = 0.0, 0, 1

    def run(self, calls: int) -> float:
        """The share of the time spent on monitoring."""
        began = self.clock.now
        self.watching_s = 0.0
        for number in range(calls):
            self.clock.now += self.call_s
            self.look_in -= 1
            if self.look_in:
                self.spend(self.pass_s)
                continue
            self.look_in = self.pace.next_sample()
            self.spend(self.LOOK_S)
            if number % MAX_GAP == 0 and self.pace.may_time(self.call_s):
                self.pace.spent_s += self.call_s
                self.watching_s += self.call_s  # its work had to be done: counted, though no time of its own
                self.timed += 1
            elif number % MAX_GAP:
                self.pace.may_time(1e9)
        return self.watching_s / (self.clock.now - began)

    def spend(self, seconds: float) -> None:
        self.clock.now += seconds
        self.watching_s += seconds


@pytest.mark.parametrize("share", ["x", None, -1, float("nan"), True])
def test_a_share_that_is_none_is_refused_at_once(share: Any) -> None:
    with pytest.raises(UsageError, match="share: got"):
        attention.monitor(share)


@pytest.mark.parametrize("call_s", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2])
def test_monitoring_stays_within_its_share_for_short_calls(call_s: float) -> None:
    program = Program(call_s)
    program.run(2000)  # until it has found its pace
    assert program.run(20_000) <= SHARE + 1e-9
    assert program.timed > 0


def test_what_calls_cost_that_go_by_leaves_less_for_looking() -> None:
    free, costly = Program(1e-4), Program(1e-4, pass_s=2.5e-7)
    for program in (free, costly):
        program.run(2000)
        assert program.run(20_000) <= SHARE + 1e-9
        assert program.timed > 0
    assert costly.pace.stride > free.pace.stride


def test_sampling_goes_on_where_the_hook_exceeds_the_share() -> None:
    program = Program(2e-6, pass_s=2.5e-7)
    program.run(20_000)
    assert program.pace.stride <= 256


def test_long_calls_are_all_sampled_and_short_ones_less_often() -> None:
    program = Program(1e-3)
    program.run(1000)
    assert program.pace.stride == 1
    assert program.pace.sampled == 1000
    program.call_s = 2e-5
    program.run(1000)
    assert program.pace.stride == 32
    program.call_s = 1e-3
    program.run(5000)
    assert program.pace.stride == 1


@pytest.mark.thorough
def test_nested_calls_are_not_counted_however_fast() -> None:
    q, k, v = arrays()
    with attention.monitor() as monitor:
        for _ in range(10_000):
            attention.attention(q, k, v, implementation="mlx")  # calls MLX's own inside
    assert [row.implementation for row in rows_of(monitor)] == ["mlx"]
    assert monitor.calls == pytest.approx(10_000, rel=0.1)


@pytest.mark.thorough
def test_a_sampled_call_stands_for_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # the real pace depends on the machine: of one in 256 calls, too few are counted for a share
    monkeypatch.setattr(SamplingBudget, "_adapt", lambda self, now: setattr(self, "stride", 16))
    q, k, v = arrays()
    calls = 20_000
    with attention.monitor() as monitor:
        for number in range(calls):
            mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal" if number % 4 == 0 else None)
    assert monitor.calls == pytest.approx(calls, rel=0.1)
    reported = [(row.reason or "").split(" calls")[0] for row in rows_of(monitor)]
    assert all(words.startswith("about ") for words in reported)
    counts = [int(words.removeprefix("about ").replace(",", "")) for words in reported]
    assert min(counts) / monitor.calls == pytest.approx(0.25, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("seq", [32, 96, 192])
def test_watching_a_real_program_costs_at_most_its_share(seq: int) -> None:
    limit = 1 + SHARE
    assert watched_over_not(seq) <= limit or watched_over_not(seq) <= limit  # others may be busy at one time


def watched_over_not(seq: int) -> float:
    """Return the CPU time of a monitored program relative to the same program unmonitored."""
    q, k, v = arrays(seq)
    ratios = []
    for number in range(81 if seq == 32 else 41):  # the shorter a call, the more it varies
        seconds = {}
        for watched in (False, True) if number % 2 else (True, False):
            with attention.monitor() if watched else contextlib.nullcontext():
                for _ in range(200):  # finds its pace
                    mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0))
                started = time.process_time()
                for _ in range(500):
                    mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0))
                seconds[watched] = time.process_time() - started
        ratios.append(seconds[True] / seconds[False])
    return median(ratios)
