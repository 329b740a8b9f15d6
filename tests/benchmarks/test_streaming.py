"""The benchmark of streams."""

import sys

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
