"""Inputs that an implementation changes are noticed."""

import mlx.core as mx
import pytest

from attention.engine.prepare import SharedInputs
from attention.quantized_kv import QuantizedArray, quantized


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_inputs_scaled_by_a_power_of_two_are_noticed(factor: float) -> None:
    inputs = SharedInputs([mx.random.normal((1, 2, 32, 16), key=mx.random.key(0))])  # 1024 words
    views = inputs.views()
    inputs.check(views)
    views[0] *= factor
    with pytest.raises(ValueError, match="wrote into its inputs"):
        inputs.check(views)


@pytest.mark.parametrize("part", range(3))
def test_quantized_inputs_that_change_are_noticed(part: int) -> None:
    keys = quantized(mx.random.normal((1, 2, 16, 32), key=mx.random.key(0)), "int4:32")
    inputs = SharedInputs([keys])
    (view,) = inputs.views()
    assert isinstance(view, QuantizedArray)
    inputs.check([view])
    changed = list(view.arrays)
    changed[part] = changed[part] + mx.ones((), changed[part].dtype)
    with pytest.raises(ValueError, match="wrote into its inputs"):
        inputs.check([view.with_arrays(changed)])
