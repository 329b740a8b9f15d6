"""The CPU kernel's gradients against float64, and MLX's transformations around it."""

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


def inputs(b, h, hkv, lq, lk, d, dv, dtype=mx.float32):
    random = np.random.default_rng(b + h + lq + lk)
    shapes = [(b, h, lq, d), (b, hkv, lk, d), (b, hkv, lk, dv), (b, h, lq, dv)]
    return [mx.array(random.standard_normal(s).astype(np.float32)).astype(dtype) for s in shapes]


def attend(q, k, v):
    return cpu.flash_attention(q, k, v, scale=0.25, causal=True)


def loss(q, k, v):
    return (attend(q, k, v) ** 2).sum()


def plain_loss(q, k, v):
    return (mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal") ** 2).sum()


def assert_right(q, k, v, do, options, floors=(0, 0, 0)):
    _, got = mx.vjp(lambda *x: cpu.flash_attention(*x, **options.keywords()), [q, k, v], [do])
    arrays = [kernel_oracle.numbers(x) for x in (q, k, v, do)]
    exact = kernel_oracle.gradients(*arrays, options)
    plain = kernel_oracle.plain_gradients(*arrays, options, q.dtype)
    for name, a, b, c, floor in zip(("dq", "dk", "dv"), got, exact, plain, floors, strict=True):
        assert a.dtype == q.dtype
        kernel_oracle.assert_near(a, b, c, q.dtype, 3, name, floor)


def assert_same(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance, rtol=tolerance)


@pytest.mark.sampled(0.5)
@dtypes
@pytest.mark.parametrize(
    ("shape", "keywords"),
    [
        ((1, 2, 2, 64, 64, 32, 32), {}),
        ((2, 6, 2, 130, 330, 64, 48), {"causal": True}),
        ((1, 4, 1, 200, 100, 17, 33), {"causal": True, "window": 20}),
        ((1, 2, 2, 90, 70, 128, 128), {"softcap": 3.0}),
        ((1, 2, 1, 1, 600, 64, 64), {}),
        ((1, 1, 1, 66, 66, 512, 512), {"causal": True}),
        ((1, 2, 2, 40, 50, 32, 32), {"mask": np.random.default_rng(1).random((40, 50)) < 0.5}),
    ],
    ids=lambda x: "-".join(map(str, x)) or "full",
)
def test_gradients_meet_flash_attention_3s_error_bound(dtype, shape, keywords):
    assert_right(*inputs(*shape, dtype), kernel_oracle.Options(scale=shape[5] ** -0.5, **keywords))


ONE_ROUNDING = {"float32": 2**-23, "float16": 2**-11, "bfloat16": 2**-8}


def assert_right_at_random(call, name):
    shape, options, seed, layout = call
    dtype = kernel_oracle.DTYPES[name]
    q, k, v = (laid_out(x, layout) for x in qkv(*shape, dtype, seed))
    do = laid_out(normal(seed + 3, *q.shape[:3], v.shape[3], dtype=dtype), layout)
    # Where few numbers are compared, plain attention may happen to be exact: allow one rounding of P and of dS, and
    # what roundings of the scores make of them.
    rounding = ONE_ROUNDING[name] + 2**-23 * abs(options.scale) * largest_product(q, k)
    sums = kernel_oracle.gradient_sums(*(kernel_oracle.numbers(x) for x in (q, k, v, do)), options)
    assert_right(q, k, v, do, options, [rounding * x.max(initial=0) for x in sums])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), name=st.sampled_from(sorted(kernel_oracle.DTYPES)))
def test_gradients_of_any_shape_stride_and_mask(call, name):
    assert_right_at_random(call, name)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), name=st.sampled_from(sorted(kernel_oracle.DTYPES)))
