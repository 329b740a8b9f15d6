"""Layouts that MLX's own attention on CUDA fails on: implementations that hand over to it copy them, and only them."""

from collections.abc import Callable
from typing import Final

import mlx.core as mx
import pytest

from attention import attention
from attention.implementations.bounded.implementation import Practical

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA device")]

Lay = Callable[[mx.array], mx.array]
SCALE: Final = -0.125
"""No kernel of the project's takes a negative scale, so that they hand over to MLX's."""
MLX_SCALE: Final = 0.125
"""With a negative one cuDNN itself gives NaN."""


def _kept(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


LAYS: Final[dict[str, Lay]] = {
    "every third column": lambda x: _kept(mx.repeat(x, 3, axis=3))[..., ::3],
    "columns apart": lambda x: _kept(mx.contiguous(x.swapaxes(2, 3))).swapaxes(2, 3),
    "rows reversed": lambda x: _kept(mx.contiguous(x[:, :, ::-1]))[:, :, ::-1],
    "columns reversed": lambda x: _kept(mx.contiguous(x[..., ::-1]))[..., ::-1],
    "one row for all": lambda x: mx.broadcast_to(_kept(x[:, :, :1]), x.shape),
    "one head for all": lambda x: mx.broadcast_to(_kept(x[:1, :1]), x.shape),
    "heads inside of rows": lambda x: _kept(mx.contiguous(x.swapaxes(1, 2))).swapaxes(1, 2),
}


def inputs(queries: int, keys: int, dtype: mx.Dtype) -> list[mx.array]:
    shapes = (2, 4, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64)
    return [mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i, shape in enumerate(shapes)]


def attend(name: object, mask: str | None = None) -> Callable[..., mx.array]:
    scale = MLX_SCALE if name == "mlx" else SCALE
    return lambda q, k, v: attention(q, k, v, scale=scale, mask=mask, implementation=name)  # type: ignore[arg-type]


def largest_difference(one: mx.array, other: mx.array) -> float:
    return float(mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max().item())


@pytest.mark.parametrize("lay", LAYS)
@pytest.mark.parametrize(("queries", "keys"), [(8, 300), (1, 300), (128, 128)])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", ["mlx", "poc", "practical"])
def test_no_layout_changes_the_output(name: str, dtype: mx.Dtype, queries: int, keys: int, lay: str) -> None:
    laid = [LAYS[lay](x) for x in inputs(queries, keys, dtype)]
    dense = [mx.contiguous(x) for x in laid]
    assert largest_difference(attend(name)(*laid), attend(name)(*dense)) <= 0.02


@pytest.mark.parametrize("lay", LAYS)
@pytest.mark.parametrize("name", ["mlx", "poc", "practical"])
def test_no_layout_changes_the_gradients(name: str, lay: str) -> None:
    laid = [LAYS[lay](x) for x in inputs(128, 256, mx.bfloat16)]
    dense = [mx.contiguous(x) for x in laid]

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attend(name, "causal")(q, k, v)[..., ::-1].astype(mx.float32).square().sum()

    found, expected = (mx.grad(loss, argnums=(0, 1, 2))(*arrays) for arrays in (laid, dense))
    for one, other in zip(found, expected, strict=True):
        assert largest_difference(one, other) <= 0.02 * (1 + float(mx.abs(other).max().item()))


@pytest.mark.parametrize("array", ["keys", "values"])
def test_decoding_with_one_row_for_all_keys_is_no_crash(array: str) -> None:
    q, k, v = inputs(1, 512, mx.bfloat16)
    k, v = (LAYS["one row for all"](x) if which == array else x for x, which in ((k, "keys"), (v, "values")))
    found = attend("mlx")(q, k, v)
    assert largest_difference(found, attend("mlx")(q, mx.contiguous(k), mx.contiguous(v))) <= 0.02


def test_a_reversed_mask_is_taken() -> None:
    q, k, v = inputs(64, 128, mx.bfloat16)
    mask = mx.random.normal((64, 128), key=mx.random.key(9)).astype(mx.bfloat16)
    back = _kept(mx.contiguous(mask[:, ::-1]))[:, ::-1]
    found, expected = (attention(q, k, v, scale=SCALE, mask=x, implementation="practical") for x in (back, mask))
    assert largest_difference(found, expected) <= 0.02


def test_heads_inside_of_rows_are_not_copied() -> None:
    shapes = (1, 4096, 8, 64), (1, 4096, 8, 64), (1, 4096, 8, 64)
    q, k, v = (_kept(mx.random.normal(shape).astype(mx.bfloat16)).swapaxes(1, 2) for shape in shapes)
    call = attend(Practical())
    mx.eval(call(q, k, v))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call(q, k, v))
    assert mx.get_peak_memory() - before < 3 * q.nbytes  # the output and the negated query
