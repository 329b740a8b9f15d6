"""Keys or values of slots, dense or quantized: written in place, read as slices, copied before a fork writes."""

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from attention.core.errors import UsageError
from attention.core.kv_format import Format
from attention.quantized_kv import KeyOrValue, QuantizedArray, quantized


def cut(x: mx.array, batch: slice, begin: int, end: int) -> mx.array:
    """Return rows [begin, end) of some rows of the batch of (B, heads, rows, ·): the array itself if these are all."""
    if begin == 0 and end == x.shape[2] and batch.start == 0 and batch.stop == x.shape[0]:
        return x
    return x[batch, :, begin:end]


class Slots:
    """An array (B, Hkv, slots, width) of keys or values, in the parts of `mx.quantize` if it has a format."""

    def __init__(self, arrays: Sequence[mx.array], form: Format | None, dtype: mx.Dtype) -> None:
        self.arrays, self.form, self.dtype = [*arrays], form, dtype

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], form: Format | None, dtype: mx.Dtype, name: str) -> Self:
        """Return slots of zeros, for arrays like one of a shape (B, Hkv, slots, width).

        Raises:
            UsageError: the group size of the format does not divide the width; `name` is that of the array.
        """
        if form is None:
            return cls([mx.zeros(shape, dtype)], None, dtype)
        width = shape[3]
        if problem := form.width_problem(width):
            raise UsageError(f"{name}: got heads of width {width}; {problem}")
        groups = (*shape[:3], width // form.group_size)
        numbers = mx.zeros((*shape[:3], width * form.bits // 32), mx.uint32)
        scales = [mx.zeros(groups, dtype)] * 2 if form.has_biases else [mx.zeros(groups, mx.uint8)]
        return cls([numbers, *(mx.zeros(one.shape, one.dtype) for one in scales)], form, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, Hkv, slots, width) of the values."""
        return self._view(self.arrays).shape

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.arrays)

    def _view(self, arrays: Sequence[mx.array]) -> KeyOrValue:
        if self.form is None:
            return arrays[0]
        numbers, scales, *biases = arrays
        return QuantizedArray(numbers, scales, biases[0] if biases else None, self.form, self.dtype)

    def at(self, batch: slice, begin: int, end: int) -> KeyOrValue:
        """Return slots [begin, end) of some rows of the batch, without copying them."""
        return self._view([cut(part, batch, begin, end) for part in self.arrays])

    def packed(self, x: mx.array) -> list[mx.array]:
        """Return keys or values (B, Hkv, L, width) in the parts in which they are stored."""
        return [x.astype(self.dtype)] if self.form is None else [*quantized(x, self.form).arrays]

    def write(self, batch: slice, begin: int, parts: Sequence[mx.array]) -> None:
        """Store parts of `packed` from slot `begin` on."""
        for held, part in zip(self.arrays, parts, strict=True):
            held[batch, :, begin : begin + part.shape[2]] = part

    def extended(self, slots: int) -> None:
        """Append slots of zeros."""
        self.arrays = [
            mx.concatenate([part, mx.zeros((*part.shape[:2], slots, part.shape[3]), part.dtype)], axis=2)
            for part in self.arrays
        ]

    def twin(self) -> "Slots":
        """Return slots with the same contents, which are copied when one of the two is written to."""
        return Slots([mx.array(part) for part in self.arrays], self.form, self.dtype)
