"""Results do not depend on the size of a call: they are equal within and beyond a memory budget."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from attention import QuantizedArray, UnsupportedError, attention, quantized
from attention.implementations.bounded.blocks import Blocks
from attention.implementations.bounded.blockwise import BlockwiseParams, exact_product
from attention.implementations.bounded.blockwise_gradient import blockwise
from attention.implementations.bounded.implementation import Practical
from attention.masks import Mask
from tests.support.marks import slow, thorough
from tests.support.stacks import SMALL_STACK, on_a_stack

BUDGETS = [None, 1 << 16]
"""A budget that a small call fits, and one that cuts it into blocks."""


def normal(*shape: int, key: int = 0) -> mx.array:
    made: mx.array = mx.random.normal(shape, key=mx.random.key(key))
    return made


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("size", [1e-30, 1.0, 200.0, 1e4, 1e30])
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_whose_first_keys_are_hidden_keep_their_mean(budget: int | None, size: float) -> None:
    q, k, v = mx.ones((1, 1, 64, 64)), mx.full((1, 1, 256, 64), -1 / 64), normal(1, 1, 256, 8)
    for more in ({"mask": mx.arange(256) >= 128}, {"window": 16}):
        got = attention(q, k, v, scale=size, implementation=Practical(budget), **more)[0, 0, -1]
        seen = v[0, 0, 128:] if "mask" in more else v[0, 0, -16:]
        assert np.allclose(np.array(got), np.array(seen.mean(axis=0)), atol=1e-5)


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("hidden", [slow(-1e9), float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_hidden_by_large_numbers_have_the_mean_gradient(budget: int | None, hidden: float) -> None:
    q, k, v = (normal(1, 1, 128, 32, key=key) for key in range(3))
    mask = mx.full((128, 128), hidden)
    gradient = mx.grad(lambda v: attention(q, k, v, mask=mask, implementation=Practical(budget)).sum())(v)
    assert np.allclose(np.array(gradient), 1.0, atol=1e-4)


@pytest.mark.parametrize(
    "implementation", ["baseline", Practical(), Practical(1 << 16)], ids=["baseline", "whole", "blocks"]
)
def test_float16_rows_at_the_lowest_number_are_no_nan(implementation: object) -> None:
    q, k, v = mx.full((1, 1, 4, 16), -3.0), mx.full((1, 1, 8, 16), 3.0), mx.ones((1, 1, 8, 16))
    q, k, v = (x.astype(mx.float16) for x in (q, k, v))
    mask = mx.full((4, 8), -65504.0, mx.float16)
    assert mx.all(attention(q, k, v, mask=mask, implementation=implementation) == 1.0).item()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "implementation", ["baseline", Practical(), Practical(1 << 16)], ids=["baseline", "whole", "blocks"]
)
def test_float16_scores_beyond_its_range_are_right(implementation: object) -> None:
    q, k = (mx.sign(normal(1, 1, 64, 64, key=key)) * 200 for key in range(2))
    v = normal(1, 1, 64, 64, key=2)
    q, k, v = (x.astype(mx.float16) for x in (q, k, v))
    wanted = attention(*(x.astype(mx.float32) for x in (q, k, v)), scale=1.0, implementation="baseline")
    got = attention(q, k, v, scale=1.0, implementation=implementation)  # type: ignore[arg-type]
    assert np.allclose(np.array(got), np.array(wanted), atol=5e-3)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("shape", [(1, 4, 60, 70), (2, 1, 60, 70), (60, 70), (60, 1), (70,), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "implementation", [*map(Practical, BUDGETS), "poc", "mlx"], ids=["whole", "blocks", "poc", "mlx"]
)
def test_an_additive_mask_gets_its_gradient(
    implementation: object, softcap: float | None, shape: tuple[int, ...]
) -> None:
    if implementation == "mlx" and softcap:
        pytest.skip("MLX's SDPA has no softcap")
    q, k, v = normal(2, 4, 60, 16), normal(2, 2, 70, 16, key=1), normal(2, 2, 70, 8, key=2)
    mask, way = normal(*shape, key=3), normal(2, 4, 60, 8, key=4)

    def gradient(implementation: object) -> mx.array:
        def loss(mask: mx.array) -> mx.array:
            return (attention(q, k, v, mask=mask, softcap=softcap, implementation=implementation) * way).sum()  # type: ignore[arg-type]

        made: mx.array = mx.grad(loss)(mask)
        return made

    assert np.allclose(np.array(gradient(implementation)), np.array(gradient("baseline")), atol=1e-4)


@pytest.mark.parametrize("budget", [None, slow(1 << 16)])
def test_vmap_of_gradients_gives_each_its_own(budget: int | None) -> None:
    q, k, v = normal(3, 1, 4, 40, 16), normal(3, 1, 2, 50, 16, key=1), normal(3, 1, 2, 50, 16, key=2)
    mask = normal(3, 4, 40, 50, key=3)

    def loss(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
        return mx.square(attention(q, k, v, mask=mask, softcap=3.0, implementation=Practical(budget))).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    mapped = mx.vmap(gradient)(q, k, v, mask)
    for index in range(3):
        for got, wanted in zip(mapped, gradient(q[index], k[index], v[index], mask[index]), strict=True):
            assert np.allclose(np.array(got[index]), np.array(wanted), atol=1e-4)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("shape", [(3, 1, 1, 13, 13), (3, 1, 1, 13, 1), (3, 1, 1, 1, 13)], ids=str)
@pytest.mark.parametrize("implementation", ["baseline", "mlx", "practical", slow("blocks"), "poc"])
def test_vmap_of_bool_masks_gives_each_call_its_own(implementation: str, shape: tuple[int, ...]) -> None:
    """MLX's own `&` and `|` are wrong under vmap if one side is not mapped, such as a window."""
    chosen = Practical(4096) if implementation == "blocks" else implementation
    q, k, v = (normal(3, 1, 4, 13, 16, key=n) for n in range(3))
    mask = mx.random.bernoulli(0.6, shape, key=mx.random.key(3))

    def call(q: mx.array, mask: mx.array) -> mx.array:
        return attention(q, k[0], v[0], mask=mask, window=5, implementation=chosen)

    for axes, given in (((0, 0), (q, mask)), ((None, 0), (q[0], mask)), ((0, None), (q, mask[0]))):
        mapped = mx.vmap(call, in_axes=axes)(*given)
        for index in range(3):
            alone = call(*(x if axis is None else x[index] for x, axis in zip(given, axes, strict=True)))
            assert np.allclose(np.array(mapped[index]), np.array(alone), atol=1e-4)


