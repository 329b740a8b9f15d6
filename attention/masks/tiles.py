"""Tiles of the score matrix: their grid, sets of candidates, and packed bits.

A tile is `block_q` query rows by `block_k` keys of one plane (a batch and a head). What all batches or all heads share
is one plane.
"""

import functools
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

Array = NDArray[Any]
Span = tuple[Array, Array]
"""Ranges of key tiles [low, high) of each row tile, (batches or 1, heads or 1, row_tiles)."""
EMPTY, PARTIAL, FULL = 0, 1, 2
"""State of a tile: no pair is visible, some may be, all are. `and` is the minimum and `or` the maximum."""
WORD: Final = 32


class Grid(Struct, frozen=True):
    """The tiles of a call's scores."""

    batch: int
    heads: int
    seq: int
    kv_seq: int
    block_q: int
    block_k: int

    @property
    def row_tiles(self) -> int:
        """Tiles along the query rows."""
        return -(-self.seq // self.block_q)

    @property
    def key_tiles(self) -> int:
        """Tiles along the keys."""
        return -(-self.kv_seq // self.block_k)

    @property
    def pairs(self) -> int:
        """Pairs of a whole tile."""
        return self.block_q * self.block_k

    @property
    def shift(self) -> int:
        """Position of the first query row: rows and keys are aligned at their ends."""
        return self.kv_seq - self.seq

    @property
    def words(self) -> int:
        """Words of 32 bits in a row of a tile."""
        return self.block_k // WORD

    def edge(self) -> tuple[int, int]:
        """Return the number of rows of the last row tile and of keys of the last key tile."""
        return self.seq - (self.row_tiles - 1) * self.block_q, self.kv_seq - (self.key_tiles - 1) * self.block_k


class Tiles(Struct, frozen=True, eq=False):
    """Some tiles of a grid, ascending by plane, row tile and key tile."""

    grid: Grid
    batches: int
    """Planes along the batch: 1 or all."""
    heads: int
    row: Array
    """plane * row_tiles + row tile."""
    j: Array
    """Key tile."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: Array) -> "Tiles":
        """Return the tiles at an index or under a bool mask."""
        return structs.replace(self, row=self.row[index], j=self.j[index])

    @property
    def plane(self) -> Array:
        """Plane of each tile: batch * heads + head."""
        return self.row // self.grid.row_tiles

    @property
    def b(self) -> "Array | int":
        """Batch of each tile; 0 if all share one plane."""
        return self.plane // self.heads if self.batches > 1 else 0

    @property
    def h(self) -> "Array | int":
        """Head of each tile; 0 if all share one plane."""
        return self.plane % self.heads if self.heads > 1 else 0

    @property
    def i(self) -> Array:
        """Row tile."""
        return self.row if self.batches * self.heads == 1 else self.row % self.grid.row_tiles

    @property
    def first(self) -> Array:
        """Position of each tile's first row."""
        return self.i * self.grid.block_q + self.grid.shift

    @property
    def last(self) -> Array:
        """Position of each tile's last row."""
        last: Array = np.minimum(self.first + self.grid.block_q, self.grid.kv_seq) - 1
        return last

    @property
    def first_key(self) -> Array:
        """First key of each tile."""
        return self.j * self.grid.block_k

    @property
    def last_key(self) -> Array:
        """Last key of each tile."""
        last: Array = np.minimum(self.first_key + self.grid.block_k, self.grid.kv_seq) - 1
        return last

    def positions(self) -> Array:
        """Return the positions of the rows (tiles, block_q); rows beyond the last one repeat it."""
        rows = self.first[:, None] + np.arange(self.grid.block_q)
        return np.minimum(rows, self.grid.kv_seq - 1)

    def keys(self) -> Array:
        """Return the keys (tiles, block_k); keys beyond the last one repeat it."""
        keys = self.first_key[:, None] + np.arange(self.grid.block_k)
        return np.minimum(keys, self.grid.kv_seq - 1)


class Spans(Struct, frozen=True, eq=False):
    """Candidates as ranges of key tiles: [low, high) of shape (batches or 1, heads or 1, row_tiles, ranges)."""

    grid: Grid
    low: Array
    high: Array

    @property
    def total(self) -> int:
        """Upper bound of the number of candidates, all planes of these ranges together."""
        return int(np.maximum(self.high - self.low, 0).sum())

    def tiles(self, batches: int, heads: int) -> Tiles:
        """Return the candidates in order, each once."""
        grid, (low, high) = self.grid, self._disjoint()
        shape = (batches, heads, grid.row_tiles, low.shape[-1])
        low, count = np.broadcast_to(low, shape).ravel(), np.broadcast_to(np.maximum(high - low, 0), shape).ravel()
        ends = np.cumsum(count)
        rows = np.repeat(np.arange(batches * heads * grid.row_tiles), shape[-1])
        offset = np.repeat(low - ends + count, count)
        return Tiles(grid, batches, heads, np.repeat(rows, count), offset + np.arange(len(offset)))

    def _disjoint(self) -> tuple[Array, Array]:
        if self.low.shape[-1] == 1:
            return self.low, self.high
        order = np.argsort(self.low, axis=-1, kind="stable")
        low, high = (np.take_along_axis(x, order, axis=-1) for x in (self.low, self.high))
        before = np.maximum.accumulate(high, axis=-1)[..., :-1]
        return np.concatenate([low[..., :1], np.maximum(low[..., 1:], before)], axis=-1), high


class Listed(Struct, frozen=True, eq=False):
    """Candidates one by one."""

    listed: Tiles

    @property
    def total(self) -> int:
        """Number of candidates."""
        return len(self.listed)

    def tiles(self, batches: int, heads: int) -> Tiles:
        """Return the candidates in order, repeated for planes that share them."""
        own = self.listed
        if (own.batches, own.heads) == (batches, heads):
            return own
        grid = own.grid
        starts = np.searchsorted(own.row, np.arange(own.batches * own.heads * grid.row_tiles + 1))
        b, h = (
            np.arange(n) if kept > 1 else np.zeros(n, np.int64)
            for n, kept in ((batches, own.batches), (heads, own.heads))
        )
        source = ((b[:, None] * own.heads + h)[..., None] * grid.row_tiles + np.arange(grid.row_tiles)).ravel()
        count = (starts[1:] - starts[:-1])[source]
        ends = np.cumsum(count)
        index = np.repeat(starts[source] - ends + count, count) + np.arange(ends[-1] if len(ends) else 0)
        return Tiles(grid, batches, heads, np.repeat(np.arange(len(source)), count), own.j[index])


Candidates = Spans | Listed
MAX_RANGES: Final = 8
"""Ranges of a row tile up to which intersections are computed; beyond it the smaller operand is kept."""


def everywhere(grid: Grid) -> Spans:
    """Return all tiles of a grid as candidates."""
    low = np.zeros((1, 1, grid.row_tiles, 1), np.int64)
    return Spans(grid, low, np.full_like(low, grid.key_tiles))


def intersection(a: Candidates, b: Candidates) -> Candidates:
    """Return candidates that include those in both."""
    if isinstance(a, Spans) and isinstance(b, Spans) and a.low.shape[-1] * b.low.shape[-1] <= MAX_RANGES:
        low = np.maximum(a.low[..., :, None], b.low[..., None, :])
        high = np.minimum(a.high[..., :, None], b.high[..., None, :])
        shape = (*low.shape[:3], -1)
        return Spans(a.grid, low.reshape(shape), np.maximum(low, high).reshape(shape))
    return a if a.total <= b.total else b


def common_span(spans: Iterable[Span | None]) -> Span | None:
    """Return the intersection of ranges [low, high); None without any, or at the first that is None."""
    lows, highs = [], []
    for span in spans:
        if span is None:
            return None
        lows.append(span[0])
        highs.append(span[1])
    return (functools.reduce(np.maximum, lows), functools.reduce(np.minimum, highs)) if lows else None


def union(a: Candidates, b: Candidates, batches: int, heads: int) -> Candidates:
    """Return candidates that include those in either."""
    if isinstance(a, Spans) and isinstance(b, Spans):
        planes = np.broadcast_shapes(a.low.shape[:3], b.low.shape[:3])
        ends = (
            [np.broadcast_to(x, (*planes, x.shape[-1])) for x in pair] for pair in ((a.low, b.low), (a.high, b.high))
        )
        return Spans(a.grid, *(np.concatenate(pair, axis=-1) for pair in ends))
    left, right = a.tiles(batches, heads), b.tiles(batches, heads)
    width = left.grid.key_tiles
    row, j = np.divmod(np.union1d(left.row * width + left.j, right.row * width + right.j), width)
    return Listed(structs.replace(left, row=row, j=j))


def inside(grid: Grid, low: Array, high: Array) -> Span:
    """Return the tiles all of whose keys are in [low, high), given for each row tile."""
    last = np.where(high >= grid.kv_seq, grid.key_tiles, high // grid.block_k)
    return -(-low // grid.block_k), last


def states(empty: Array, full: Array) -> Array:
    """Return the state of tiles of which some are surely empty and others surely full."""
    return np.where(empty, np.uint8(EMPTY), np.where(full, np.uint8(FULL), np.uint8(PARTIAL)))


def interval_bits(grid: Grid, low: Array, high: Array) -> Array:
    """Return packed tiles whose rows see the keys [low, high), counted from the tile's first key.

    Args:
        grid: the grid.
        low: integers (tiles, block_q or 1).
        high: the same.
    """
    block_k = grid.block_k
    if block_k <= MAX_TABLE_KEYS:
        bits = np.take(_words_between(block_k), _within(low, block_k) * (block_k + 1) + _within(high, block_k), axis=0)
    else:
        below = _words_below(block_k)
        bits = np.take(below, high, axis=0, mode="clip") & ~np.take(below, low, axis=0, mode="clip")
    return np.broadcast_to(bits, (max(len(low), len(high)), grid.block_q, grid.words))


def _within(end: Array, block_k: int) -> Array:
    """Return ends within a tile, small enough for a product of two."""
    return np.minimum(np.maximum(end, 0), block_k).astype(np.int32, copy=False)


MAX_TABLE_KEYS: Final = 128
"""Keys of a tile up to which all rows that see an interval are kept: 260 KB at 128."""


@functools.lru_cache(maxsize=4)
def _words_between(block_k: int) -> Array:
    """Return the words of a row that sees the keys [low, high), at low * (block_k + 1) + high."""
    below = _words_below(block_k)
    return np.ascontiguousarray((below & ~below[:, None]).reshape(-1, block_k // WORD))


@functools.lru_cache(maxsize=16)
def _words_below(block_k: int) -> Array:
    """Return the words of a row whose keys before 0, 1, ... `block_k` are visible: (block_k + 1, words)."""
    keys = np.arange(block_k)
    return packed(keys < np.arange(block_k + 1)[:, None])


def packed(visible: Array) -> Array:
    """Return bool tiles (tiles, block_q, block_k) as words: bit j of word w is key 32 w + j."""
    packed_bytes = np.packbits(visible, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed_bytes).view("<u4").astype(np.uint32, copy=False)


def unpacked(bits: Array) -> Array:
    """Return words (..., words) as bool (..., 32 * words)."""
    return np.unpackbits(
        np.ascontiguousarray(bits.astype("<u4", copy=False)).view(np.uint8), axis=-1, bitorder="little"
    ).astype(bool)
