"""Gradients through MLX's own path: its SDPA where that computes the same, else plain attention in MLX's operations."""

import mlx.core as mx

from attention.kernels.cuda.call import Call
from attention.kernels.cuda.layout import laid_out, of_sdpa
from attention.masks import Mask, apply, opened


def through_mlx(primals: list[mx.array], cotangents: list[mx.array], call: Call) -> list[mx.array]:
    """The gradients of q, k and v, and of a mask.

    Args:
        primals: q, k, v, and a mask (batch, heads, queries, keys) if the call has one.
        cotangents: of the output, and of the logsumexp if that was asked for.
        call: what was computed.
    """
    queries, keys = primals[0].shape[2], primals[1].shape[2]
    blind = call.mask is not None or (
        call.causal and queries > keys
    )  # some rows may see nothing, which gives NaN there
    plain = len(cotangents) > 1 or call.softcap is not None or blind

    def sdpa(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        window = Mask(window=call.window).whole(queries, keys) if call.window else None
        mask = window if window is not None else "causal" if call.causal else None
        q, k, v = laid_out(q, k, v)
        return [of_sdpa(mx.fast.scaled_dot_product_attention(q, k, v, scale=call.scale, mask=mask))]

    def unfused(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> list[mx.array]:
        return list(plain_attention(q, k, v, call, mask))[: len(cotangents)]

    _, gradients = mx.vjp(unfused if plain else sdpa, primals, cotangents)
    return gradients


def plain_attention(
    q: mx.array, k: mx.array, v: mx.array, call: Call, mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Output and logsumexp by way of the whole score matrix, in float32; rows that see nothing give 0 and -inf."""
    group, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    wide_k, wide_v = (mx.repeat(x.astype(mx.float32), group, axis=1) for x in (k, v))
    scores = call.scale * (q.astype(mx.float32) @ wide_k.swapaxes(-1, -2))
    if call.softcap is not None:
        scores = call.softcap * mx.tanh(scores / call.softcap)
    whole = Mask(causal=call.causal, window=call.window, array=mask).whole(queries, keys)
    if whole is None:
        return (mx.softmax(scores, axis=-1) @ wide_v).astype(q.dtype), mx.logsumexp(scores, axis=-1)
    allowed, sees = opened(whole, shifted=False)  # of which the logsumexp would lack what is taken off
    scores = apply(scores, allowed)
    out = mx.where(sees, mx.softmax(scores, axis=-1) @ wide_v, 0.0)
    return out.astype(q.dtype), mx.where(sees[..., 0], mx.logsumexp(scores, axis=-1), -mx.inf)