def test_gradients_cancel_in_tiles_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuBLAS's do: a row with one visible key has weight 1 and no gradient of its query, whatever the score."""
    plain = BlockwiseParams.scores

    def in_another_order(self: BlockwiseParams, query: mx.array, transposed: mx.array) -> mx.array:
        return plain(self, query, transposed) * (1 + 1e-6 * query.shape[-2] / transposed.shape[-1])

    monkeypatch.setattr(BlockwiseParams, "scores", in_another_order)
    params = BlockwiseParams(
        1.0, Mask(causal=True, window=1), None, Blocks(batches=1, kv_heads=1, rows=8, keys=8), "wide"
    )
    both = blockwise(params, structs.replace(params, blocks=Blocks(batches=1, kv_heads=1, rows=2, keys=1)))
    q, k, v = (200 * normal(1, 1, 16, 16, key=n) for n in range(3))
    gradient = mx.grad(lambda q, k: both(q, k, v, [], [])[0].sum(), argnums=(0, 1))
    assert all(mx.abs(found).max().item() == 0 for found in gradient(q, k))


@pytest.mark.thorough
@pytest.mark.parametrize("mode", [slow("compile"), "gradient"])
@pytest.mark.compiles
def test_the_depth_of_a_graph_does_not_grow_with_its_tiles(mode: str) -> None:
    q, k, v = (mx.zeros((1, 1, 2048, 8)) for _ in range(3))

    def loss(*x: mx.array) -> mx.array:
        return attention(*x, mask="causal", implementation=Practical(1 << 19)).sum()

    def trace() -> mx.array | tuple[mx.array, ...]:
        return (mx.compile(loss) if mode == "compile" else mx.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    made = on_a_stack(SMALL_STACK, trace)
    assert made.shape == () if mode == "compile" else [x.shape for x in made] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("implementation", ["baseline", "practical", "poc", "mlx"])
@pytest.mark.parametrize(
    "mask", [mx.array(True), mx.array(0.5), mx.arange(9) < 5, mx.zeros((1,))], ids=["b", "f", "L", "1"]
)
def test_masks_of_no_or_one_axis_broadcast(mask: mx.array, implementation: str) -> None:
    q, k, v = (normal(2, 4, 9, 16, key=key) for key in range(3))
    wanted = attention(q, k, v, mask=mx.broadcast_to(mask, (9, 9)), implementation="baseline")
    assert mx.allclose(attention(q, k, v, mask=mask, implementation=implementation), wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["baseline", "practical", "poc"])
@pytest.mark.parametrize("softcap", [1e-30, 1e-10, 1e10, 1e30])
def test_softcaps_of_any_size_are_right(softcap: float, implementation: str) -> None:
    q, k, v = (normal(1, 2, 9, 16, key=key) for key in range(3))
    got = attention(q, k, v, softcap=softcap, implementation=implementation)
    wanted = attention(q, k, v, implementation="baseline") if softcap > 1 else v.mean(axis=2, keepdims=True)
    assert mx.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["baseline", "practical", "poc", "mlx"])
