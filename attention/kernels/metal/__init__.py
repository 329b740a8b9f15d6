"""The fused Metal kernels: flash attention in Metal's language, compiled by MLX and checked at first use.

Importing this costs nothing: MLX comes in only when something is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention.errors import KernelUnavailable

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["KernelUnavailable", "availability", "flash_attention", "flash_attention_with_logsumexp"]


def availability() -> tuple[bool, str]:
    """Whether the kernels can be tried on this machine, and why (not), in one line; compiles nothing."""
    from attention.kernels.metal import machine

    try:
        return True, machine.look()
    except KernelUnavailable as unavailable:
        return False, str(unavailable)


def flash_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(softcap * tanh(q k' * scale / softcap) + mask) v, without the score matrix (Dao et al., 2022).

    Args:
        q: queries (B, H, Lq, D), any strides; D in 32, 64, 80, 96, 128, 192, 256; float32, float16 or bfloat16.
        k: keys (B, Hkv, Lk, D), H a multiple of Hkv, in the type of q.
        v: values (B, Hkv, Lk, D), in the type of q.
        scale: what the dot products are multiplied by, usually D ** -0.5.
        causal: query i sees keys up to i + Lk - Lq (lower-right aligned).
        window: a query sees the last `window` of those keys only; implies causal.
        mask: bool (true = attend) or additive, broadcast to (B, H, Lq, Lk); may go with causal and window.
        softcap: bound of the scores, applied before the mask.
        sinks: (H,), a score for each head that takes part in the softmax and has no value.

    Returns:
        (B, H, Lq, D) in the type of q; rows with nothing to attend to are 0. Gradients go to q, k, v, the sinks
        and an additive mask, the last by way of the score matrix.

    Raises:
        ValueError: for shapes, types or values that do not fit or are not taken.
        KernelUnavailable: there is no Metal here, or the kernel has not shown that it is right.
    """
    from attention.kernels.metal import attend

    return attend.attend(q, k, v, scale, causal, window, mask, softcap, sinks, False)[0]


def flash_attention_with_logsumexp(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`flash_attention`, and the natural logarithm of each row's sum of exponentials, the sink's among them.

    Returns:
        The output (B, H, Lq, D), and the logsumexp (B, H, Lq) in float32, -inf for a row with nothing to attend to.
        Gradients flow through both.

    Raises:
        ValueError: for shapes, types or values that do not fit or are not taken.
        KernelUnavailable: there is no Metal here, or the kernel has not shown that it is right.
    """
    from attention.kernels.metal import attend

    output, logsumexp = attend.attend(q, k, v, scale, causal, window, mask, softcap, sinks, True)
    return output, logsumexp
