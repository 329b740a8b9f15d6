"""Gradients through MLX's own path: its SDPA where that computes the same, else plain attention in MLX's operations."""

import mlx.core as mx

from attention.kernels.cuda.call import Call
from attention.masks import Mask


def through_mlx(primals: list[mx.array], cotangents: list[mx.array], call: Call) -> list[mx.array]:
    """The gradients of q, k and v.

    Args:
        primals: q, k, v.
        cotangents: of the output, and of the logsumexp if that was asked for.
        call: what was computed.
    """
    queries, keys = primals[0].shape[2], primals[1].shape[2]
    plain = len(cotangents) > 1 or call.softcap is not None or (call.causal and queries > keys)

    def sdpa(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        window = Mask(window=call.window).whole(queries, keys) if call.window else None
        mask = window if window is not None else "causal" if call.causal else None
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=call.scale, mask=mask)]

    def unfused(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return list(plain_attention(q, k, v, call))[: len(cotangents)]

    _, gradients = mx.vjp(unfused if plain else sdpa, primals, cotangents)
    return gradients


def plain_attention(q: mx.array, k: mx.array, v: mx.array, call: Call) -> tuple[mx.array, mx.array]:
    """Output and logsumexp by way of the whole score matrix, in float32; rows that see nothing give 0 and -inf."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, dim).astype(mx.float32)
    scores = call.scale * (grouped @ k[:, :, None].swapaxes(-1, -2).astype(mx.float32))
    if call.softcap is not None:
        scores = call.softcap * mx.tanh(scores / call.softcap)
    seen = Mask(causal=call.causal, window=call.window).whole(queries, keys)
    blind = max(0, queries - keys) if call.causal else 0
    if seen is not None:
        opened = seen | (mx.arange(queries) < blind)[:, None]
        scores = mx.where(opened, scores, -mx.inf)
    out = (mx.softmax(scores, axis=-1) @ v[:, :, None].astype(mx.float32)).reshape(batch, heads, queries, -1)
    logsumexp = mx.logsumexp(scores, axis=-1).reshape(batch, heads, queries)
    if blind:
        sees = mx.arange(queries) >= blind
        out, logsumexp = mx.where(sees[:, None], out, 0.0), mx.where(sees, logsumexp, -mx.inf)
    return out.astype(q.dtype), logsumexp