def test_a_batch_larger_than_a_benchmark_takes_is_taken(implementation: str) -> None:
    q = normal(70_000, 1, 1, 1)
    assert mx.allclose(attention(q, q, q, implementation=implementation), q)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("implementation", ["poc", Practical(), Practical(1 << 16)], ids=["poc", "whole", "blocks"])
def test_a_row_with_an_infinite_score_is_not_an_empty_one(implementation: object, value: float) -> None:
    q, k, v = (normal(1, 1, 40, 8, key=key) for key in range(3))
    q[0, 0, 5, 0] = value * mx.sign(k[0, 0, 2, 0])
    out, logsumexp = attention(q, k, v, mask="causal", return_lse=True, implementation=implementation)  # type: ignore[call-overload]
    assert mx.isnan(out[0, 0, 5]).all()
    assert mx.isneginf(logsumexp).sum() == 0
    assert mx.isfinite(logsumexp).sum() == 39


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_without_keys_a_sink_of_minus_infinity_gives_0(kind: str, dtype: mx.Dtype) -> None:
    q, k, v = (normal(1, 2, length, 8, key=length).astype(dtype) for length in (5, 3, 4))
    v, sees = v[:, :, :3], mx.arange(5)[:, None] - 2 >= mx.arange(3)
    array = {"causal": None, "bool": sees, "additive": mx.where(sees, 0.0, -mx.inf)}[kind]
    mask, sinks = Mask(causal=kind == "causal", array=array), mx.array([-mx.inf, 0.5], dtype)
    out = Practical()(q, k, v, scale=0.3, mask=mask, sinks=sinks)
    assert (out[:, :, :2] == 0).all()
    assert mx.allclose(out[:, :1], Practical()(q, k, v, scale=0.3, mask=mask)[:, :1], atol=2e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["baseline", "mlx", "practical", "poc"])
