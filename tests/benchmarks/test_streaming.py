"""The benchmark of streams."""

import sys

import numpy as np
import pytest

from benchmarks import streaming
from tests.support.marks import thorough


@pytest.mark.usefixtures("compiled_kernel")
@pytest.mark.parametrize("mode", [thorough("run"), "queued"])
def test_a_short_run_prints_its_figures(mode, monkeypatch, capsys):
    """Ten tenths with the memory, or the time of a token in each format."""
    monkeypatch.setattr(streaming, "BLOCK", 5)
    monkeypatch.setattr(streaming, "BARE_BLOCK", 3)
    monkeypatch.setattr(streaming, "QUEUED", 2)
    arguments = ["--tokens", "50", "--window", "32", "--rope", "--format", "none", "--format", "int8"]
    monkeypatch.setattr(sys, "argv", ["streaming", mode, *arguments])
    streaming.main()
    out = capsys.readouterr().out
    assert out.count("position 143") == (2 if mode == "run" else 0)
    assert ("x" in out.splitlines()[-1]) == (mode == "queued")


@pytest.mark.parametrize("ahead", [0, 2])
def test_calls_wait_for_the_one_so_many_before(ahead, monkeypatch):
    """With `ahead` each output is started at once and evaluated that many calls later; at the end none is left."""
    evaluated = []
    monkeypatch.setattr(streaming.mx, "async_eval", lambda output: evaluated.append(("begun", output)))
    monkeypatch.setattr(streaming.mx, "eval", lambda output: evaluated.append(("waited", output)))
    times = np.zeros(4)
    streaming.timed(lambda i: i, times, ahead)
    waited = [output for kind, output in evaluated if kind == "waited"]
    assert waited == ([0, 1, 2, 3, []] if ahead == 0 else [None, None, -2, -1, 0, 1, [2, 3]])
    assert [output for kind, output in evaluated if kind == "begun"] == ([] if ahead == 0 else [-2, -1, 0, 1, 2, 3])
    assert (times > 0).all()


def test_times_ahead_are_means_of_the_last_ones(monkeypatch):
    """Calls that take one and three seconds in turn take two each in the mean of two."""
    clock = [0.0]
    monkeypatch.setattr(streaming.mx, "async_eval", lambda output: None)
    monkeypatch.setattr(streaming.mx, "eval", lambda output: None)
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: clock[0])

    def call(i):
        clock[0] += 1 + 2 * (i % 2)

    times = np.zeros(6)
    streaming.timed(call, times, 2)
    assert times.tolist() == [2, 2, 2, 2, 2, 2]
    streaming.timed(call, times)
    assert times.tolist() == [1, 3, 1, 3, 1, 3]
