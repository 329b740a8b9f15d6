import sys

import pytest

from benchmarks.distributed.start import start_ranks
from tests.support.patience import patient

MODULE = "tests.support.rank_checks"


def assert_ranks_agree_with_float64(ranks: int, *checks: str, timeout_s: float = 120) -> None:
    results = start_ranks(ranks, [sys.executable, "-m", MODULE, *checks], timeout_s=patient(timeout_s))
    assert all(result.returncode == 0 for result in results), "\n".join(result.output for result in results)


@pytest.mark.thorough
@pytest.mark.compiles
def test_two_ranks_equal_float64_attention():
    assert_ranks_agree_with_float64(2, "few")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_all_layouts_and_masks_equal_float64(ranks: int):
    assert_ranks_agree_with_float64(ranks, "many", timeout_s=900)
