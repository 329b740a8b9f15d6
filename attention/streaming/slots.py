"""Where the tokens of an endless sequence are kept: the first ones, and a ring of the latest.

    slots     0 .. first-1 | first                                    first + ring - 1
              first tokens | tokens of this lap -> | <- tokens of the lap before
                                        newest ----^^---- oldest

A token's slot is its position in the rotary sense too, so positions stay bounded, and a lap later the distance
of a query to the keys of the lap before is that of slots, plus the ring.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import mlx.core as mx
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from attention.core.errors import UsageError
from attention.core.kv_format import Format
from attention.quantized_kv import KeyOrValue, QuantizedArray, quantized

HeadKind = Literal["streaming", "full"]
MAX_TOKENS = 2**31 - 1
"""Slots are 32-bit numbers in kernels."""


class Layout(Struct, frozen=True):
    """Numbers of tokens: kept from the start, attended to among the latest, and kept beyond those for rewinds."""

    first: int
    window: int
    spare: int = 0

    def __post_init__(self) -> None:
        """Raise UsageError for numbers out of range."""
        problems = [
            f"{name}: got {value!r}; it takes a whole number from {least} to {MAX_TOKENS}"
            for name, value, least in (("first", self.first, 0), ("window", self.window, 1), ("spare", self.spare, 0))
            if type(value) is not int or not least <= value <= MAX_TOKENS
        ]
        if problems:
            raise UsageError(*problems)

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.window + self.spare

    @property
    def slots(self) -> int:
        """All slots."""
        return self.first + self.ring

    def slot(self, position: int) -> int:
        """Return the slot of a token."""
        return position if position < self.first else self.first + (position - self.first) % self.ring

    def lap(self, position: int) -> int:
        """Return how often the ring was filled before a token."""
        return max(0, position - self.first) // self.ring

    def slots_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of tokens."""
        ring = self.first + (positions - self.first) % self.ring
        return np.where(positions < self.first, positions, ring)

    def by_slot(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Split the tokens [begin, end) where their slots are not consecutive."""
        while begin < end:
            stop = self.first + (self.lap(begin) + 1) * self.ring
            yield begin, min(end, stop)
            begin = stop


class Row(Struct):
    """The tokens of one sequence of a batch."""

    seen: int = 0
    """Number of tokens, and the position of the next one."""
    oldest: int = 0
    """Position of the oldest token that is still in the ring; those between the first tokens and it are gone."""

    def advance(self, layout: Layout, tokens: int) -> None:
        """Count tokens that were written."""
        self.seen += tokens
        self.overwrite(layout, self.seen)

    def overwrite(self, layout: Layout, end: int) -> None:
        """Count as gone what the tokens before position `end` replaced in the ring."""
        self.oldest = max(self.oldest, layout.first, end - layout.ring)

    def begins(self, layout: Layout, position: int) -> int:
        """Return the position of the oldest token of the ring that a query at a position attends to."""
        return max(layout.first, self.oldest, position - layout.window + 1)

    def kept(self, layout: Layout) -> NDArray[np.int64]:
        """Return the positions that the latest query attends to, in order."""
        if self.seen <= layout.first:
            return np.arange(self.seen)
        latest = np.arange(self.begins(layout, self.seen - 1), self.seen)
        return np.concatenate([np.arange(layout.first), latest])

    def removable(self, layout: Layout) -> int:
        """Return how many tokens a rewind can take back."""
        return self.seen if self.oldest <= layout.first else self.seen - self.oldest

    def removable_exactly(self, layout: Layout) -> int:
        """Return how many tokens a rewind can take back with none missing from the window then."""
        return self.seen if self.oldest <= layout.first else max(0, self.seen - layout.window - self.oldest)


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
