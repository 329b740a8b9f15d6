"""FlashAttention kernels in Metal, compiled by MLX and checked against float64 on first use.

Importing this package does not import MLX; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention.core.errors import KernelUnavailable

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.masks import Pattern
    from attention.quantized_kv import KeyOrValue

__all__ = ["KernelUnavailable", "availability", "flash_attention", "flash_attention_with_logsumexp"]


def availability() -> tuple[bool, str]:
    """Return whether the kernels can be used on this machine, and the reason in one line; compiles nothing."""
    from attention.kernels.metal import trust

    try:
        return True, trust.describe()
    except KernelUnavailable as unavailable:
        return False, str(unavailable)


def flash_attention(
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    pattern: Pattern | None = None,
    alibi: mx.array | None = None,
) -> mx.array:
    """Compute attention on an Apple GPU; arguments and results as in `kernels.common.FlashAttention`.

    D, which is Dv, is 32, 64, 80, 96, 128, 192 or 256, with any strides, in float32, float16 or bfloat16. An additive
    mask is differentiable, and so are sinks and slopes; mask and slopes through the score matrix. Quantized k and v, of
    any formats, are read packed, tile by tile; such a call has no gradient. Further keywords:

    - `sinks`: (H,), one extra logit per head in the softmax, without a value.
    - `pattern`: of `attention.masks`, whose block lists name the visible tiles; may be combined with the others.
    - `alibi`: (H,), slopes: slope * (key - position of the query) is added to the scores after the softcap.

    Raises:
        ValueError: shapes, dtypes or values are invalid or unsupported.
        UsageError: the pattern does not fit the shape.
        KernelUnavailable: there is no Metal device, or the kernel failed its self-check.
    """
    from attention.kernels.metal import attend

    return attend.attend(q, k, v, scale, causal, window, mask, softcap, sinks, False, pattern, alibi)[0]


def flash_attention_with_logsumexp(
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    pattern: Pattern | None = None,
    alibi: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute `flash_attention` and the natural logarithm of each row's sum of exponentials, sinks included.

    Returns:
        The output (B, H, Lq, D), and the logsumexp (B, H, Lq) in float32, -inf for a fully masked row. Both are
        differentiable.

    Raises:
        ValueError: shapes, dtypes or values are invalid or unsupported.
        KernelUnavailable: there is no Metal device, or the kernel failed its self-check.
    """
    from attention.kernels.metal import attend

    output, logsumexp = attend.attend(q, k, v, scale, causal, window, mask, softcap, sinks, True, pattern, alibi)
    return output, logsumexp
