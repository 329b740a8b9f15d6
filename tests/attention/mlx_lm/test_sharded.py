import sys

import pytest

from attention import patch_mlx_lm
from attention.core.errors import UsageError
from benchmarks.distributed.start import start_ranks
from tests.support.patience import patient

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")


def assert_models_agree(ranks: int, *checks: str, timeout_s: float = 120) -> None:
    command = [sys.executable, "-m", "tests.support.rank_models", *checks]
    results = start_ranks(ranks, command, timeout_s=patient(timeout_s))
    assert all(result.returncode == 0 for result in results), "\n".join(result.output for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_models_over_ranks_equal_one_process(ranks: int):
    assert_models_agree(ranks, "many", timeout_s=600)


def test_sharded_model_needs_its_open_patch():
    import mlx.core as mx

    from tests.support.tiny_models import tiny

    model = patch_mlx_lm("practical", group=mx.distributed.init()).sharded(tiny("llama"))
    with pytest.raises(UsageError, match="model: a sharded model runs while its patch is open"):
        model(mx.zeros((1, 4), mx.int32))


def test_sharded_model_refuses_other_caches():
    import mlx.core as mx

    from tests.support.tiny_models import tiny

    model = patch_mlx_lm("practical", group=mx.distributed.init()).sharded(tiny("gpt_oss"))
    with pytest.raises(UsageError, match="model: got one with a RotatingKVCache; over several ranks it takes plain"):
        model.make_cache()
