"""The self-check on first use: small inputs, forward and gradients, against float64."""

from types import ModuleType
from typing import Final

import mlx.core as mx
import numpy as np

from attention.core.errors import KernelUnavailable
from attention.kernels.common.selfcheck import exact, gradients, results
from attention.measure.reference import Rules

RULES: Final = Rules(scale=0.2, causal=True)
_TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def _disagreement(module: ModuleType, dtype: mx.Dtype) -> float:
    """Return the largest difference in output and gradients of a causal call with shared K/V heads and odd lengths."""
    keys = mx.random.split(mx.random.key(7), 4)
    shapes = [(1, 4, 37, 24), (1, 2, 83, 24), (1, 2, 83, 20), (1, 4, 37, 20)]
    inputs = [mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True)]

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out: mx.array = module.flash_attention(q, k, v, RULES.scale, True, 0, 0.0, None)
        return out

    found = [each for made in mx.vjp(ours, inputs[:3], inputs[3:]) for each in made]
    q, k, v, cotangent = (exact(x) for x in inputs)
    expected = [results(q, k, v, lambda b, h: RULES)[0], *gradients(q, k, v, cotangent, lambda b, h: RULES)[:3]]
    return max(float(np.abs(exact(a) - b).max()) for a, b in zip(found, expected, strict=True))


def run(module: ModuleType) -> None:
    """Check a compiled kernel in all three dtypes.

    Raises:
        KernelUnavailable: a result differs from the reference by more than rounding.
    """
    with mx.stream(mx.cpu):
        for dtype, tolerance in _TOLERANCE.items():
            error = _disagreement(module, dtype)
            if not error <= tolerance:
                raise KernelUnavailable(f"the compiled kernel disagrees with the reference by {error:.2g} ({dtype})")
