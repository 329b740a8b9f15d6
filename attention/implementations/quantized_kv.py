"""Quantized keys or values, as in a quantized KV cache."""

from typing import Final

import mlx.core as mx
from msgspec import Struct

from attention import masks
from attention.implementations.baseline import computes_in_float32
from attention.implementations.calls import current_backend
from attention.masks import Mask

MAX_QUANTIZED_ROWS: Final = 32
"""Number of query rows from which a tile is dequantized once instead of being read quantized by every row."""


class QuantizedArray(Struct, frozen=True, eq=False):
    """An array (B, Hkv, Lk, D) quantized by `mx.quantize`: each group of values has a scale and a bias."""

    numbers: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the array."""
        return self.scales.dtype

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """The quantized values, scales and biases."""
        return self.numbers, self.scales, self.biases

    def with_parts(self, numbers: mx.array, scales: mx.array, biases: mx.array) -> "QuantizedArray":
        """Return a part of the array with these values, scales and biases."""
        return QuantizedArray(numbers, scales, biases, self.group_size, self.bits)

    def with_query_axis(self) -> "QuantizedArray":
        """Return it with an axis for the query heads that share a key head: (B, Hkv, 1, Lk, D)."""
        return self.with_parts(*(array[:, :, None] for array in self.arrays))

    def dequantized(self) -> mx.array:
        """Return the dequantized array."""
        return mx.dequantize(self.numbers, self.scales, self.biases, self.group_size, self.bits)

    def matmul(self, x: mx.array, transpose: bool) -> mx.array:
        """Return the product of x and the quantized array, or its transpose, in x's dtype."""
        scales, biases = self.scales.astype(x.dtype), self.biases.astype(x.dtype)
        return mx.quantized_matmul(x, self.numbers, scales, biases, transpose, self.group_size, self.bits)


KeyOrValue = mx.array | QuantizedArray


def attend_quantized(q: mx.array, k: QuantizedArray, v: QuantizedArray, *, scale: float, mask: Mask) -> mx.array:
    """Compute attention like mlx-lm with a quantized cache: materialise the scores, read keys and values quantized.

    Scores are float32 in the cases in which an unfused path uses float32.
    """
    if computes_in_float32(masks.dtype_name(q.dtype), current_backend()):
        return attend_quantized(q.astype(mx.float32), k, v, scale=scale, mask=mask).astype(q.dtype)
    batch, heads, seq, _ = q.shape
    kv_heads, kv_seq = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads, seq, -1)
    scores = k.with_query_axis().matmul(grouped, True).reshape(batch, heads, seq, kv_seq)
    whole = mask.dense((batch, heads, seq, kv_seq))
    opened, seeing = whole, None
    if whole is not None and not (seq == 1 and mask.array is None):
        opened, seeing = masks.opened(whole)
    weights = mx.softmax(masks.apply(scores, opened), axis=-1, precise=True)
    out = v.with_query_axis().matmul(weights.reshape(*grouped.shape[:-1], kv_seq), False).reshape(batch, heads, seq, -1)
    return out if seeing is None else mx.where(seeing, out, mx.zeros((), out.dtype))
