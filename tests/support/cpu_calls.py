"""Random calls of the CPU kernel: shapes, masks, options and memory layouts of the inputs."""

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from tests.support import kernel_oracle


def normal(seed, *shape, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def qkv(b, h, hkv, lq, lk, d, dv, dtype, seed=0):
    shapes = [(b, h, lq, d), (b, hkv, lk, d), (b, hkv, lk, dv)]
    return [normal(seed + i, *s, dtype=dtype) for i, s in enumerate(shapes)]


@st.composite
def calls(draw):
    sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 190])
    hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dims = st.sampled_from([1, 2, 8, 15, 17, 31, 32, 33, 64, 72, 96, 128, 200, 512])
    lq, lk, d, dv = draw(sizes), draw(sizes), draw(dims), draw(dims)
    seed = draw(st.integers(0, 2**20))
    masks = {"none": None, "row": (1, 1, 1, lk), "column": (lq, 1), "full": (1, 1, lq, lk)}
    mask_shape = masks[draw(st.sampled_from(sorted(masks)))]
    mask = None if mask_shape is None else np.random.default_rng(seed).random(mask_shape) < 0.7
    if mask is not None and draw(st.booleans()):
        mask = np.where(mask, 0.5, -np.inf).astype(draw(st.sampled_from([np.float32, np.float16])))
    options = kernel_oracle.Options(
        scale=draw(st.sampled_from([d**-0.5, 1.0, -0.3])),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 20, 100])),
        softcap=draw(st.sampled_from([None, None, 1.0, 30.0])),
        mask=mask,
    )
    return (draw(st.integers(1, 2)), hkv * group, hkv, lq, lk, d, dv), options, seed, draw(st.integers(0, 3))


def laid_out(x, layout):
    """Return the array in another memory layout: unchanged, (B, L, H, D), (B, H, D, L), or a slice of a cache."""
    if layout == 1:
        return mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if layout == 2:
        return mx.contiguous(x.swapaxes(2, 3)).swapaxes(2, 3)
    if layout == 3:
        return mx.pad(x, [(0, 0), (0, 0), (2, 5), (1, 3)])[:, :, 2:-5, 1:-3]
    return x


def largest_product(q, k):
    """Return the largest sum of |q| |k|, the scale of rounding errors of the scores."""
    group = q.shape[1] // k.shape[1]
    products = np.abs(kernel_oracle.numbers(q)) @ np.repeat(np.abs(kernel_oracle.numbers(k)), group, 1).swapaxes(-1, -2)
    return products.max()


def exact_scores(seed, shape, exponent, dtype, negative=False):
    """Return q, k and v whose scores, times 1/4, are exact in float32: integers up to 256 times 2**exponent.

    Ties among them are exact too; `negative` makes all scores negative.
    """
    b, h, hkv, lq, lk, d = shape
    random = np.random.default_rng(seed)
    half = exponent // 2

    def powers(shape, sign, power):
        numbers = random.choice([1.0, 2.0, 4.0], shape) * (sign if negative else random.choice([-1.0, 1.0], shape))
        return mx.array((numbers * 2.0**power).astype(np.float32)).astype(dtype)

    q = powers((b, h, lq, d), 1, half + 2)
    k = powers((b, hkv, lk, d), -1, exponent - half)
    return q, k, normal(seed, b, hkv, lk, d, dtype=dtype)


SCORE_EXPONENTS = [(mx.float32, e) for e in (-100, -20, 8, 13, 20, 33, 66, 93)]
SCORE_EXPONENTS += [(mx.bfloat16, e) for e in (-60, 8, 13, 33, 60)] + [(mx.float16, e) for e in (-8, 8, 18)]
"""Exponents of scores for `exact_scores`, over the range of each input type."""
SCORE_SHAPES = [(1, 2, 2, 70, 300, 16), (1, 4, 2, 1, 90, 16), (1, 1, 1, 3, 3000, 16)]
"""Many queries; few; few with spans of keys that are joined."""
