"""The self-check on first use: small inputs, forward and gradients, against unfused attention in MLX operations."""

from types import ModuleType

import mlx.core as mx

from attention.core.errors import KernelUnavailable

_TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def _plain(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    group = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, group, axis=1), mx.repeat(v, group, axis=1)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    queries, keys = scores.shape[-2:]
    visible = mx.arange(keys)[None] <= mx.arange(queries)[:, None] + keys - queries
    return mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1) @ v


def _disagreement(module: ModuleType, dtype: mx.Dtype) -> float:
    """Return the largest difference in output and gradients of a causal call with shared K/V heads and odd lengths."""
    keys = mx.random.split(mx.random.key(7), 4)
    shapes = [(1, 4, 37, 24), (1, 2, 83, 24), (1, 2, 83, 20), (1, 4, 37, 20)]
    q, k, v, cotangent = (mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True))
    wide = [x.astype(mx.float32) for x in (q, k, v, cotangent)]

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out: mx.array = module.flash_attention(q, k, v, 0.2, True, 0, 0.0, None)
        return out

    def theirs(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return _plain(q, k, v, 0.2)

    got_out, got_gradients = mx.vjp(ours, [q, k, v], [cotangent])
    out, gradients = mx.vjp(theirs, wide[:3], [wide[3]])
    pairs = zip([*got_out, *got_gradients], [*out, *gradients], strict=True)
    worst = mx.max(mx.stack([mx.max(mx.abs(a.astype(mx.float32) - b)) for a, b in pairs]))
    return float(worst)  # NaN fails every comparison


def run(module: ModuleType) -> None:
    """Check a compiled kernel in all three dtypes.

    Raises:
        KernelUnavailable: a result differs from unfused attention by more than rounding.
    """
    with mx.stream(mx.cpu):
        for dtype, tolerance in _TOLERANCE.items():
            error = _disagreement(module, dtype)
            if not error <= tolerance:
                raise KernelUnavailable(f"the compiled kernel disagrees with the reference by {error:.2g} ({dtype})")