def test_a_row_of_a_mask_with_a_nan_is_not_an_empty_one(name: str, dtype: mx.Dtype) -> None:
    q, k, v = (normal(1, 1, 40, 8, key=key).astype(dtype) for key in range(3))
    mask = mx.zeros((40, 40))
    mask[5, 2], mask[6], mask[7] = np.nan, np.nan, -np.inf
    out = attention(q, k, v, mask=mask, implementation=name)
    assert mx.isnan(out[0, 0, 5:7]).all()
    assert (out[0, 0, 7] == 0).all()
    assert mx.isfinite(out).sum() == 38 * 8


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    "implementation", ["baseline", Practical(), Practical(1 << 16)], ids=["baseline", "whole", "blocks"]
)
def test_second_derivatives_and_tangents_are_those_of_float64(implementation: object) -> None:
    q, k, v, way = (normal(1, 2, 40, 8, key=key) for key in range(4))

    def loss(q: mx.array) -> mx.array:
        return mx.square(attention(q, k, v, mask="causal", softcap=3.0, implementation=implementation)).sum()  # type: ignore[arg-type]

    def along(q: mx.array) -> mx.array:
        derivative: mx.array = (mx.grad(loss)(q) * way).sum()
        return derivative

    step = 1e-2
    second = (mx.grad(along)(q) * way).sum().item()
    wanted = (along(q + step * way) - along(q - step * way)).item() / (2 * step)
    assert second == pytest.approx(wanted, rel=2e-2)
    _, (tangent,) = mx.jvp(loss, [q], [way])
    assert tangent.item() == pytest.approx(along(q).item(), rel=1e-3)
    of_tangent = mx.grad(lambda q: mx.jvp(loss, [q], [way])[1][0])(q)
    assert (of_tangent * way).sum().item() == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("logsumexp", [False, True])
