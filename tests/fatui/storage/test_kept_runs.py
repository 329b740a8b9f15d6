"""Stored runs of other machines: they still load, and statements about them hold."""

from pathlib import Path

import msgspec
import pytest

from attention.core.results import Report

KEPT = sorted((Path(__file__).parents[2] / "data").glob("*.json"))


def kept(name: str) -> Report:
    return msgspec.json.decode((Path(__file__).parents[2] / "data" / name).read_bytes(), type=Report)


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_every_row_of_a_kept_run_is_accurate(path: Path) -> None:
    report = msgspec.json.decode(path.read_bytes(), type=Report)
    rows = [row for case in report.cases for row in case.rows]
    assert {row.status for row in rows} == {"ok"}
    assert {row.implementation for row in rows} == {"baseline", "poc", "practical", "demo", "mlx", "torch"}


@pytest.mark.parametrize("name", ["h100-prefill.json", "h200-prefill.json"])
def test_at_head_dim_256_the_cuda_kernel_beats_mlx(name: str) -> None:
    case = kept(name).cases[-1]
    rows = {row.implementation: row for row in case.rows}
    poc, mlx = rows["poc"], rows["mlx"]
    assert case.workload.head_dim == 256
    assert poc.speedup and mlx.speedup and poc.speedup.low > 6 * mlx.speedup.high
    assert poc.peak_bytes and mlx.peak_bytes and poc.peak_bytes < mlx.peak_bytes / 30


@pytest.mark.parametrize("name", ["h100-seed-table.json", "h100-prefill.json", "h100-training.json"])
def test_the_cuda_kernel_beats_mlx_and_torch_on_the_h100(name: str) -> None:
    for case in kept(name).cases:
        speedups = {row.implementation: row.speedup for row in case.rows}
        poc, mlx, torch = speedups["poc"], speedups["mlx"], speedups["torch"]
        assert poc and mlx and torch
        assert poc.low > max(mlx.high, torch.value)