def test_gradients_of_many_shapes_strides_and_masks(call, name):
    assert_right_at_random(call, name)


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize(("dtype", "exponent"), SCORE_EXPONENTS, ids=str)
def test_gradients_at_scores_of_any_size(dtype, exponent):
    for seed, shape in enumerate(SCORE_SHAPES):
        q, k, v = exact_scores(seed, shape, exponent, dtype)
        do = normal(seed, *q.shape, dtype=dtype)
        options = kernel_oracle.Options(scale=0.25, causal=True)
        _, got = mx.vjp(lambda *x, o=options: cpu.flash_attention(*x, **o.keywords()), [q, k, v], [do])
        arrays = [kernel_oracle.numbers(x) for x in (q, k, v, do)]
        exact, sums = kernel_oracle.gradients(*arrays, options), kernel_oracle.gradient_sums(*arrays, options)
        for a, b, c in zip(got, exact, sums, strict=True):
            assert np.abs(kernel_oracle.numbers(a) - b).max() <= 4 * ONE_ROUNDING[str(dtype)[9:]] * c.max() + 1e-37
            assert a.dtype == dtype


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("hidden", [-1e4, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("shape", [(1, 2, 2, 130, 300, 32, 32), (1, 4, 1, 1, 3000, 16, 16)], ids=str)
@dtypes
def test_rows_that_a_large_finite_mask_hides_weigh_once(dtype, shape, hidden):
    q, k, v, do = inputs(*shape, dtype)
    mask = mx.full(shape[3:5], hidden)
    _, (dv,) = mx.vjp(lambda v: cpu.flash_attention(1e-4 * q, k, v, scale=1.0, mask=mask), [v], [do])
    group = shape[1] // shape[2]
    expected = (
        kernel_oracle.numbers(do).reshape(shape[0], shape[2], group * shape[3], -1).sum(2, keepdims=True) / shape[4]
    )
    allowed = 2e-2 * np.abs(expected).max() + 1e-6
    np.testing.assert_allclose(kernel_oracle.numbers(dv), np.broadcast_to(expected, dv.shape), atol=allowed)


def test_gradients_where_nothing_is_attended_to_are_zero():
    q, k, v, _ = inputs(1, 2, 2, 8, 4, 16, 16)
    dq = mx.grad(loss)(q, k, v)
    assert mx.all(dq[:, :, :4] == 0)
    assert mx.any(dq[:, :, 4:] != 0)


def test_the_logsumexp_has_a_gradient():
    q, k, v, _ = inputs(1, 2, 1, 20, 30, 16, 16)

    def ours(q, k):
        return mx.sin(cpu.flash_attention_with_logsumexp(q, k, v, scale=0.3)[1]).sum()

    def theirs(q, k):
        return mx.sin(mx.logsumexp(0.3 * q @ mx.repeat(k, 2, 1).swapaxes(-1, -2), axis=-1)).sum()

    assert_same(mx.grad(ours, (0, 1))(q, k), mx.grad(theirs, (0, 1))(q, k))


@pytest.mark.parametrize("transform", [lambda f: f, mx.compile, mx.checkpoint], ids=["eager", "compile", "checkpoint"])
@pytest.mark.compiles
def test_value_and_grad_agree_with_mlx(transform):
    q, k, v, _ = inputs(2, 4, 2, 70, 90, 32, 32)
    value, got = mx.value_and_grad(transform(loss), (0, 1, 2))(q, k, v)
    exact, expected = mx.value_and_grad(plain_loss, (0, 1, 2))(q, k, v)
    assert_same([value, *got], [exact, *expected], 2e-4)


@pytest.mark.compiles
def test_a_compiled_training_step_agrees_with_mlx():
    q, k, v, _ = inputs(1, 4, 4, 33, 33, 16, 16)
    step = mx.compile(mx.value_and_grad(loss, (0, 1, 2)))
    for scale in (1.0, 2.0):
        assert_same(step(scale * q, k, v)[1], mx.grad(plain_loss, (0, 1, 2))(scale * q, k, v), 5e-4)


@pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, 0), (0, None, None), (None, 2, None)])
def test_vmap_agrees_with_a_loop(axes):
    arrays = inputs(2, 4, 2, 20, 30, 16, 16)[:3]
    mapped = [
        mx.stack([x, 2 * x, -x], axis=axis) if axis is not None else x for x, axis in zip(arrays, axes, strict=True)
    ]
    each = [
        [mx.take(x, n, axis) if axis is not None else x for x, axis in zip(mapped, axes, strict=True)] for n in range(3)
    ]
    assert_same([mx.vmap(attend, axes)(*mapped)], [mx.stack([attend(*x) for x in each])])
    gradient = mx.grad(loss, (0, 1, 2))
    expected = [mx.stack(list(g)) for g in zip(*(gradient(*x) for x in each), strict=True)]
    assert_same(mx.vmap(gradient, axes)(*mapped), expected)


