"""The CPU kernel's output and logsumexp, against float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention.kernels import cpu
from tests.support import kernel_oracle
from tests.support.cpu_calls import (
    SCORE_EXPONENTS,
    SCORE_SHAPES,
    calls,
    exact_scores,
    laid_out,
    largest_product,
    normal,
    qkv,
)

pytestmark = pytest.mark.usefixtures("kernel")
dtypes = pytest.mark.parametrize("dtype", kernel_oracle.DTYPES.values(), ids=kernel_oracle.DTYPES)


def assert_right(q, k, v, options, rounding=0):
    """`rounding` is the accepted error of the scores, and so of a row's logsumexp and of the values' weights."""
    o, logsumexp = cpu.flash_attention_with_logsumexp(q, k, v, **options.keywords())
    arrays = [kernel_oracle.numbers(x) for x in (q, k, v)]
    exact, exact_logsumexp, _ = kernel_oracle.attention(*arrays, options)
    plain = kernel_oracle.plain_attention(*arrays, options, q.dtype)
    floor = rounding * float(mx.max(mx.abs(v)))
    kernel_oracle.assert_near(o, exact, plain, q.dtype, 2, "output", floor)
    assert o.dtype == q.dtype
    assert logsumexp.dtype == mx.float32
    empty = exact_logsumexp == -np.inf
    assert (np.array(logsumexp)[empty] == -np.inf).all()
    assert (kernel_oracle.numbers(o)[empty] == 0).all()
    tolerance = (3e-4 if q.dtype == mx.bfloat16 else 2e-5) + rounding
    np.testing.assert_allclose(np.array(logsumexp)[~empty], exact_logsumexp[~empty], atol=tolerance, rtol=1e-5)


@pytest.mark.sampled(0.5)
@dtypes
@pytest.mark.parametrize(
    ("shape", "keywords"),
    [
        ((1, 2, 2, 64, 64, 32, 32), {}),
        ((2, 8, 2, 130, 257, 64, 64), {"causal": True}),
        ((1, 4, 1, 300, 300, 80, 48), {"causal": True, "window": 33}),
        ((1, 3, 3, 65, 200, 128, 128), {"softcap": 5.0}),
        ((1, 2, 1, 100, 31, 16, 7), {"causal": True}),
        ((1, 8, 2, 1, 3000, 128, 128), {}),
        ((2, 8, 2, 3, 1500, 64, 64), {"causal": True, "window": 700}),
        ((1, 2, 2, 70, 70, 512, 512), {"causal": True}),
        ((1, 1, 1, 5, 5, 1, 1), {}),
        ((1, 1, 1, 1040, 1040, 32, 32), {}),
    ],
    ids=lambda x: "-".join(map(str, x)) or "full",
)
def test_output_is_as_near_to_float64_as_flash_attention_3_asks(dtype, shape, keywords):
    options = kernel_oracle.Options(scale=shape[5] ** -0.5, **keywords)
    assert_right(*qkv(*shape, dtype), options)


@dtypes
def test_large_scores_stay_exact(dtype):
    q, k, v = qkv(1, 2, 2, 70, 400, 64, 64, dtype)
    assert_right(8 * q, 8 * k, v, kernel_oracle.Options(scale=0.125))


@pytest.mark.sampled(0.4)
@dtypes
@pytest.mark.parametrize("mask_shape", [(2, 4, 50, 70), (1, 1, 50, 70), (50, 70), (2, 1, 1, 70), (50, 1), (4, 1, 1)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_broadcast(dtype, mask_shape, boolean):
    random = np.random.default_rng(5)
    seen = random.random(mask_shape) < 0.6
    mask = seen if boolean else np.where(seen, random.standard_normal(mask_shape), -np.inf).astype(np.float32)
    assert_right(
        *qkv(2, 4, 2, 50, 70, 32, 32, dtype), kernel_oracle.Options(scale=0.2, mask=mask, causal=mask_shape[0] == 50)
    )


def assert_few_right(q, k, v, options):
    """Where few numbers are compared, plain attention may happen to be exact: allow one rounding of each product."""
    assert_right(q, k, v, options, rounding=2**-23 * (1 + abs(options.scale) * largest_product(q, k)))


def assert_right_at_random(call, name):
    shape, options, seed, layout = call
    assert_few_right(*(laid_out(x, layout) for x in qkv(*shape, kernel_oracle.DTYPES[name], seed)), options)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), name=st.sampled_from(sorted(kernel_oracle.DTYPES)))
def test_any_shape_stride_and_mask(call, name):
    assert_right_at_random(call, name)


@pytest.mark.slow
@settings(max_examples=240, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), name=st.sampled_from(sorted(kernel_oracle.DTYPES)))
def test_many_shapes_strides_and_masks(call, name):
    assert_right_at_random(call, name)


@pytest.mark.sampled(0.12)
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("layout", range(4))
def test_few_rows_against_many_keys(dtype, rows, layout):
    shape = (1, 2 * rows, 2, 1, 1100, *((64, 32), (20, 64), (96, 80), (32, 128))[layout])
    random = np.random.default_rng(rows)
    mask = random.random((2 * rows, 1, 1100)) < 0.8 if rows % 2 else None
    options = kernel_oracle.Options(scale=shape[5] ** -0.5, causal=True, window=900 if rows == 2 else None, mask=mask)
    assert_few_right(*(laid_out(x, layout) for x in qkv(*shape, dtype)), options)


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_few_rows_against_keys_that_come_from_memory(dtype, rows):
    """Keys and values of more than 8 MiB go to the L2 first, or are read key by key, where the L2 is large enough."""
    assert_few_right(*qkv(1, rows, 1, 1, 16_600, 128, 128, dtype), kernel_oracle.Options(scale=128**-0.5))


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("queries", [1, 200])
def test_inputs_are_read_where_they_lie(layout, queries):
    q, k, v = (laid_out(x, layout) for x in qkv(1, 8, 2, queries, 2000, 64, 64, mx.bfloat16))
    mask = mx.ones((2000,), dtype=mx.bool_)
    mx.eval(q, k, v, mask)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    o = cpu.flash_attention(q, k, v, scale=0.1, mask=mask)
    mx.eval(o)
    assert mx.get_peak_memory() - before < o.nbytes + 4096  # K and V have 500 KB each, the whole mask 16 and more


def options_of(kind, lq, lk):
    random = np.random.default_rng(lk)
    seen = (random.random((lq, lk)) < 0.7) & (np.arange(lk) >= lk // 2)  # whole tiles of keys are hidden first
    return {
        "full": kernel_oracle.Options(scale=0.25),
        "window": kernel_oracle.Options(scale=0.25, causal=True, window=20),
        "bool": kernel_oracle.Options(scale=0.25, mask=seen),
        "added": kernel_oracle.Options(scale=0.25, mask=np.where(seen, 0.0, -np.inf).astype(np.float32)),
    }[kind]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("kind", ["full", "window", "bool", "added"])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("dtype", "exponent"), SCORE_EXPONENTS, ids=str)
def test_scores_of_any_size_give_the_exact_softmax(dtype, exponent, negative, kind):
    for seed, shape in enumerate(SCORE_SHAPES):
        q, k, v = exact_scores(seed, shape, exponent, dtype, negative)
        options = options_of(kind, shape[3], shape[4])
        exact, exact_logsumexp, _ = kernel_oracle.attention(*(kernel_oracle.numbers(x) for x in (q, k, v)), options)
        o, logsumexp = cpu.flash_attention_with_logsumexp(q, k, v, **options.keywords())
        decoded = cpu.flash_attention(q, k, v, **options.keywords())  # few rows: not the tiles of training
        tolerance = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}[dtype]
        np.testing.assert_allclose(kernel_oracle.numbers(o), exact, atol=tolerance)
        np.testing.assert_allclose(kernel_oracle.numbers(decoded), exact, atol=tolerance)
        np.testing.assert_allclose(np.array(logsumexp), exact_logsumexp, rtol=1e-5, atol=1e-3)


def test_no_queries_and_no_keys():
    assert cpu.flash_attention(*qkv(1, 2, 2, 0, 5, 8, 8, mx.float32), scale=1.0).shape == (1, 2, 0, 8)
    o, logsumexp = cpu.flash_attention_with_logsumexp(*qkv(1, 2, 2, 3, 0, 8, 8, mx.float32), scale=1.0)
    assert mx.all(o == 0)
    assert mx.all(logsumexp == -mx.inf)


@dtypes
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_keys_that_a_boolean_mask_hides_may_hold_anything(dtype, queries, garbage):
    q, k, v = qkv(1, 4, 2, queries, 150, 32, 32, dtype)
    seen = np.arange(150) % 3 > 0
    spoilt = mx.where(mx.array(seen)[:, None], k, mx.array(garbage, dtype))
    o, expected = (cpu.flash_attention(q, x, v, scale=0.2, mask=mx.array(seen)) for x in (spoilt, k))
    assert mx.allclose(o, expected, rtol=2**-7, atol=2**-8)  # a rounding of bfloat16; NaN is near to nothing


@pytest.mark.parametrize("softcap", [1e-45, 1e-30, 1e30, 3e38])
def test_softcaps_at_the_ends_of_float32_give_numbers(softcap):
    q, k, v = qkv(1, 2, 2, 20, 30, 8, 8, mx.float32)
    o = cpu.flash_attention(q, k, v, scale=0.3, softcap=softcap)
    plain = cpu.flash_attention(q, k, v, scale=0.3 if softcap > 1 else 0.0)  # no cap, or all scores alike
    np.testing.assert_allclose(np.array(o), np.array(plain), atol=1e-4)


def test_large_finite_masks_keep_their_order():
    q, k, v = qkv(1, 2, 2, 20, 30, 8, 8, mx.float32)
    mask = mx.full((20, 30), float(np.finfo(np.float32).min))
    mask[:, 7] = -3e38
    o = cpu.flash_attention(q, k, v, scale=1.0, mask=mask)
    np.testing.assert_array_equal(np.array(o), np.broadcast_to(np.array(v)[:, :, 7:8], o.shape))


def test_a_large_finite_mask_is_no_exclusion():
    q, k, v = qkv(1, 1, 1, 4, 6, 8, 8, mx.float32)
    o = cpu.flash_attention(q, k, v, scale=1.0, mask=mx.full((4, 6), float(np.finfo(np.float32).min)))
    np.testing.assert_allclose(np.array(o), np.broadcast_to(np.array(v).mean(2, keepdims=True), o.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": (1, 3, 8, 16)}, "multiple"),
        ({"k": (1, 2, 8, 15)}, "do not agree"),
        ({"v": (1, 2, 9, 16)}, "do not agree"),
        ({"q": (4, 8, 16)}, "four dimensions"),
        ({"q": (1, 4, 8, 513), "k": (1, 2, 8, 513)}, "1 to 512"),
    ],
)
def test_wrong_shapes_are_refused_with_a_reason(change, words):
    shapes = {"q": (1, 4, 8, 16), "k": (1, 2, 8, 16), "v": (1, 2, 8, 16), **change}
    if change.get("k", (0, 0))[1] == 3:
        shapes["v"] = (1, 3, 8, 16)
    with pytest.raises(ValueError, match=words):
        cpu.flash_attention(*(mx.zeros(s) for s in shapes.values()), scale=1.0)


def test_wrong_values_are_refused_with_a_reason():
    q, k, v = qkv(1, 2, 2, 4, 4, 8, 8, mx.float32)
    with pytest.raises(ValueError, match="window"):
        cpu.flash_attention(q, k, v, scale=1.0, window=0)
    for softcap in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="softcap is positive and finite"):
            cpu.flash_attention(q, k, v, scale=1.0, softcap=softcap)
    with pytest.raises(ValueError, match="one type"):
        cpu.flash_attention(q, k.astype(mx.float16), v, scale=1.0)
    with pytest.raises(ValueError, match="broadcast"):
        cpu.flash_attention(q, k, v, scale=1.0, mask=mx.ones((3, 4)))
    with pytest.raises(ValueError, match="boolean"):
        cpu.flash_attention(q, k, v, scale=1.0, mask=mx.ones((4, 4), dtype=mx.int32))


@pytest.mark.parametrize("queries", [3, 200])
@pytest.mark.parametrize("softcap", [None, 1e4])
def test_large_float32_scores_are_summed_in_double(queries, softcap):
    """Scores near 1500 are rounded by 6e-5 in float32, and sums of products by a multiple of that."""
    q, k, v = (8 * normal(seed, 1, 4, n, 31) for seed, n in enumerate((queries, 187, 187)))
    options = kernel_oracle.Options(scale=0.9, causal=True, softcap=softcap)
    got = cpu.flash_attention(q, k, v, **options.keywords())
    exact, *_ = kernel_oracle.attention(*(kernel_oracle.numbers(x) for x in (q, k, v)), options)
    assert np.abs(np.array(got) - exact).max() < 1e-5


@pytest.mark.parametrize("queries", [2, 90])
def test_an_output_that_one_key_decides_is_its_value(queries):
    q, k, v = (3 * normal(seed, 1, 2, n, 40) for seed, n in enumerate((queries, 90, 90)))
    got = cpu.flash_attention(q, k, v, scale=0.3, window=1)
    assert mx.array_equal(got, v[:, :, -queries:])
