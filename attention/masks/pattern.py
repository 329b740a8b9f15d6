"""A mask as a value: what all masks have in common, and their composition with `&` and `|`."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from msgspec import Struct

from attention.core.errors import UsageError
from attention.core.forking import check_not_forked
from attention.core.numbers import shown_value
from attention.masks import block_list as lists
from attention.masks.block_list import BlockFlags, BlockList
from attention.masks.tiles import (
    PARTIAL,
    Array,
    Candidates,
    Grid,
    Span,
    Tiles,
    common_span,
    everywhere,
    intersection,
    interval_bits,
    union,
)

if TYPE_CHECKING:
    import mlx.core as mx

Shape = tuple[int, int, int, int]
"""(B, H, Lq, Lk)."""
Lengths = tuple[int, int]
"""(Lq, Lk)."""
MAX_PARTS: Final = 62
"""Parts of a composed mask: each has a bit in an int64."""
DEFAULT_BLOCK: Final = 128
LONGEST: Final = 2**31 - 1
"""The longest axis of an MLX array: larger numbers show the same pairs, and int32 positions cannot hold them."""
MAX_TILE: Final = 1 << 20
"""Rows or keys of a tile."""


MAX_HASHED_WORDS: Final = 1 << 13
"""Words of a table that its hash is made of, evenly spaced; tables of an equal hash are compared."""


def _words(array: Array) -> Array:
    """Return the memory of a contiguous array as words of 8 bytes, or of one byte if these are not whole."""
    data = array.reshape(-1).view(np.uint8)
    return data.view(np.uint64) if data.size % 8 == 0 else data


def checked_shape(shape: object) -> Shape:
    """Return the shape of scores.

    Raises:
        UsageError: it is not four whole numbers from 0.
    """
    numbers = tuple(shape) if isinstance(shape, tuple | list) else ()
    if len(numbers) != 4 or not all(type(n) is int and 0 <= n <= LONGEST for n in numbers):
        raise UsageError(f"shape: got {shown_value(shape)}; it takes (B, H, Lq, Lk), whole numbers")
    return cast("Shape", numbers)


class Table:
    """A read-only array, hashable and equal by value."""

    __slots__ = ("_hash", "_made", "array")

    def __init__(self, array: Array) -> None:
        self.array = np.array(array, order="C")  # a copy that nothing else writes to
        self.array.setflags(write=False)
        self._hash: int | None = None
        self._made: mx.array | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        if self is other:
            return True
        same = self.array.shape == other.array.shape and self.array.dtype == other.array.dtype
        return same and np.array_equal(_words(self.array), _words(other.array))

    def __hash__(self) -> int:
        if self._hash is None:
            words = _words(self.array)
            every = words[:: max(1, words.size // MAX_HASHED_WORDS)]
            self._hash = hash((self.array.shape, every.tobytes()))
        return self._hash

    def __repr__(self) -> str:
        return f"array of shape {self.array.shape}"

    def mlx(self) -> "mx.array":
        """Return the array as an MLX array, made once."""
        if self._made is None:
            import mlx.core as mx

            self._made = mx.array(self.array)
        return self._made


class Pattern(Struct, frozen=True, dict=True):
    """A mask as a value: frozen, hashable, equal by value.

    `a & b` shows what both show, `a | b` what either shows.
    """

    def __and__(self, other: "Pattern") -> "Pattern":
        return _composed(Both, self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return _composed(Either, self, other)

    def __bool__(self) -> bool:
        """Refuse `and`, `or` and `not`, which would drop one of two masks without a word.

        Raises:
            UsageError: always.
        """
        raise UsageError("mask: got a pattern as a truth value; patterns are combined by & and |")

    def pairs(self, shape: Shape) -> int:
        """Return the exact number of visible pairs of a call (B, H, Lq, Lk), over all batches and heads.

        Raises:
            UsageError: the shape is invalid, or the mask does not fit it.
        """
        return self.block_list(shape).pairs

    def block_list(self, shape: Shape, block_q: int = DEFAULT_BLOCK, block_k: int = DEFAULT_BLOCK) -> BlockList:
        """Return the tiles that have a visible pair, cached by value.

        Args:
            shape: (B, H, Lq, Lk).
            block_q: rows of a tile.
            block_k: keys of a tile, a multiple of 32.

        Raises:
            UsageError: the mask does not fit the shape; a number is out of range; the function of `where` fails.
        """
        if type(block_q) is not int or not 1 <= block_q <= MAX_TILE:
            raise UsageError(f"block_q: got {block_q!r}; it takes a whole number from 1 to {MAX_TILE}")
        if type(block_k) is not int or not 32 <= block_k <= MAX_TILE or block_k % 32:
            raise UsageError(f"block_k: got {block_k!r}; it takes a multiple of 32 to {MAX_TILE}")
        shape = checked_shape(shape)
        return lists.cache.get((self, shape, block_q, block_k), lambda: self._build(shape, block_q, block_k))

    def _build(self, shape: Shape, block_q: int, block_k: int) -> BlockList:
        self.check(shape)
        return lists.build(self, Grid(*shape, block_q, block_k), lists.current_builder())

    def check(self, shape: Shape) -> None:
        """Raise UsageError unless the mask fits a call of (B, H, Lq, Lk)."""

    def dense(self, shape: Shape) -> "mx.array":
        """Return the mask as a bool array that broadcasts to (B, H, Lq, Lk), which it may be as large as."""
        check_not_forked()
        batch, heads, *lengths = shape
        return self.part((lengths[0], lengths[1]), range(batch), range(heads), range(lengths[0]), range(lengths[1]))

    def part(
        self, lengths: Lengths, batches: Sequence[int], heads: Sequence[int], rows: range, keys: range
    ) -> "mx.array":
        """Return a part of the dense mask; axes that the mask does not depend on may have length 1."""
        import mlx.core as mx

        shift = lengths[1] - lengths[0]
        places = (batches, heads, range(rows.start + shift, rows.stop + shift), keys)
        indices = [
            (
                mx.arange(at.start, at.stop, dtype=mx.int32) if isinstance(at, range) else mx.array(list(at), mx.int32)
            ).reshape([-1 if axis == n else 1 for n in range(4)])
            for axis, at in enumerate(places)
        ]
        return self.visible(lengths, *indices)

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        """Return whether queries at positions q attend to keys k: bool, of a shape to which the indices broadcast."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of parts."""
        return 1

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        """Return the number of different planes along batch and heads: 1 where the mask is the same for all."""
        return 1, 1

    def candidates(self, grid: Grid) -> Candidates:
        """Return tiles that include all with a visible pair."""
        return everywhere(grid)

    def whole_tiles(self, grid: Grid) -> tuple[Array, Array] | None:
        """Return how many key tiles each row tile has, and these in order, if all are full; None if unknown."""
        return None

    def full_span(self, grid: Grid) -> Span | None:
        """Return a range of key tiles of each row tile that are surely full; None if unknown."""
        return None

    def row_intervals(self, grid: Grid) -> Span | None:
        """Return the keys [low, high) that each row sees, (batches or 1, Lq or 1); None if not adjacent."""
        return None

    def block_flags(self, grid: Grid) -> BlockFlags | None:
        """Return the blocks that the mask consists of, if tiles divide them; otherwise None."""
        return None

    def state(self, tiles: Tiles) -> Array:
        """Return the state of each tile; partial where it is not known without its pairs."""
        return np.full(len(tiles), PARTIAL, np.uint8)

    def key(self, tiles: Tiles) -> Array:
        """Return integers that are equal only for tiles of equal bits."""
        return tiles.row * tiles.grid.key_tiles + tiles.j

    def tile_bits(self, tiles: Tiles) -> Array:
        """Return packed bits (tiles, block_q, words); a part without `intervals` has it."""
        raise NotImplementedError

    def intervals(self, tiles: Tiles) -> Span | None:
        """Return the keys [low, high) that each row of the tiles sees, counted from a tile's first key.

        Integers (tiles or 1, block_q or 1); None if the keys of a row need not be adjacent.
        """
        return None

    def classify(self, tiles: Tiles) -> tuple[Array, Array]:
        """Return the state of each tile, and for partial ones the bits of the parts that decide them."""
        state = self.state(tiles)
        return state, (state == PARTIAL).astype(np.int64)

    def signature(self, tiles: Tiles, needed: int) -> list[Array]:
        """Return columns of integers; the needed parts have the same bits in tiles where all columns are equal."""
        return [self.key(tiles)] if needed else []

    def bits(self, tiles: Tiles, needed: int) -> Array:
        """Return the packed bits (tiles, block_q, words) of the needed parts combined."""
        seen = self.intervals(tiles)
        return self.tile_bits(tiles) if seen is None else interval_bits(tiles.grid, *seen)