def test_vmap_takes_a_mask_along():
    q, k, v, _ = inputs(2, 2, 2, 10, 12, 8, 8)
    masks = mx.random.uniform(shape=(3, 10, 12)) < 0.5
    got = mx.vmap(lambda m: cpu.flash_attention(q, k, v, scale=1.0, mask=m))(masks)
    assert_same([got], [mx.stack([cpu.flash_attention(q, k, v, scale=1.0, mask=m) for m in masks])])


@pytest.mark.compiles
def test_calls_that_differ_are_not_merged_by_compile():
    q, k, v, _ = inputs(1, 2, 2, 30, 30, 16, 16)

    def both(q):
        return attend(q, k, v), cpu.flash_attention(q, k, v, scale=0.5, causal=True)

    one, other = mx.compile(both)(q)
    assert not mx.allclose(one, other)


def test_what_has_no_gradient_says_so():
    q, k, v, _ = inputs(1, 1, 1, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="mask"):
        mx.grad(lambda m: cpu.flash_attention(q, k, v, scale=1.0, mask=m).sum())(mx.zeros((4, 4)))
    with pytest.raises(ValueError, match="no second derivative; implementation 'baseline' has"):
        mx.grad(lambda x: mx.grad(loss)(x, k, v).sum())(q)
    with pytest.raises(ValueError, match=r"no forward-mode derivative \(jvp\); implementation 'baseline' has"):
        mx.jvp(lambda x: attend(x, k, v), [q], [q])
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        mx.jvp(lambda x: mx.grad(loss)(x, k, v), [q], [q])


def test_a_mask_whose_gradient_is_stopped_is_no_obstacle():
    q, k, v, do = inputs(1, 2, 2, 8, 8, 16, 16)

    def attend_stopped(q, m):
        return cpu.flash_attention(q, k, v, scale=1.0, mask=mx.stop_gradient(m))

    _, (dq, dm) = mx.vjp(attend_stopped, [q, mx.zeros((8, 8))], [do])
    assert mx.any(dq != 0)
    assert mx.all(dm == 0)


@pytest.mark.parametrize("queries", [3, 7, 16, 100])
@pytest.mark.parametrize(
    ("keys", "keywords"), [(1, {}), (20, {}), (100, {"window": 1})], ids=["one key", "equal values", "window of one"]
)
def test_gradients_that_cancel_are_exactly_zero(queries, keys, keywords):
    """dP = delta where all that a query sees has one value, and then dQ and dK are 0 however large the numbers are."""
    q, k, v, do = inputs(1, 4, 2, queries, keys, 20, 17)
    v = v if keywords else mx.broadcast_to(v[:, :, :1], v.shape)
    q, k, v, do = (8 * x for x in (q, k, v, do))
    _, got = mx.vjp(lambda *x: cpu.flash_attention(*x, scale=0.3, **keywords), [q, k, v], [do])
    assert [float(mx.abs(x).max()) for x in got[:2]] == [0.0, 0.0]


@pytest.mark.parametrize("rows", [8, 40])
def test_ties_of_large_scores_have_the_gradients_of_the_mean(rows):
    """Scores are multiples of 100 to both sides of 1024: rows of a tile must not be rounded in two ways."""
    random = np.random.default_rng(3)
    q, k = (mx.array(np.round(random.uniform(-4, 4, (1, 1, n, 80)))).astype(mx.float32) for n in (rows, 257))
    q[..., 1:], k[..., 1:] = 0, 0
    _, _, v, do = inputs(1, 1, 1, rows, 257, 80, 80)
    options = kernel_oracle.Options(scale=100.0, causal=True)
    _, got = mx.vjp(lambda *x: cpu.flash_attention(*x, **options.keywords()), [q, k, v], [do])
    exact = kernel_oracle.gradients(*(kernel_oracle.numbers(x) for x in (q, k, v, do)), options)
    for a, b, tolerance in zip(got, exact, (5e-6, 4e-7, 4e-7), strict=True):  # what cancels in dQ is large
        assert np.abs(np.array(a) - b).max() < tolerance * np.abs(b).max()


def test_equal_products_do_not_drift_in_the_backward_pass():
    """A sum of 300 equal products in one go is off by 7e-6, and so would be the weight of the only key."""
    q, k, v, do = (mx.full(shape, 0.5) for shape in ((1, 1, 8, 300), (1, 1, 1, 300), (1, 1, 1, 6), (1, 1, 8, 6)))
    _, got = mx.vjp(lambda *x: cpu.flash_attention(*x, scale=300**-0.5), [q, k, v], [do])
    assert np.abs(np.array(got[2]) - 4.0).max() < 1e-5
