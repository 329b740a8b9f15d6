"""Peer copies between two processes, which may share a GPU: what is copied is the same."""

import sys

import pytest

from benchmarks.distributed.start import start_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", ["peers", "one launch"])
def test_peers_give_what_one_device_computes(check: str):
    command = [sys.executable, "-m", "tests.support.rank_checks", check]
    results = start_ranks(2, command, timeout_s=120)
    assert all(result.returncode == 0 for result in results), "\n".join(result.output for result in results)