class _Composed(Pattern, frozen=True):
    """Several masks combined; those of the same kind are flattened into one."""

    parts: tuple[Pattern, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def check(self, shape: Shape) -> None:
        problems: dict[str, None] = {}
        for part in self.parts:
            try:
                part.check(shape)
            except UsageError as error:
                problems.update(dict.fromkeys(error.problems))
        if problems:
            raise UsageError(*problems)

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        each = [part.planes(batch, heads) for part in self.parts]
        return max(one[0] for one in each), max(one[1] for one in each)

    def classify(self, tiles: Tiles) -> tuple[Array, Array]:
        state, needed = self.parts[0].classify(tiles)
        place = self.parts[0].size
        for part in self.parts[1:]:
            own, own_needed = part.classify(tiles)
            state = self._combined_state(state, own)
            needed = np.where(state == PARTIAL, needed | own_needed << place, 0)
            place += part.size
        return state, needed

    def _combined_state(self, a: Array, b: Array) -> Array:
        raise NotImplementedError

    def _needed(self, needed: int) -> list[tuple[Pattern, int]]:
        """Return the parts that are needed, each with its own bits."""
        found = []
        for part in self.parts:
            if own := needed & ((1 << part.size) - 1):
                found.append((part, own))
            needed >>= part.size
        return found

    def signature(self, tiles: Tiles, needed: int) -> list[Array]:
        return [column for part, own in self._needed(needed) for column in part.signature(tiles, own)]

    def _shown(self, sign: str) -> str:
        return sign.join(f"({part!r})" if isinstance(part, _Composed) else repr(part) for part in self.parts)


class Both(_Composed, frozen=True):
    """Pairs that all parts show."""

    def candidates(self, grid: Grid) -> Candidates:
        found = self.parts[0].candidates(grid)
        for part in self.parts[1:]:
            found = intersection(found, part.candidates(grid))
        return found

    def full_span(self, grid: Grid) -> Span | None:
        return common_span(part.full_span(grid) for part in self.parts)

    def row_intervals(self, grid: Grid) -> Span | None:
        return common_span(part.row_intervals(grid) for part in self.parts)

    def _combined_state(self, a: Array, b: Array) -> Array:
        return np.minimum(a, b)

    def bits(self, tiles: Tiles, needed: int) -> Array:
        parts = self._needed(needed)
        spans = [part.intervals(tiles) for part, _ in parts]
        found = [part.bits(tiles, own) for (part, own), span in zip(parts, spans, strict=True) if span is None]
        seen = common_span(span for span in spans if span is not None)
        if seen is not None:  # intersected before they become bits
            found.append(interval_bits(tiles.grid, *seen))
        return functools.reduce(np.bitwise_and, found)

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        first, *others = (part.visible(lengths, b, h, q, k) for part in self.parts)
        for other in others:
            first = first & other
        return first

    def __repr__(self) -> str:
        return self._shown(" & ")


class Either(_Composed, frozen=True):
    """Pairs that any part shows."""

    def candidates(self, grid: Grid) -> Candidates:
        batches, heads = self.planes(grid.batch, grid.heads)
        found = self.parts[0].candidates(grid)
        for part in self.parts[1:]:
            found = union(found, part.candidates(grid), batches, heads)
        return found

    def full_span(self, grid: Grid) -> Span | None:
        spans = [span for span in (part.full_span(grid) for part in self.parts) if span is not None]
        if not spans:
            return None
        low, high = spans[0]
        for other_low, other_high in spans[1:]:  # the longer one of each row tile
            longer = other_high - other_low > high - low
            low, high = np.where(longer, other_low, low), np.where(longer, other_high, high)
        return low, high

    def _combined_state(self, a: Array, b: Array) -> Array:
        return np.maximum(a, b)

    def bits(self, tiles: Tiles, needed: int) -> Array:
        first, *others = (part.bits(tiles, own) for part, own in self._needed(needed))
        for other in others:
            first = first | other
        return first

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        first, *others = (part.visible(lengths, b, h, q, k) for part in self.parts)
        for other in others:
            first = first | other
        return first

    def __repr__(self) -> str:
        return self._shown(" | ")


def _composed(kind: type[_Composed], a: Pattern, b: Pattern) -> Pattern:
    if not isinstance(b, Pattern):
        raise UsageError(f"mask: got a mask combined with {type(b).__name__}; it takes masks of attention.masks")
    parts = [part for one in (a, b) for part in (one.parts if isinstance(one, kind) else (one,))]
    parts = list(dict.fromkeys(parts))
    if len(parts) == 1:
        return parts[0]
    made = kind(tuple(parts))
    if made.size > MAX_PARTS:
        raise UsageError(f"mask: got {made.size} parts combined; it takes up to {MAX_PARTS}")
    return made
