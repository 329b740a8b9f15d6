"""Calls of the CUDA kernels, and one on random arrays with its checks against float64 by FlashAttention 3's rule."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from attention.kernels import cuda
from attention.kernels.cuda import choice
from attention.kernels.cuda import gradients as cuda_gradients
from attention.kernels.cuda.runtime.call import DIM_STEP, ELEMENTS, CallParams, CallShape, check_arrays, normalize
from tests.support import kernel_oracle

KINDS = {  # options of a call besides its arrays; for a mask its shape, 1 where it broadcasts, and its type
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 37},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"causal": True, "window": 150, "softcap": 1.5},
    "bool": {"mask": ("bhqk", "bool")},
    "bool of keys": {"mask": ("b11k", "bool")},
    "bfloat16": {"mask": ("11qk", "bfloat16"), "causal": True},
    "float16": {"mask": ("1h1k", "float16"), "softcap": 1.5},
    "float32": {"mask": ("bhqk", "float32"), "causal": True, "window": 61},
}
PLAIN = CallParams(scale=0.125, causal=False, window=None, softcap=None)
CALLS = {
    "full": PLAIN,
    "causal": replace(PLAIN, causal=True),
    "window": replace(PLAIN, causal=True, window=37),
    "softcap": replace(PLAIN, softcap=1.5),
    "all": replace(PLAIN, causal=True, window=150, softcap=1.5),
}


class Case:
    """Random arrays of a call, in its dtype and in float64, and the kernel expected for it."""

    def __init__(self, size, dims, dtype, kind, seed, layout="bhld", path="general"):
        self.path = path
        batch, heads, kv_heads, queries, keys = size
        self.random = np.random.default_rng(seed)
        self.dtype = kernel_oracle.DTYPES[dtype]
        shapes = [
            (batch, heads, queries, dims[0]),
            (batch, kv_heads, keys, dims[0]),
            (batch, kv_heads, keys, dims[1]),
            (batch, heads, queries, dims[1]),
        ]
        self.arrays = [laid_out(mx.array(self.normal(shape)).astype(self.dtype), layout) for shape in shapes]
        self.numbers = [kernel_oracle.numbers(x) for x in self.arrays]
        self.mask = self.made_mask(size, *kind["mask"]) if "mask" in kind else None
        seen = (
            None
            if self.mask is None
            else np.array(self.mask)
            if self.mask.dtype == mx.bool_
            else kernel_oracle.numbers(self.mask)
        )
        keywords = {name: value for name, value in kind.items() if name != "mask"}
        self.options = kernel_oracle.Options(dims[0] ** -0.5, mask=seen, **keywords)
        self.keywords = {"scale": dims[0] ** -0.5, "mask": self.mask, **keywords}

    def normal(self, shape):
        return self.random.standard_normal(shape, np.float32)

    def made_mask(self, size, axes, dtype):
        sizes = dict(zip("bhqk", (size[0], size[1], size[3], size[4]), strict=True))
        shape = [sizes.get(axis, 1) for axis in axes]
        hidden = self.random.random(shape) < 0.3
        if dtype == "bool":
            return mx.array(~hidden)
        return mx.array(np.where(hidden, -np.inf, self.normal(shape)).astype(np.float32)).astype(
            kernel_oracle.DTYPES[dtype]
        )

    def forward(self):
        found = cuda.flash_attention_with_logsumexp(*self.arrays[:3], **self.keywords)
        kernel_oracle.poison()
        mx.eval(found)
        return found

    def gradients(self):
        _, found = mx.vjp(
            lambda q, k, v: cuda.flash_attention(q, k, v, **self.keywords), self.arrays[:3], self.arrays[3:]
        )
        kernel_oracle.poison()
        mx.eval(found)
        return found

    def requested(self):
        """The call in the kernels' terms."""
        q, k, v, _ = self.arrays
        dtype, kind = check_arrays(q, k, v, self.mask)
        named = {"causal": False, "window": None, "softcap": None, **self.keywords, "mask": kind}
        dims = [DIM_STEP * -(-x.shape[3] // DIM_STEP) for x in (q, v)]
        shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], dims[0], ELEMENTS[dtype], dims[1])
        return shape, normalize(**named, keys=k.shape[2])

    def check_forward(self, what):
        output, logsumexp = self.forward()
        assert choice.path_of(*self.requested()) == (self.path, [])
        exact, right, _ = kernel_oracle.attention(*self.numbers[:3], self.options)
        plain = kernel_oracle.plain_attention(*self.numbers[:3], self.options, self.dtype)
        kernel_oracle.assert_near(output, exact, plain, self.dtype, 2, f"{what}: output")
        found = kernel_oracle.numbers(logsumexp)
        assert np.array_equal(np.isneginf(found), np.isneginf(right)), f"{what}: rows that see nothing"
        with np.errstate(invalid="ignore"):
            assert np.nanmax(np.abs(found - right), initial=0) < 1e-3, f"{what}: logsumexp"

    def check_gradients(self, what):
        exact = kernel_oracle.gradients(*self.numbers, self.options)
        plain = kernel_oracle.plain_gradients(*self.numbers, self.options, self.dtype)
        made = self.gradients()
        assert cuda_gradients.refusal(*self.requested()) is None
        for name, found, right, rounded in zip(("dQ", "dK", "dV"), made, exact, plain, strict=True):
            kernel_oracle.assert_near(found, right, rounded, self.dtype, 3, f"{what}: {name}")


def laid_out(x, layout):
    """Return the array with other strides."""
    if layout == "blhd":  # as a projection leaves them
        return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    if layout == "cut":  # out of a larger array, as from a cache with room for more, or from q, k and v side by side
        wide = mx.pad(x, [(0, 0), (0, 1), (3, 5), (8, 8)], constant_values=float("nan"))
        return wide[:, : x.shape[1], 3 : 3 + x.shape[2], 8 : 8 + x.shape[3]]
    return x