@pytest.mark.parametrize("inner", [0, 1, 2, 3])
@pytest.mark.parametrize("implementation", [Practical(), Practical(1 << 14)], ids=["whole", "blocks"])
def test_gradients_depend_on_an_additive_mask(implementation: Practical, inner: int, logsumexp: bool) -> None:
    arrays = normal(2, 4, 9, 16), normal(2, 2, 12, 16, key=1), normal(2, 2, 12, 16, key=2), normal(2, 1, 9, 12, key=3)
    way = normal(*arrays[inner].shape, key=4)

    def second(implementation: object) -> mx.array:
        def loss(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
            named: dict[str, Any] = {"mask": mask, "softcap": 3.0, "implementation": implementation}
            return mx.square(attention(q, k, v, return_lse=True, **named)[int(logsumexp)]).sum()

        def along(*arrays: mx.array) -> mx.array:
            derivative: mx.array = (mx.grad(loss, argnums=inner)(*arrays) * way).sum()
            return derivative

        found: mx.array = mx.grad(along, argnums=3)(*arrays)
        return found

    wanted = second("baseline")
    assert mx.allclose(second(implementation), wanted, atol=1e-4 * max(1.0, mx.abs(wanted).max().item()))


@pytest.mark.parametrize("implementation", [Practical(), Practical(1 << 14)], ids=["whole", "blocks"])
def test_third_derivatives_by_a_mask_are_right_or_refused(implementation: Practical) -> None:
    arrays = normal(1, 2, 5, 8), normal(1, 2, 6, 8, key=1), normal(1, 2, 6, 8, key=2), normal(5, 6, key=3)

    def third(implementation: object, inner: int, outer: int) -> mx.array:
        def loss(*arrays: mx.array) -> mx.array:
            out: mx.array = attention(*arrays[:3], mask=arrays[3], implementation=implementation)  # type: ignore[call-overload]
            return mx.square(out).sum()

        def second(*arrays: mx.array) -> mx.array:
            return mx.square(mx.grad(lambda *x: mx.square(mx.grad(loss)(*x)).sum(), inner)(*arrays)).sum()

        found: mx.array = mx.grad(second, outer)(*arrays)
        return found

    for inner, outer in ((3, 1), (0, 1)):
        wanted = third("baseline", inner, outer)
        assert mx.allclose(third(implementation, inner, outer), wanted, atol=1e-3 * mx.abs(wanted).max().item())
    with pytest.raises(UnsupportedError, match="only implementation='baseline' has third derivatives"):
        third(implementation, 0, 3)


def test_a_kernels_gradients_by_a_mask_are_right_or_refused() -> None:
    """A loss that is linear in the output: no gradient of its passes through the kernel again."""
    q, k, v, mask = normal(1, 4, 9, 16), normal(1, 2, 12, 16, key=1), normal(1, 2, 12, 16, key=2), normal(9, 12, key=3)

    def second(name: str) -> mx.array:
        def along(mask: mx.array) -> mx.array:
            given: mx.array = mx.grad(lambda q: attention(q, k, v, mask=mask, implementation=name).sum())(q)
            return mx.square(given).sum()

        found: mx.array = mx.grad(along)(mask)
        return found

    try:
        found = second("poc")
    except ValueError as error:
        assert "'baseline' has" in str(error)
    else:
        assert mx.allclose(found, second("baseline"), atol=1e-4)


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("kind", [None, "causal", "bool", "add"])
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_torch_has_its_gradients_and_signs(scale: float, kind: str | None) -> None:
    pytest.importorskip("torch")
    q, k, v = normal(1, 4, 9, 16), normal(1, 2, 12, 16, key=1), normal(1, 2, 12, 16, key=2)
    mask = mx.arange(12) < 7 if kind == "bool" else normal(12, key=3) if kind == "add" else kind

    def loss(implementation: str) -> list[mx.array]:
        def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return mx.square(attention(q, k, v, mask=mask, scale=scale, implementation=implementation)).sum()

        value, gradients = mx.value_and_grad(call, argnums=(0, 1, 2))(q, k, v)
        return [value, *gradients]

    assert all(mx.allclose(got, wanted, atol=1e-4) for got, wanted in zip(loss("torch"), loss("baseline"), strict=True))


@pytest.mark.parametrize("transform", ["compile", "vmap", "jvp", "second"])
@pytest.mark.compiles
def test_torch_refuses_what_it_cannot_do_in_one_line(transform: str) -> None:
    pytest.importorskip("torch")
    q = normal(1, 1, 2, 4, 8)

    def call(q: mx.array) -> mx.array:
        return attention(q, q, q, implementation="torch").sum()

    calls: dict[str, Callable[[], object]] = {
        "compile": lambda: mx.compile(call)(q[0]),
        "vmap": lambda: mx.vmap(call)(q),
        "jvp": lambda: mx.jvp(call, [q[0]], [q[0]]),
        "second": lambda: mx.grad(lambda q: mx.grad(call)(q).sum())(q[0]),
    }
    with pytest.raises(UnsupportedError, match=r"torch: .*'baseline'"):
        calls[transform]()


@pytest.mark.parametrize("name", ["practical", "poc", "mlx"])
def test_a_tangent_of_an_additive_mask_is_refused(name: str) -> None:
    x, mask = mx.random.normal((1, 1, 8, 16)), mx.zeros((8, 8))
    with pytest.raises(UnsupportedError, match="baseline"):
        mx.jvp(lambda mask: attention(x, x, x, mask=mask, implementation=name), [mask], [mask])


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_mlx_is_given_positive_scales_only(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    given, inner = [], mx.fast.scaled_dot_product_attention

    def recorded(*arrays: mx.array, scale: float, **more: object) -> mx.array:
        given.append(scale)
        return inner(*arrays, scale=scale, **more)

    x = mx.random.normal((1, 2, 40, 16))
    expected = attention(x, x, x, mask="causal", scale=scale, implementation="baseline")
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", recorded)
    for implementation in (Practical(), Practical(1 << 14)):
        out = attention(x, x, x, mask="causal", scale=scale, implementation=implementation)
        assert float(mx.abs(out - expected).max()) < 1e-5
    assert given
    assert min(given) > 0


EVERY = ["baseline", Practical(), Practical(1 << 16), "poc"]
every_implementation = pytest.mark.parametrize("implementation", EVERY, ids=["baseline", "whole", "blocks", "poc"])


@pytest.mark.sampled(0.4)
@every_implementation
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_row_that_one_number_covers_keeps_its_scores(implementation: object, causal: bool, dtype: mx.Dtype) -> None:
    """float32 rounds to multiples of 64 near -1e9, and the scores lie 10 apart."""
    q, k = mx.full((1, 2, 40, 16), 2.5), mx.broadcast_to((mx.arange(100) % 3)[:, None] * 2.5, (1, 2, 100, 16))
    q, k, v = (x.astype(dtype) for x in (q, k, normal(1, 2, 100, 8)))
    hidden = mx.where(mx.arange(100) < 61, -1e9, 0.0 if causal else -1e9)  # causal: row 0 sees the first 61 keys
    more = {"mask": hidden[None].astype(mx.float32), "window": 1000 if causal else None}
    got = attention(q, k, v, scale=0.1, implementation=implementation, **more)[:, :, :1]  # type: ignore[arg-type]
    seen = 61 if causal else 100
    weights = mx.softmax((mx.arange(seen) % 3) * 10.0)
    wanted = (weights @ v.astype(mx.float32)[:, :, :seen])[:, :, None]
    assert np.allclose(np.array(got.astype(mx.float32)), np.array(wanted), atol=2e-2)


@pytest.mark.sampled(0.3)
@every_implementation
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hidden", [-4096.0, -1e9])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_logsumexp_takes_no_score_of_a_covered_row(
    implementation: object, packed: bool, hidden: float, rows: int
) -> None:
    q, k, v = (normal(1, 2, length, 64, key=length).astype(mx.bfloat16) for length in (rows, 100, 101))
    v = v[:, :, :100]
    mask = mx.where(mx.arange(rows)[:, None] > 0, 0.0, mx.full((1, 100), hidden))
    mask[:, 70:] = -mx.inf
    given = (quantized(k, "int8"), quantized(v, "int8")) if packed else (k, v)
    wide = [q.astype(mx.float32), *(x.dequantized(mx.float32) if isinstance(x, QuantizedArray) else x for x in given)]
    wide = [x.astype(mx.float32)[:, :, : 70 if at else rows] for at, x in enumerate(wide)]
    scores = wide[0] @ wide[1].swapaxes(-1, -2) / 8
    wanted, sums = mx.softmax(scores, -1) @ wide[2], mx.logsumexp(scores, -1) + mask[:, 0]
    alone = attention(q, *given, mask=mask, implementation=implementation)  # type: ignore[call-overload]
    got, logsumexp = attention(q, *given, mask=mask, implementation=implementation, return_lse=True)  # type: ignore[call-overload]
    for output in (alone, got):
        assert np.allclose(np.array(output.astype(mx.float32)), np.array(wanted), atol=0.1)
    assert np.allclose(np.array(logsumexp), np.array(sums), rtol=1e-6, atol=0.2)


@pytest.mark.thorough
@pytest.mark.parametrize("budget", BUDGETS)
def test_float32_scores_are_no_less_exact_in_blocks(budget: int | None) -> None:
    """Scores near 1500 are rounded by 6e-5, and each further rounding of them shows in the output."""
    q, k, v = (8 * normal(2, 1, 256, 24, key=key) for key in range(3))
    wanted = attention(q, k, v, scale=1.0, implementation="baseline")
    got = attention(q, k, v, scale=1.0, implementation=Practical(budget))
    assert np.abs(np.array(got) - np.array(wanted)).max() < 5e-5


def test_a_number_of_a_mask_that_is_clipped_has_its_gradient() -> None:
    q, k, v = (normal(1, 1, 8, 16, key=key).astype(mx.bfloat16) for key in range(3))
    mask = mx.full((8, 8), float(np.finfo(np.float32).min))

    def gradient(name: str) -> np.ndarray:
        of_mask = mx.grad(lambda m: (attention(q, k, v, mask=m, implementation=name) ** 2).sum())(mask)
        return np.array(of_mask)

    assert np.abs(gradient("practical")).max() > 0.01
    assert np.allclose(gradient("baseline"), gradient("practical"), atol=0.02)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("softcap", [None, thorough(5.0)])
@pytest.mark.parametrize("arithmetic", ["wide", slow("wide float32")])
def test_blocks_as_on_cuda_are_right(monkeypatch: pytest.MonkeyPatch, arithmetic: str, softcap: float | None) -> None:
    q, k, v = normal(2, 4, 33, 16), normal(2, 2, 70, 16, key=1), normal(2, 2, 70, 8, key=2)

    def results() -> list[mx.array]:
        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return attention(q, k, v, scale=-0.3, softcap=softcap, mask="causal", implementation=Practical(1 << 16))

        outputs, gradients = mx.vjp(attend, [q, k, v], [normal(2, 4, 33, 8, key=3)])
        return [*outputs, *gradients]

    expected = results()
    monkeypatch.setattr(
        "attention.implementations.bounded.implementation.arithmetic_of", lambda dtype, backend: arithmetic
    )
    for one, other in zip(results(), expected, strict=True):
        assert np.allclose(np.array(one), np.array(other), atol=1e-5)


@pytest.mark.thorough
def test_rounded_outputs_do_not_spoil_gradients_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that share a large component: in bfloat16 the output keeps little of what they differ by."""
    monkeypatch.setattr("attention.implementations.bounded.implementation.arithmetic_of", lambda dtype, backend: "wide")
    v = (1000 + 8 * mx.round(normal(1, 1, 64, 16, key=2))).astype(mx.bfloat16)
    q, k, upstream = (
        normal(1, 1, 32, 16).astype(mx.bfloat16),
        normal(1, 1, 64, 16, key=1),
        normal(1, 1, 32, 16, key=3),
    )
    k = k.astype(mx.bfloat16)

    def gradient(q: mx.array, k: mx.array, v: mx.array) -> np.ndarray:
        def loss(q: mx.array) -> mx.array:
            out = attention(q, k, v, softcap=50.0, implementation=Practical(1 << 20))
            return (out.astype(mx.float32) * upstream.astype(q.dtype).astype(mx.float32)).sum()

        return np.array(mx.grad(loss)(q).astype(mx.float32))

    exact = gradient(*(x.astype(mx.float32) for x in (q, k, v)))
    assert np.abs(gradient(q, k, v) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("scale", [0.3, -2.0, 0.0, 1e30, 1e-30])
def test_the_factor_of_a_wide_query_is_a_power_of_2(scale: float) -> None:
    of_query, of_product = BlockwiseParams(
        scale, Mask(), None, Blocks(batches=1, kv_heads=1, rows=1, keys=1), "wide"
    ).factors
    assert of_query * of_product == scale
    assert math.frexp(of_query)[0] == 0.5


@pytest.mark.parametrize(("a", "b"), [((5, 7), (7, 4)), ((1, 1), (1, 4)), ((2, 3, 5, 1), (2, 1, 1, 6))])
def test_a_product_by_rows_is_the_product(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    one, other = normal(*a), normal(*b, key=1)
    assert np.allclose(np.array(exact_product(one, other)), np.array(one @ other), atol=1e-5)
    turned = exact_product(other.swapaxes(-1, -2), one.swapaxes(-1, -2))
    assert np.allclose(np.array(turned), np.array((one @ other).swapaxes(-1, -2)), atol=1e-5)
