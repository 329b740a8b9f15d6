"""400 random compositions of masks: results of kernels and blocks, forward and backward, by FlashAttention 3's rule."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from attention import attention, masks
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import take_path
from tests.support import kernel_oracle, mask_values

EXAMPLES = 400
PARTS = 8
"""Tests that the examples on the GPU are divided among, for as many processes."""
IN_BLOCKS = Practical(1 << 18)
SUM_ROUNDING = 2e-6
"""Error that float32 sums in another order may have, of results up to 1."""


@st.composite
def calls(draw, dtypes, dims, most=(200, 300)):
    """Draw sizes, a dtype and a seed, from which arrays, a mask, slopes and a softcap are made."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    queries, keys = draw(st.integers(1, most[0])), draw(st.integers(1, most[1]))
    shape = draw(st.integers(1, 2)), kv_heads * group, queries, keys
    seed, depth = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 3))
    return shape, kv_heads, draw(st.sampled_from(dims)), draw(st.sampled_from(dtypes)), depth, seed


def check(call, implementations, backend):
    (batch, heads, queries, keys), kv_heads, dim, name, depth, seed = call
    random, dtype, shape = np.random.default_rng(seed), kernel_oracle.DTYPES[name], (batch, heads, queries, keys)
    mask, seen = mask_values.draw(random, shape, depth)
    sizes = [(batch, heads, queries, dim), *[(batch, kv_heads, keys, dim)] * 2, (batch, heads, queries, dim)]
    *arrays, cotangent = (mx.array(random.standard_normal(size, np.float32)).astype(dtype) for size in sizes)
    softcap = 3.0 if random.random() < 0.2 else None
    slopes = random.choice([0.5, 0.02, -0.1, 0.0], heads) if random.random() < 0.3 else None
    added = np.where(seen, 0.0, -np.inf)
    if slopes is not None:
        added = added + slopes[:, None, None] * (np.arange(keys) - np.arange(queries)[:, None] - keys + queries)
    numbers = [kernel_oracle.numbers(x) for x in (*arrays, cotangent)]
    options = kernel_oracle.Options(dim**-0.5, softcap=softcap, mask=added)
    exact, logsumexp, _ = kernel_oracle.attention(*numbers[:3], options)
    expected = [exact, *kernel_oracle.gradients(*numbers, options)]
    plain = [kernel_oracle.plain_attention(*numbers[:3], options, dtype)]
    # of few rows plain attention can be nearly exact; the stored output, of which fused gradients are made, is not
    ways = (
        kernel_oracle.plain_gradients(*numbers, options, dtype),
        kernel_oracle.gradients(*numbers, options, stored=kernel_oracle.rounding(dtype)),
    )
    for right, *made in zip(expected[1:], *ways, strict=True):
        plain.append(max(made, key=lambda one, right=right: np.abs(one - right).max(initial=0)))
    for implementation in implementations:

        def attend(*given, implementation=implementation):
            return attention(
                *given,
                mask=mask,
                softcap=softcap,
                score_mod=None if slopes is None else masks.alibi(slopes.tolist()),
                return_lse=True,
                implementation=implementation,
            )

        (output, found), gradients = mx.vjp(attend, arrays, [cotangent, mx.zeros(shape[:3])])
        mx.eval(output, found, gradients)
        assert implementation != "poc" or backend in take_path()
        for what, one, right, rounded in zip(
            ("output", "dQ", "dK", "dV"), (output, *gradients), expected, plain, strict=True
        ):
            floor = SUM_ROUNDING * max(1.0, np.abs(right).max(initial=0)) if name == "float32" else 0.0
            kernel_oracle.assert_near(
                one, right, rounded, dtype, 2 if what == "output" else 3, f"{mask}: {what}", floor
            )
        assert np.array_equal(np.isneginf(np.array(found)), np.isneginf(logsumexp)), mask
        with np.errstate(invalid="ignore"):
            assert np.nanmax(np.abs(np.array(found) - logsumexp) / (1 + np.abs(logsumexp)), initial=0) < 1e-3, mask
        blind = ~seen.any(axis=-1)
        assert not np.array(output.astype(mx.float32))[blind].any(), mask
        assert not np.array(gradients[0].astype(mx.float32))[blind].any(), mask


random_calls = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@random_calls
@given(calls(["float32", "bfloat16", "float16"], [8, 20, 64]))
def test_compositions_are_right_on_the_cpu(call):
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        check(call, ["poc", IN_BLOCKS], "CPU")
    finally:
        mx.set_default_device(before)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_compositions_are_right_on_the_gpu(part):
    @seed(part)
    @settings(random_calls, max_examples=EXAMPLES // PARTS)
    @given(calls(["bfloat16", "float16"], [64, 128], (250, 400)))
    def compare(call):
        check(call, ["poc"], "CUDA")

    compare()
