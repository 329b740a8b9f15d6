"""Unfused attention in five MLX operations; materialises the score matrix.

It is the baseline, and computes what the gradients of the kernels do not.
"""

import mlx.core as mx

from attention import masks
from attention.masks import Mask


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    shifted: bool = False,
) -> tuple[mx.array, mx.array]:
    """Return output (B, H, Lq, Dv) and logsumexp (B, H, Lq); fully masked rows give 0 and -inf.

    Args:
        q: query (B, H, Lq, D); its dtype is that of the scores.
        k: key (B, Hkv, Lk, D).
        v: value (B, Hkv, Lk, Dv).
        scale: factor of the scores.
        mask: the keys each query attends to. An additive array, and slopes of alibi, have gradients.
        softcap: bound of the scores, applied before the mask.
        sinks: (H,), an extra logit per head in the softmax of every row, without a value.
        shifted: subtract the largest values of an additive mask's rows from scores, until their softmax is computed.
    """
    batch, heads, seq, width = q.shape
    kv_heads, kv_seq = k.shape[1], k.shape[2]
    # Query heads that share a key head are stacked, so that K and V are never repeated. All sizes are given, as a graph
    # of `mx.compile(shapeless=True)` would multiply matrices of other lengths, beyond their ends.
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads, seq, width)
    key, value = (x.reshape(batch, kv_heads, 1, kv_seq, x.shape[3]) for x in (k, v))
    scores = grouped @ key.swapaxes(-1, -2)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    scores = scores.reshape(batch, heads, seq, kv_seq)
    if mask.alibi is not None:
        scores = scores + masks.alibi_bias(mask.alibi, range(seq), range(kv_seq), seq, kv_seq)
    whole = mask.dense((batch, heads, seq, kv_seq))
    allowed, seeing = _unmasked(mask, whole, (seq, kv_seq), scores.dtype, shifted)
    scores = masks.apply(scores, allowed)
    weights = mx.softmax(scores, axis=-1, precise=True).astype(v.dtype)
    out = weights.reshape(batch, kv_heads, heads // kv_heads, seq, kv_seq) @ value
    out = out.reshape(batch, heads, seq, v.shape[3])
    logsumexp = mx.logsumexp(scores.astype(mx.float32), axis=-1)
    if shifted and mask.array is not None and whole is not None and masks.has_shift(whole):
        logsumexp = logsumexp + masks.as_4d(masks.shift(whole.max(axis=-1, keepdims=True)))[..., 0].astype(mx.float32)
    rows = None if seeing is None else masks.as_4d(seeing)[..., 0]
    if rows is not None:
        out = mx.where(rows[..., None], out, mx.zeros((), out.dtype))
        logsumexp = mx.where(rows, logsumexp, mx.array(-mx.inf))
    return (out, logsumexp) if sinks is None else _with_sinks(out, logsumexp, sinks)


def _with_sinks(out: mx.array, logsumexp: mx.array, sinks: mx.array) -> tuple[mx.array, mx.array]:
    """Return output and logsumexp with an extra logit per head: the weights of the keys shrink by one factor."""
    empty = mx.isneginf(logsumexp)
    known = mx.where(empty, 0.0, logsumexp)  # not -inf, of which a gradient would be NaN
    sink = mx.broadcast_to(sinks[:, None], logsumexp.shape)
    joined = mx.where(empty, sink, mx.logaddexp(known, sink))
    share = mx.where(empty, 0.0, mx.exp(known - mx.where(empty, 0.0, joined)))
    return out * share[..., None].astype(out.dtype), joined


def _unmasked(
    mask: Mask, whole: mx.array | None, lengths: tuple[int, int], dtype: mx.Dtype, shifted: bool
) -> tuple[mx.array | None, mx.array | None]:
    """Return the dense mask with fully masked rows unmasked, and which rows see a key (None if surely all)."""
    if whole is None or (mask.array is None and mask.pattern is None and not mask.empty_rows(*lengths)):
        return whole, None
    opened, seeing = masks.opened(whole, shifted)
    return opened if opened.dtype == mx.bool_ else _differentiable(opened, dtype), seeing


def _differentiable(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """Convert an additive mask to a dtype; clipped values keep their gradient."""
    clipped = masks.cast_additive(mask, dtype)
    if clipped is mask:
        return mask
    moved = mx.where(mx.isinf(mask), mx.zeros((), mask.dtype), mask - mx.stop_gradient(mask))
    return mx.stop_gradient(clipped) + moved.astype(dtype)
