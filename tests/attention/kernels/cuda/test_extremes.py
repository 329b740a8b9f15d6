"""Scores of any size, rows hidden by large numbers, and calls under vmap, against float64 on a GPU."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from contextlib import nullcontext

from attention.kernels import cuda
from attention.kernels.common.selfcheck import additive, exact
from attention.kernels.cuda.runtime.call import CallParams
from attention.kernels.cuda.runtime.selfcheck import reference, reference_gradients
from benchmarks.cuda.measure_portable import portable_only

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])]

SIZES = {"many": (1, 4, 2, 300, 523), "few": (2, 8, 2, 1, 2000), "parts": (1, 2, 1, 200, 9000)}
KERNELS = {"own": nullcontext, "general": portable_only}


def arrays(size, dim, factor, seed=3, dtype=None):
    """q, k and v whose scores grow with `factor`, and a cotangent."""
    batch, heads, kv_heads, queries, keys = size
    random = np.random.default_rng(seed)
    rows, columns = (batch, heads, queries, dim), (batch, kv_heads, keys, dim)
    made = [random.standard_normal(shape) for shape in (rows, columns, columns, rows)]
    made[0] *= factor
    return [mx.array(x.astype(np.float32)).astype(dtype or mx.bfloat16) for x in made]


def found(made, call, mask=None):
    keywords = {"causal": call.causal, "window": call.window, "softcap": call.softcap, "mask": mask}
    return cuda.flash_attention(*made[:3], scale=call.scale, **keywords)


def error_of(output, right):
    return float(np.abs(exact(output) - right).max())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1e-30, 1e-4, 1.0, 1e3, 1e5, 1e8, 1e12, 1e20, 1e28])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_scores_of_any_size_give_the_right_output(dim, factor, size, kernels):
    made, call = arrays(SIZES[size], dim, factor), CallParams(0.5, True, None, None)
    with KERNELS[kernels]():
        output = found(made, call)
    wrong = np.abs(exact(output) - reference(*(exact(x) for x in made[:3]), call)[0]).max(axis=-1)
    assert np.isfinite(wrong).all()
    # a few rows have scores that differ by less than float32 can resolve at this size
    assert np.quantile(wrong, 0.98) < 0.05


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("size", ["many", "few"])
@pytest.mark.parametrize("dim", [48, 128, 192])
def test_equal_scores_of_any_size_weigh_the_same(dim, size, dtype, kernels):
    largest = 200.0 if dtype == mx.float16 else 1e15
    made = arrays(SIZES[size], dim, 1.0, dtype=dtype)
    made[0], made[1] = mx.full(made[0].shape, -largest, dtype), mx.full(made[1].shape, largest, dtype)
    with KERNELS[kernels]():
        output = found(made, CallParams(1.0, False, None, None))
    right = np.repeat(exact(made[2]).mean(axis=2, keepdims=True), 4 if size == "few" else 2, axis=1)
    assert error_of(output, right) < 5e-3


# factors of the keys, by key from 0 to 1: the kernels take keys from the last to the first
RISES = {
    "by little": lambda place: 1 + 2 * place,
    "to the first": lambda place: 40 - 39.9 * place,
    "to the last": lambda place: 0.1 + 39.9 * place,
    "in steps": lambda place: np.where(place * 16 % 3 < 1, 12, 1),
}


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_maxima_that_rise_from_tile_to_tile(dim, window, rise, negative):
    made, call = arrays(SIZES["many"], dim, 1.0), CallParams(dim**-0.5, True, window, None)
    made[1] *= mx.array(RISES[rise](np.linspace(0, 1, 523)).astype(np.float32)).astype(made[1].dtype)[:, None]
    if negative:
        made[0], made[1] = mx.abs(made[0]), -mx.abs(made[1])
    output, gradients = mx.vjp(lambda *x: found(x, call), made[:3], made[3:])
    numbers = [exact(x) for x in made]
    assert error_of(output[0], reference(*numbers[:3], call)[0]) < 0.03
    for name, gradient, wanted in zip("qkv", gradients, reference_gradients(*numbers, call), strict=True):
        assert error_of(gradient, wanted) < 0.03 * (1 + np.abs(wanted).max()), name


@pytest.mark.parametrize("dim", [64, 128])
def test_parts_of_a_row_about_the_largest_exponent(dim):
    """A part's maximum may be less than its largest score, unless the maximum of the whole row is a large one."""
    made, call = arrays(SIZES["parts"], dim, 0.0), CallParams(float(np.log(2)), False, None, None)
    exponents = np.where(np.arange(9000) < 4500, -4, 1)
    exponents[256:384] = 3  # beyond the first tile of the first part, which has the last of its keys
    keys = np.zeros((1, 1, 9000, dim), np.float32)
    keys[..., 0], keys[..., 1] = 16384, exponents
    made[0] = mx.broadcast_to((mx.arange(dim) < 2).astype(made[0].dtype), made[0].shape)
    made[1] = mx.array(keys).astype(made[1].dtype)
    output, gradients = mx.vjp(lambda *x: found(x, call), made[:3], made[3:])
    numbers = [exact(x) for x in made]
    assert error_of(output[0], reference(*numbers[:3], call)[0]) < 0.01
    wanted = reference_gradients(*numbers, call)[2]
    assert error_of(gradients[2], wanted) < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_large_logits_give_no_nan(dtype):
    random = np.random.default_rng(0)
    q, k = (
        np.sign(x) * (200 if dtype == mx.float16 else 1e4) * (1 + 0.1 * np.abs(x))
        for x in (random.standard_normal((3, 1, 23, 48)), random.standard_normal((3, 1, 200, 48)))
    )
    made = [mx.array(x.astype(np.float32)).astype(dtype) for x in (q, k, random.standard_normal((3, 1, 200, 8)))]
    call = CallParams(1.0, True, None, None)
    right = reference(*(exact(x) for x in made), call)[0]
    wrong = np.abs(exact(found(made, call)) - right).max(axis=-1)
    assert np.isfinite(wrong).all()
    assert np.quantile(wrong, 0.95) < 0.02


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e-30, 1e30])
def test_scales_of_any_size_are_taken(scale):
    made, call = arrays(SIZES["many"], 64, 1.0), CallParams(scale, True, None, None)
    with np.errstate(all="ignore"):
        right = reference(*(exact(x) for x in made[:3]), call)[0]
    output, gradients = mx.vjp(lambda *x: found(x, call), made[:3], made[3:])
    assert np.quantile(np.abs(exact(output[0]) - right).max(axis=-1), 0.98) < 0.03
    assert all(np.isfinite(exact(x)).all() for x in gradients)


