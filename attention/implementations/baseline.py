"""Unfused attention in five MLX operations; materialises the score matrix."""

import mlx.core as mx

from attention import masks
from attention.device import Device
from attention.implementations.unfused import named_products, unfused_bytes, widened_bytes
from attention.masks import Mask
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload


class Baseline:
    """Matmul, scale, softcap, mask, softmax, matmul. The softmax is float32; for float16 inputs everything is.

    Float16 scores would overflow from 65,520.
    """

    name = "baseline"

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """Return the route, which is the same for every workload."""
        return Route(
            path=named_products("manual, unfused", workload.dtype, device.backend),
            fused=False,
            reason="separate steps, which build the whole score matrix",
            predicted_bytes=widened_bytes(workload, needs)
            if workload.dtype == "float16"
            else unfused_bytes(workload, needs),
        )

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`."""
        shifted = q.dtype != mx.float32
        if q.dtype == mx.float16:
            wide_q, wide_k, wide_v = (x.astype(mx.float32) for x in (q, k, v))
            return _attend(wide_q, wide_k, wide_v, scale, mask, softcap, shifted).astype(q.dtype)
        return _attend(q, k, v, scale, mask, softcap, shifted)


def _attend(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, softcap: float | None, shifted: bool
) -> mx.array:
    batch, heads, seq, _ = q.shape
    kv_heads, kv_seq = k.shape[1], k.shape[2]
    # Query heads that share a key head are stacked, so that K and V are never repeated.
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads, seq, -1)
    scores = grouped @ k[:, :, None].swapaxes(-1, -2)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    scores = scores.reshape(batch, heads, seq, kv_seq)
    allowed, seeing = _opened(mask, seq, kv_seq, scores.dtype, shifted)
    weights = mx.softmax(masks.apply(scores, allowed), axis=-1, precise=True)
    out = weights.reshape(batch, kv_heads, heads // kv_heads, seq, kv_seq) @ v[:, :, None]
    out = out.reshape(batch, heads, seq, -1)
    return out if seeing is None else mx.where(seeing, out, mx.zeros((), out.dtype))


def _opened(
    mask: Mask, seq: int, kv_seq: int, dtype: mx.Dtype, shifted: bool
) -> tuple[mx.array | None, mx.array | None]:
    """Return the mask with fully masked rows unmasked, and which rows are not fully masked (None if surely all)."""
    whole = mask.whole(seq, kv_seq)
    if whole is None or (mask.array is None and not mask.blind_rows(seq, kv_seq)):
        return whole, None
    opened, seeing = masks.opened(whole, shifted)
    return opened if opened.dtype == mx.bool_ else _differentiable(opened, dtype), seeing


def _differentiable(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """Convert an additive mask to a dtype; clipped values keep their gradient."""
    clipped = masks.in_type(mask, dtype)
    if clipped is mask:
        return mask
    moved = mx.where(mx.isinf(mask), mx.zeros((), mask.dtype), mask - mx.stop_gradient(mask))
    return mx.stop_gradient(clipped) + moved.astype(dtype)
