"""Inputs that an implementation changes are noticed."""

import mlx.core as mx
import pytest

from attention.engine.prepare import SharedInputs


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_inputs_scaled_by_a_power_of_two_are_noticed(factor: float) -> None:
    inputs = SharedInputs([mx.random.normal((1, 2, 32, 16), key=mx.random.key(0))])  # 1024 words
    views = inputs.views()
    inputs.check(views)
    views[0] *= factor
    with pytest.raises(ValueError, match="wrote into its inputs"):
        inputs.check(views)
