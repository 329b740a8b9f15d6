"""Gradients through the score matrix in MLX operations, used if the backward kernels failed their self-check."""

from collections.abc import Sequence

import mlx.core as mx

from attention.kernels.metal.call import Call
from attention.masks import Mask


def plain_gradients(
    primals: Sequence[mx.array], d_o: mx.array, d_lse: mx.array | None, call: Call
) -> tuple[mx.array, ...]:
    """Return the gradients of q, k, v, mask and sinks; arguments as in `gradient.gradients`."""
    q, k, v, mask, sinks = primals

    def attend(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> list[mx.array]:
        return list(plain_attention(q, k, v, mask, sinks, call))

    made = mx.vjp(attend, [q, k, v, sinks], [d_o, _of_logsumexp(d_lse, q)])[1]
    return made[0], made[1], made[2], mask_gradient(primals, d_o, d_lse, call), made[3]


def mask_gradient(primals: Sequence[mx.array], d_o: mx.array, d_lse: mx.array | None, call: Call) -> mx.array:
    """Return the gradient of the mask, 0 unless it is additive; computed only if it is evaluated."""
    q, k, v, mask, sinks = primals
    if call.mask in ("none", "bool"):
        return mx.zeros_like(mask)

    def attend(mask: mx.array) -> list[mx.array]:
        return list(plain_attention(q, k, v, mask, sinks, call))

    return mx.vjp(attend, [mask], [d_o, _of_logsumexp(d_lse, q)])[1][0]


def _of_logsumexp(d_lse: mx.array | None, q: mx.array) -> mx.array:
    return mx.zeros(q.shape[:3]) if d_lse is None else d_lse


def plain_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array, sinks: mx.array, call: Call
) -> tuple[mx.array, mx.array]:
    """Return output and logsumexp, computed in float32; fully masked rows give 0 and -inf."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, dim).astype(mx.float32)
    scores = call.scale * (grouped @ k[:, :, None].swapaxes(-1, -2).astype(mx.float32))
    if call.softcap is not None:
        scores = call.softcap * mx.tanh(scores / call.softcap)
    seen = Mask(causal=call.causal, window=call.window).whole(queries, keys)
    seen = mx.ones((queries, keys), mx.bool_) if seen is None else seen
    if call.mask != "none":
        by_group = mx.broadcast_to(mask, (batch, heads, queries, keys)).reshape(scores.shape)
        seen = seen & (by_group if call.mask == "bool" else ~mx.isneginf(by_group))
        added = mx.zeros_like(scores) if call.mask == "bool" else by_group.astype(mx.float32)
        scores = mx.maximum(scores + mx.where(seen, added, 0.0), mx.finfo(mx.float32).min)
    sees = mx.any(seen, axis=-1, keepdims=True)
    scores = mx.where(seen, scores, mx.where(sees, -mx.inf, 0.0))  # fully masked rows: any finite value, set to 0 below
    weights, logsumexp = mx.softmax(scores, axis=-1), mx.logsumexp(scores, axis=-1, keepdims=True)
    weights, logsumexp = mx.where(sees, weights, 0.0), mx.where(sees, logsumexp, -mx.inf)
    if call.sinks:
        sink = sinks.reshape(1, kv_heads, heads // kv_heads, 1, 1)
        weights, logsumexp = _with_sink(weights, logsumexp, sink, sees)
    out = (weights @ v[:, :, None].astype(mx.float32)).reshape(batch, heads, queries, -1)
    return out.astype(q.dtype), logsumexp.reshape(batch, heads, queries)


def _with_sink(weights: mx.array, logsumexp: mx.array, sink: mx.array, sees: mx.array) -> tuple[mx.array, mx.array]:
    """Return weights and logsumexp with a sink; `sees`: the rows that are not fully masked."""
    some = sees | ~mx.isneginf(sink)
    sink = mx.where(some, sink, 0.0)  # a fully masked row without a sink: any finite value, -inf below
    whole = mx.logaddexp(mx.where(sees, logsumexp, sink), sink)
    joined = mx.where(sees, whole, sink)
    share = mx.where(sees, mx.exp(mx.where(sees, logsumexp, joined) - joined), 0.0)
    return weights * share, mx.where(some, joined, -mx.inf)
