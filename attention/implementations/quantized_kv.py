"""Attention that reads quantized keys and values packed, as mlx-lm does with a quantized cache.

    scores = quantized_matmul(q, K)      softmax      output = quantized_matmul(weights, V)

The whole score matrix is between the two products; K and V are never dequantized in memory.
"""

from typing import Final

import mlx.core as mx
from msgspec import structs

from attention import masks
from attention.core.kv_format import parse_kv_format
from attention.core.route import Needs
from attention.core.workload import ITEM_BYTES, Workload
from attention.implementations.baseline import unfused_bytes
from attention.implementations.calls import current_backend
from attention.masks import Mask
from attention.measure.device import Backend
from attention.quantized_kv import QuantizedArray

MAX_PACKED_ROWS: Final = 32
"""Number of query rows to a key head from which keys are dequantized once instead of being read packed by every row."""
PACKED_PATH: Final = "packed keys and values"


def reads_packed(workload: Workload, backend: Backend) -> bool:
    """Return whether `practical` lets every row read keys and values packed; otherwise it dequantizes parts of them.

    Never on CUDA: MLX compiles its packed products for each kind of call there, which takes half a minute, and they
    are no faster than dequantizing then.
    """
    return backend != "cuda" and workload.seq * workload.heads // workload.kv_heads < MAX_PACKED_ROWS


def packed_product(x: mx.array, packed: QuantizedArray, transpose: bool) -> mx.array:
    """Return the product of x and quantized values, or their transpose, in x's dtype.

    Scales in a dtype other than x's are multiplied in float32: in x's they could overflow. On CUDA, where MLX takes
    contiguous parts only, views of longer buffers are copied, packed.
    """
    if current_backend() == "cuda":
        packed = packed.with_arrays([mx.contiguous(part) for part in packed.arrays])
    form, fixed = packed.format, packed.constant_integers()
    made = mx.quantized_matmul(
        x, fixed.numbers, fixed.scales, fixed.biases, transpose, form.group_size, form.bits, form.mode
    )
    return made.astype(x.dtype)


def attend_packed(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    *,
    scale: float,
    mask: Mask,
    widened: bool,
    by_axis: bool = False,
    shifted: bool = False,
) -> mx.array:
    """Compute attention in two products with packed keys and values.

    Args:
        q: query (B, H, Lq, D).
        k: key (B, Hkv, Lk, D).
        v: value (B, Hkv, Lk, Dv).
        scale: factor of the scores.
        mask: the keys each query attends to; not a bias.
        widened: compute in float32.
        by_axis: give query heads that share a key head an axis of their own, as mlx-lm does, along which MLX repeats
            packed keys and values on the CPU; otherwise their rows are stacked.
        shifted: subtract `masks.shift` from an additive mask.
    """
    if widened and q.dtype != mx.float32:
        wide = q.astype(mx.float32)
        options = {"by_axis": by_axis, "shifted": shifted}
        return attend_packed(wide, k, v, scale=scale, mask=mask, widened=False, **options).astype(q.dtype)
    batch, heads, seq, width = q.shape
    kv_heads, kv_seq = k.shape[1], k.shape[2]
    share = heads // kv_heads
    rows: tuple[int, ...] = (share * seq,)
    if by_axis:
        rows, k, v = (share, seq), k[:, :, None], v[:, :, None]
    scores = packed_product((q * scale).reshape(batch, kv_heads, *rows, width), k, True)
    scores = scores.reshape(batch, heads, seq, kv_seq)
    whole = mask.dense((batch, heads, seq, kv_seq))
    opened, seeing = whole, None
    if whole is not None and not (seq == 1 and mask.array is None and mask.pattern is None):
        opened, seeing = masks.opened(whole, shifted)
    weights = mx.softmax(masks.apply(scores, opened), axis=-1, precise=True)
    out = packed_product(weights.reshape(batch, kv_heads, *rows, kv_seq), v, False)
    out = out.reshape(batch, heads, seq, v.shape[-1])  # `by_axis` gives v a fifth axis
    return out if seeing is None else mx.where(masks.as_4d(seeing), out, mx.zeros((), out.dtype))


def packed_bytes(workload: Workload, needs: Needs, widened: bool, repeated: bool = False) -> int:
    """Return the peak bytes above the inputs of `attend_packed`: the score matrix, and scales converted to float32.

    `repeated`: packed keys and values are repeated for the query heads that share them, as with `by_axis` on the CPU.
    """
    kv, item = parse_kv_format(workload.kv_format), ITEM_BYTES[workload.dtype]
    assert kv is not None
    share = workload.heads // workload.kv_heads
    copies = share * workload.key_value_bytes if repeated and share > 1 else 0
    if not widened or workload.dtype == "float32":
        return unfused_bytes(workload, needs) + copies
    groups = sum(
        2 * width // form.group_size
        for form, width in ((kv.key, workload.head_dim), (kv.value, workload.value_dim))
        if form.has_biases
    )
    scales = 4 * groups * workload.batch * workload.kv_heads * workload.kv_seq
    wide = structs.replace(workload, dtype="float32")
    return unfused_bytes(wide, needs) + scales + workload.query_bytes * 4 // item + workload.output_bytes + copies
