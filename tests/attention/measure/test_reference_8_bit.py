"""The accuracy of results in 8 bits is judged by a published recipe."""

import mlx.core as mx
import numpy as np
import pytest

from attention.core.workload import Workload
from attention.measure.accuracy import AccuracyChecker
from attention.measure.reference import Rules, e4m3, recipe_output
from tests.support import fp8_model

WORKLOAD = Workload(seq=300, heads=1, head_dim=64, dtype="float16", mask="causal")


def inputs(outliers: bool = False) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    q, k, v = (random.standard_normal((300, 64)).astype(np.float16).astype(np.float64) for _ in range(3))
    k[:, [3, 40]] += np.array([30.0, -45.0]) * outliers
    return [q, k, v]


def judged(error_factor: float, outliers: bool = False) -> tuple[bool, str]:
    """Judge the kernels' recipe, its error times a factor."""
    made = inputs(outliers)
    exact = fp8_model.exact(*made, 0.125, causal=True)
    found = exact + error_factor * (fp8_model.kernel_recipe(*made, 0.125, causal=True) - exact)
    arrays = [mx.array(x.astype(np.float32)).astype(mx.float16)[None, None] for x in [*made, found]]
    result = AccuracyChecker(WORKLOAD, arrays[:3], 0.125).check(arrays[3:], approximate="fp8")
    return result.accurate, result.detail


def test_e4m3_rounds_as_its_codes_do() -> None:
    values = fp8_model.decode(np.arange(127))
    assert np.array_equal(e4m3(values), values)
    middle = (values[1:] + values[:-1]) / 2
    assert np.array_equal(e4m3(middle), np.where(np.arange(126) % 2, values[1:], values[:-1]))
    assert e4m3(np.array([1e5, -500.0])).tolist() == [448, -448]


@pytest.mark.parametrize("outliers", [False, True])
def test_the_recipe_has_the_error_of_the_published_one(outliers: bool) -> None:
    made = inputs(outliers)
    exact = fp8_model.exact(*made, 0.125, causal=True)
    error = fp8_model.relative_rmse(recipe_output(*made, Rules(scale=0.125, causal=True)), exact)
    published = fp8_model.relative_rmse(fp8_model.sage(*made, 0.125, causal=True), exact)
    assert error == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_recipe_passes_and_three_times_its_error_fails(outliers: bool) -> None:
    assert judged(1, outliers)[0]
    accurate, detail = judged(3, outliers)
    assert not accurate
    assert "allowed in fp8" in detail


def test_nan_never_passes_in_8_bits() -> None:
    arrays = [mx.array(x.astype(np.float32)).astype(mx.float16)[None, None] for x in inputs()]
    out = mx.full((1, 1, 300, 64), mx.nan, mx.float16)
    assert not AccuracyChecker(WORKLOAD, arrays).check([out], approximate="fp8").accurate