@pytest.mark.parametrize("queries", [2, 300])
@pytest.mark.parametrize("masked", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("least", [-1e4, -6e4, -1e9, "min"])
def test_rows_hidden_by_large_numbers_have_the_right_gradients(least, masked, queries):
    size, call = (1, 4, 2, queries, 300), CallParams(0.125, False, None, None)
    made = arrays(size, 64, 1.0)
    low = float(mx.finfo(masked).min) if least == "min" else max(least, float(mx.finfo(masked).min))
    hidden = np.random.default_rng(1).random((1, 1, queries, 300)) < 0.5
    hidden[:, :, ::2] = True  # whole rows
    mask = mx.array(np.where(hidden, low, 0).astype(np.float32)).astype(masked)
    output, gradients = mx.vjp(lambda *x: found(x, call, mask), made[:3], made[3:])
    numbers = [exact(x) for x in made]
    # in float32, in which the kernels add them, a score beside a large number is rounded or lost
    scores = (numbers[0] @ np.repeat(numbers[1], 2, axis=1).swapaxes(-1, -2) * call.scale).astype(np.float32)
    sums = (scores + exact(mask).astype(np.float32)).astype(np.float64)
    right = reference(*numbers[:3], call, sums - scores)[0]
    expected = reference_gradients(*numbers, call, sums - scores)
    assert error_of(output[0], right) < 0.03
    for name, gradient, wanted in zip("qkv", gradients, expected, strict=True):
        assert error_of(gradient, wanted) < 0.03 * (1 + np.abs(wanted).max()), name


def test_large_positive_masks_are_added_as_they_are():
    made, call = arrays((1, 2, 2, 100, 90), 64, 1.0), CallParams(0.125, False, None, None)
    mask = mx.where(mx.arange(90) % 3 == 0, mx.array(3e38), mx.array(-3e38))[None]
    right = exact(made[2])[:, :, ::3].mean(axis=2, keepdims=True)
    assert error_of(found(made, call, mask), right) < 0.01


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_of_large_scores_are_finite_and_right(dim, kernels):
    made, call = arrays(SIZES["many"], dim, 1e4), CallParams(1.0, True, None, None)
    with KERNELS[kernels]():
        _, gradients = mx.vjp(lambda *x: found(x, call), made[:3], made[3:])
    expected = reference_gradients(*(exact(x) for x in made), call)
    assert all(np.isfinite(exact(x)).all() for x in gradients)
    assert np.quantile(np.abs(exact(gradients[2]) - expected[2]), 0.98) < 0.05


KINDS = {
    "own": ((2, 4, 2, 200, 300), {"causal": True}),
    "few": ((2, 8, 2, 1, 600), {}),
    "mask of all": ((2, 4, 2, 100, 130), {"mask": (1, 1, 100, 130)}),
    "mask of each": ((2, 4, 2, 100, 130), {"mask": (2, 4, 100, 130)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (2, None, None), (None, 1, 1)])
def test_vmap_is_the_same_as_one_call_after_the_other(in_axes, kind):
    size, keywords = KINDS[kind]
    if "mask" in keywords:
        drawn = mx.random.normal(keywords["mask"], key=mx.random.key(1))
        keywords = {"mask": mx.where(drawn > 0.5, -mx.inf, drawn)}
    each = [arrays(size, 64, 1.0, seed)[:3] for seed in range(3)]
    given = [
        x[0] if axis is None else mx.stack(x, axis=axis)
        for x, axis in zip(zip(*each, strict=True), in_axes, strict=True)
    ]

    def attend(q, k, v):
        return cuda.flash_attention(q, k, v, scale=0.125, **keywords)

    def loss(q, k, v):
        return mx.square(attend(q, k, v).astype(mx.float32)).sum()

    def one_by_one(function):
        made = [
            function(*(x if axis is None else mx.take(x, i, axis=axis) for x, axis in zip(given, in_axes, strict=True)))
            for i in range(3)
        ]
        return [mx.stack(x) for x in zip(*made, strict=True)] if isinstance(made[0], tuple) else [mx.stack(made)]

    [right] = one_by_one(attend)
    assert mx.allclose(mx.vmap(attend, in_axes)(*given), right, atol=1e-2, rtol=1e-2).item()
    gradient = mx.grad(loss, argnums=(0, 1, 2))
    expected = one_by_one(gradient)
    for made, wanted in zip(mx.vmap(gradient, in_axes)(*given), expected, strict=True):
        assert mx.allclose(made, wanted, atol=3e-2, rtol=3e-2).item()

    def whole(q, k, v):
        return mx.vmap(loss, in_axes)(q, k, v).sum()

    for made, wanted, axis in zip(mx.grad(whole, argnums=(0, 1, 2))(*given), expected, in_axes, strict=True):
        total = wanted.astype(mx.float32).sum(axis=0) if axis is None else mx.moveaxis(wanted, 0, axis)
        assert mx.allclose(made.astype(mx.float32), total, atol=8e-2, rtol=3e-2).item()


def test_vmapped_gradients_trace():
    made = [mx.stack(x) for x in zip(*(arrays(KINDS["own"][0], 64, 1.0, seed)[:3] for seed in range(2)), strict=True)]

    def loss(q, k, v):
        return cuda.flash_attention(q, k, v, scale=0.125, causal=True).sum()

    gradient = mx.vmap(mx.grad(loss, argnums=(0, 1, 2)))
    for traced, wanted in zip(mx.compile(gradient)(*made), gradient(*made), strict=True):
        assert mx.allclose(traced, wanted, atol=1e-2, rtol=1e-2).item()


@pytest.mark.parametrize("step", [3, -1])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("queries", [1, 200])
def test_a_strided_or_reversed_last_axis_is_taken(queries, kernels, step):
    made = arrays((2, 4, 2, queries, 300), 64, 1.0)
    given = [
        mx.contiguous(mx.repeat(x, abs(step), axis=3)[..., ::-1] if step < 0 else mx.repeat(x, step, axis=3))
        for x in made
    ]
    mx.eval(given)
    given = [x[..., ::step] for x in given]
    call = CallParams(0.125, True, None, None)
    with KERNELS[kernels]():
        output, gradients = mx.vjp(lambda *x: found(x, call), given[:3], given[3:])
    right = reference(*(exact(x) for x in made[:3]), call)[0]
    expected = reference_gradients(*(exact(x) for x in made), call)
    assert error_of(output[0], right) < 0.03
    assert all(error_of(x, wanted) < 0.1 for x, wanted in zip(gradients, expected, strict=True))


def test_a_mask_gets_its_gradient_without_being_stopped():
    made, call = arrays((1, 2, 2, 60, 70), 64, 1.0), CallParams(0.125, False, None, None)
    mask = mx.random.normal((1, 2, 1, 70))
    _, [gradient] = mx.vjp(lambda m: found(made, call, m), [mask], made[3:])
    q, k, v, cotangent = (exact(x) for x in made)
    scores = q @ k.swapaxes(-1, -2) * call.scale + additive(mask)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    by_weight = cotangent @ v.swapaxes(-1, -2)
    right = (weights * (by_weight - (weights * by_weight).sum(axis=-1, keepdims=True))).sum(axis=2, keepdims=True)
    assert error_of(gradient, right) < 0.03


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_row_with_a_nan_is_no_empty_one(dim, size, kernels):
    made = arrays(SIZES[size], dim, 1.0)
    row = SIZES[size][3] - 1
    made[0][0, 0, row, 0] = np.nan
    with KERNELS[kernels]():
        output, logsumexp = cuda.flash_attention_with_logsumexp(*made[:3], scale=0.1, causal=True)
    assert mx.isnan(output[0, 0, row]).all()
    assert mx.isnan(logsumexp[0, 0, row])
    assert mx.isfinite(logsumexp).sum() == logsumexp.size - 1
