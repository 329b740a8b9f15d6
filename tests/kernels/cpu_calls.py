"""Random calls of the CPU kernel: shapes, masks, options and how the inputs lie in memory."""

import kernel_oracle as oracle
import mlx.core as mx
import numpy as np
from hypothesis import strategies as st


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
    options = oracle.Options(
        scale=draw(st.sampled_from([d**-0.5, 1.0, -0.3])),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 20, 100])),
        softcap=draw(st.sampled_from([None, None, 1.0, 30.0])),
        mask=mask,
    )
    return (draw(st.integers(1, 2)), hkv * group, hkv, lq, lk, d, dv), options, seed, draw(st.integers(0, 3))


def laid_out(x, layout):
    """The same array, lying differently in memory: as it is, (B, L, H, D), (B, H, D, L), or a slice of a cache."""
    if layout == 1:
        return mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if layout == 2:
        return mx.contiguous(x.swapaxes(2, 3)).swapaxes(2, 3)
    if layout == 3:
        return mx.pad(x, [(0, 0), (0, 0), (2, 5), (1, 3)])[:, :, 2:-5, 1:-3]
    return x


def largest_product(q, k):
    """The largest sum of |q| |k|: roundings of the scores are to be seen against it."""
    group = q.shape[1] // k.shape[1]
    products = np.abs(oracle.numbers(q)) @ np.repeat(np.abs(oracle.numbers(k)), group, 1).swapaxes(-1, -2)
    return products.max()
