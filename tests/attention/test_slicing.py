"""Attention in slices: what they wait for. That they are right is tested with the other implementations."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from attention.implementations.blocks import Blocks
from attention.implementations.slicing import Slices, sliced_behind
from attention.implementations.waiting import Turns, when_done
from attention.masks import Mask

ROWS = 16
BLOCKS = Blocks(batches=1, kv_heads=1, rows=ROWS, keys=64)


def arrays() -> list[mx.array]:
    made = [mx.random.normal((1, 2, 64, 8), key=key) for key in mx.random.split(mx.random.key(0), 4)]
    mx.eval(made)
    return made


def test_a_backward_pass_waits_for_the_output_of_the_forward_pass_whatever_its_cotangent() -> None:
    alone: list[mx.array] = []
    following: list[mx.array] = []

    def spied(waited: list[mx.array], these: Sequence[mx.array]) -> list[mx.array]:
        waited.append(these[0])
        return when_done(these)

    def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3)

    turns = Turns(partial(spied, following), partial(spied, alone))
    call = Slices(scale=0.3, mask=Mask(), blocks=BLOCKS, turns=turns)
    *inputs, cotangent = arrays()
    outputs, gradients = mx.vjp(sliced_behind(whole, call), inputs, [cotangent])
    assert np.array_equal(alone[0], outputs[0])
    assert len(alone) == 1 + 2  # and for the sums of each of the heads
    assert len(following) == 2 * 64 // ROWS
    _, wanted = mx.vjp(whole, inputs, [cotangent])
    assert all(mx.allclose(one, other, atol=1e-5) for one, other in zip(gradients, wanted, strict=True))
