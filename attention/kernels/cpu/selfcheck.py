"""The self-check on first use: small inputs, forward and gradients, against float64."""

from types import ModuleType
from typing import Final

import mlx.core as mx
import numpy as np

from attention.core.errors import KernelUnavailable
from attention.core.kv_format import parse_kv_format
from attention.kernels.common.selfcheck import exact, gradients, results
from attention.kernels.cpu import quantized_call
from attention.masks import dtype_name
from attention.measure.reference import Rules
from attention.quantized_kv import quantized

RULES: Final = Rules(scale=0.2, causal=True)
_TOLERANCE: Final = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def _disagreement(module: ModuleType, dtype: mx.Dtype, queries: int, with_gradients: bool) -> float:
    """Return the largest difference in output and gradients of a causal call with shared K/V heads and odd lengths."""
    keys = mx.random.split(mx.random.key(7), 4)
    shapes = [(1, 4, queries, 24), (1, 2, 83, 24), (1, 2, 83, 20), (1, 4, queries, 20)]
    inputs = [mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True)]

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out: mx.array = module.flash_attention(q, k, v, RULES.scale, True, 0, 0.0, None)
        return out

    q, k, v, cotangent = (exact(x) for x in inputs)
    expected = [results(q, k, v, lambda b, h: RULES)[0]]
    if with_gradients:
        found = [each for made in mx.vjp(ours, inputs[:3], inputs[3:]) for each in made]
        expected += gradients(q, k, v, cotangent, lambda b, h: RULES)[:3]
    else:
        found = [ours(*inputs[:3])]
    return max(float(np.abs(exact(a) - b).max()) for a, b in zip(found, expected, strict=True))


_FORMATS: Final = ("int8", "int3:32", "int4+mxfp4", "mxfp8+nvfp4")


def _disagreement_quantized(module: ModuleType, dtype: mx.Dtype, text: str, queries: int) -> float:
    """Return the largest difference in the output of a causal call over quantized keys and values."""
    kv = parse_kv_format(text)
    assert kv is not None
    keys = mx.random.split(mx.random.key(8), 3)
    shapes = [(1, 4, queries, 64), (1, 2, 83, 64), (1, 2, 83, 64)]
    q, *dense = (mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True))
    k, v = (quantized(x, form) for x, form in zip(dense, (kv.key, kv.value), strict=True))
    out, _ = quantized_call.attend(module, q, k, v, (RULES.scale, True, 0, 0.0, None, 0))
    expected = results(exact(q), exact(k.dequantized()), exact(v.dequantized()), lambda b, h: RULES)[0]
    return float(np.abs(exact(out) - expected).max())


def run(module: ModuleType, parts: frozenset[str]) -> None:
    """Check a compiled kernel in the dtypes that it has, and over quantized keys and values.

    Raises:
        KernelUnavailable: a result differs from the reference by more than rounding.
    """

    def check(error: float, tolerance: float, what: object) -> None:
        if not error <= tolerance:
            raise KernelUnavailable(f"the compiled kernel disagrees with the reference by {error:.2g} ({what})")

    dtypes = [dtype for dtype in _TOLERANCE if dtype_name(dtype) in parts]
    with mx.stream(mx.cpu):
        for dtype in dtypes:
            check(_disagreement(module, dtype, 37, "gradients" in parts), _TOLERANCE[dtype], dtype)
            if "few" in parts:
                check(_disagreement(module, dtype, 1, with_gradients=False), _TOLERANCE[dtype], dtype)
        for dtype in dtypes[:1] if "quantized" in parts else []:  # what is quantized is read alike in all dtypes
            for text in _FORMATS:
                for queries in (1, 37) if "few" in parts else (37,):
                    check(_disagreement_quantized(module, dtype, text, queries), _TOLERANCE[dtype], text)
