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
from attention.masks import Mask
from attention.quantized_kv import QuantizedArray

MAX_PACKED_ROWS: Final = 32
"""Number of query rows from which keys are dequantized once instead of being read packed by every row."""
PACKED_PATH: Final = "packed keys and values"


def packed_product(x: mx.array, packed: QuantizedArray, transpose: bool) -> mx.array:
    """Return the product of x and quantized values, or their transpose, in x's dtype.

    Scales in a dtype other than x's are multiplied in float32: in x's they could overflow.
    """
    form, scales, biases = packed.format, packed.scales, packed.biases
    made = mx.quantized_matmul(x, packed.numbers, scales, biases, transpose, form.group_size, form.bits, form.mode)
    return made.astype(x.dtype)


def attend_packed(
    q: mx.array, k: QuantizedArray, v: QuantizedArray, *, scale: float, mask: Mask, widened: bool
) -> mx.array:
    """Compute attention in two products with packed keys and values; `widened`: in float32."""
    if widened and q.dtype != mx.float32:
        return attend_packed(q.astype(mx.float32), k, v, scale=scale, mask=mask, widened=False).astype(q.dtype)
    batch, heads, seq, _ = q.shape
    kv_heads, kv_seq = k.shape[1], k.shape[2]
    # an axis for the query heads that share a key head
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads, seq, -1)
    scores = packed_product(grouped, k[:, :, None], True).reshape(batch, heads, seq, kv_seq)
    whole = mask.dense((batch, heads, seq, kv_seq))
    opened, seeing = whole, None
    if whole is not None and not (seq == 1 and mask.array is None and mask.pattern is None):
        opened, seeing = masks.opened(whole)
    weights = mx.softmax(masks.apply(scores, opened), axis=-1, precise=True)
    weights = weights.reshape(*grouped.shape[:-1], kv_seq)
    out = packed_product(weights, v[:, :, None], False).reshape(batch, heads, seq, -1)
    return out if seeing is None else mx.where(masks.as_4d(seeing), out, mx.zeros((), out.dtype))


def packed_bytes(workload: Workload, needs: Needs, widened: bool) -> int:
    """Return the peak bytes above the inputs of `attend_packed`: the score matrix, and scales converted to float32."""
    dtype = "float32" if widened else workload.dtype
    kv = parse_kv_format(workload.kv_format)
    assert kv is not None
    scales = sum(
        2 * width // form.group_size if form.has_biases else 0
        for form, width in ((kv.key, workload.head_dim), (kv.value, workload.value_dim))
    )
    converted = 4 * scales * workload.batch * workload.kv_heads * workload.kv_seq if dtype == "float32" else 0
    own = unfused_bytes(structs.replace(workload, dtype=dtype), needs)
    wide_query = workload.query_bytes * 4 // ITEM_BYTES[workload.dtype] if widened else 0
    return own + converted + wide_query + (workload.output_bytes if widened else 0)
