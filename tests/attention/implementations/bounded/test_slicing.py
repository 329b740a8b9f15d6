"""Attention in slices: their boundaries and dependencies. Their results are tested with the other implementations."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from attention.implementations.bounded import slicing
from attention.implementations.bounded.blocks import Blocks
from attention.implementations.bounded.blockwise import HeadGroup
from attention.implementations.bounded.memory import UNORDERED, Chain, TileOrder, depend, fence_on_completion
from attention.implementations.bounded.slicing import SlicedParams, row_blocks, slices_of, with_sliced_backward
from attention.masks import Mask

ROWS = 16
BLOCKS = Blocks(batches=1, kv_heads=1, rows=ROWS, keys=64)


def arrays() -> list[mx.array]:
    made = [mx.random.normal((1, 2, 64, 8), key=key) for key in mx.random.split(mx.random.key(0), 4)]
    mx.eval(made)
    return made


def test_backward_waits_for_forward_whatever_the_cotangent() -> None:
    alone: list[mx.array] = []
    following: list[mx.array] = []

    def spied(waited: list[mx.array], these: Sequence[mx.array]) -> list[mx.array]:
        waited.append(these[0])
        return fence_on_completion(these)

    def whole(q: mx.array, k: mx.array, v: mx.array, *_: list[mx.array]) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3)

    turns = TileOrder(partial(spied, following), partial(spied, alone))
    call = SlicedParams(scale=0.3, mask=Mask(), blocks=BLOCKS, order=turns)
    *inputs, cotangent = arrays()
    outputs, gradients = mx.vjp(lambda *x: with_sliced_backward(whole, call)(*x, [], []), inputs, [cotangent])
    assert np.array_equal(alone[0], outputs[0])
    assert len(alone) == 1 + 2  # and for the sums of each of the heads
    assert len(following) == 2 * 64 // ROWS
    _, wanted = mx.vjp(whole, inputs, [cotangent])
    assert all(mx.allclose(one, other, atol=1e-5) for one, other in zip(gradients, wanted, strict=True))


def test_what_makes_a_last_slice_odd_is_one_by_itself() -> None:
    assert list(row_blocks(1500, 768)) == [range(768), range(768, 1408), range(1408, 1500)]
    assert list(row_blocks(1536, 768)) == [range(768), range(768, 1536)]
    assert list(row_blocks(1500, 1500)) == [range(1500)]
    assert list(row_blocks(1500, 1408)) == [range(1408), range(1408, 1500)]


def test_slices_of_a_window_take_multiples_of_16_keys() -> None:
    call = SlicedParams(
        scale=1.0, mask=Mask(window=701), blocks=Blocks(batches=1, kv_heads=1, rows=384, keys=1), order=UNORDERED
    )
    made = list(slices_of(HeadGroup(range(1), range(1), 1), 2999, 2999, call))
    assert [len(each.keys) for each in made] == [384, 768, *[1088] * 5, 960, 768]
    assert all(each.keys.stop == each.rows.stop for each in made)
    assert all(each.rows.start - 700 - 16 < each.keys.start <= max(0, each.rows.start - 700) for each in made)


def test_the_mask_of_a_window_is_made_with_its_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[tuple[int, ...]] = []

    after = Chain.after

    def spied(chain: Chain, *these: mx.array) -> list[mx.array]:
        waiting.extend(one.shape for one in these if chain.links and one.dtype == mx.bool_)
        return after(chain, *these)

    monkeypatch.setattr(Chain, "after", spied)
    q, k, v, _ = arrays()
    call = SlicedParams(
        scale=0.3, mask=Mask(window=20), blocks=BLOCKS, order=TileOrder(fence_on_completion, fence_on_completion)
    )
    made = slicing.forward(q, k, v, call)
    assert waiting == [(16, 32), (16, 48), (16, 48), *[(16, 16), (16, 32), (16, 48), (16, 48)]]
    whole = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=Mask(window=20).materialize(64, 64))
    assert mx.allclose(made, whole, atol=1e-5)


def test_arrays_that_wait_for_mapped_ones_are_mapped() -> None:
    def of_two(x: mx.array) -> mx.array:
        (kept,) = depend([mx.arange(128.0).reshape(1, 2, 16, 4)], [x])
        return x + mx.unflatten(kept, 1, (1, 2)).sum()

    assert mx.vmap(of_two)(mx.array([1.0, 2.0])).tolist() == [8129.0, 8130.0]
