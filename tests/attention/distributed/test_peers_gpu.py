"""Peer copies between two processes: what is copied, computed of it and merged is the same as on one device."""

import sys

import mlx.core as mx
import pytest

from benchmarks.distributed.start import start_ranks

pytestmark = pytest.mark.gpu
TWO_GPUS = pytest.mark.skipif(
    not mx.distributed.is_available("nccl") or mx.device_count(mx.gpu) < 2, reason="needs two GPUs"
)


@pytest.mark.parametrize("backend", ["ring", pytest.param("nccl", marks=TWO_GPUS)])
@pytest.mark.parametrize("check", ["peers", "one launch", "merges"])
def test_peers_give_what_one_device_computes(check: str, backend: str):
    """Over ring the two share a GPU."""
    command = [sys.executable, "-m", "tests.support.rank_checks", check]
    results = start_ranks(2, command, backend, timeout_s=120)
    assert all(result.returncode == 0 for result in results), "\n".join(result.output for result in results)


@TWO_GPUS
def test_layouts_and_masks_over_nccl_equal_float64():
    results = start_ranks(2, [sys.executable, "-m", "tests.support.rank_checks", "few"], "nccl", timeout_s=300)
    assert all(result.returncode == 0 for result in results), "\n".join(result.output for result in results)
