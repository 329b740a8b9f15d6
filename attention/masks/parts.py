"""The single masks: which pairs each shows, in which tiles, and the packed bits of a tile.

Query row i of Lq has position i + Lk - Lq among the Lk keys (rows and keys are aligned at their ends).
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from attention.core.errors import UsageError, error_line
from attention.masks import block_list as lists
from attention.masks.block_list import BlockFlags, BlockList
from attention.masks.pattern import DEFAULT_BLOCK, Both, Either, Lengths, Pattern, Shape, Table, checked_shape
from attention.masks.tiles import (
    EMPTY,
    FULL,
    Array,
    Candidates,
    Grid,
    Listed,
    Span,
    Spans,
    Tiles,
    everywhere,
    inside,
    packed,
    states,
)

if TYPE_CHECKING:
    import mlx.core as mx

MAX_SHOWN_NUMBERS: Final = 6


class Visible(Protocol):
    """A function of index arrays of batch, head, query position and key, which broadcast against each other."""

    def __call__(self, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array", /) -> "mx.array":
        """Return bool, True where a query attends to a key."""
        ...


class _Band(Pattern, frozen=True):
    """A mask of the difference d of a query's position and a key: 0 <= d < `reach`."""

    @property
    def reach(self) -> "int | None":
        """Number of keys up to a query's own; None is all."""
        return None

    def pairs(self, shape: Shape) -> int:
        shape = checked_shape(shape)
        last = np.arange(shape[2], dtype=np.int64) + 1 + shape[3] - shape[2]
        first = 0 if self.reach is None else np.maximum(0, last - self.reach)
        return shape[0] * shape[1] * int(np.maximum(0, last - first).sum())

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        return (k <= q) if self.reach is None else (k <= q) & (k > q - self.reach)

    def candidates(self, grid: Grid) -> Candidates:
        first = np.arange(grid.row_tiles)[None, None, :, None] * grid.block_q + grid.shift
        last = np.minimum(first + grid.block_q, grid.kv_seq) - 1
        high = np.clip(last // grid.block_k + 1, 0, grid.key_tiles)
        low = np.zeros_like(high) if self.reach is None else np.clip((first - self.reach + 1) // grid.block_k, 0, high)
        return Spans(grid, low, high)

    def full_span(self, grid: Grid) -> Span:
        first = np.arange(grid.row_tiles)[None, None] * grid.block_q + grid.shift
        last = np.minimum(first + grid.block_q, grid.kv_seq) - 1
        low = np.zeros_like(first) if self.reach is None else np.maximum(last - self.reach + 1, 0)
        return inside(grid, low, np.maximum(first + 1, 0))

    def row_intervals(self, grid: Grid) -> Span:
        end = np.arange(grid.shift + 1, grid.kv_seq + 1, dtype=np.int32)[None]
        reach = None if self.reach is None else min(self.reach, grid.seq + grid.kv_seq)  # int32
        return np.zeros((1, 1), np.int32) if reach is None else end - reach, end

    def state(self, tiles: Tiles) -> Array:
        least, most = tiles.first - tiles.last_key, tiles.last - tiles.first_key
        if self.reach is None:
            return states(most < 0, least >= 0)
        return states((most < 0) | (least >= self.reach), (least >= 0) & (most < self.reach))

    def key(self, tiles: Tiles) -> Array:
        return tiles.first - tiles.first_key

    def intervals(self, tiles: Tiles) -> Span:
        end = (tiles.first - tiles.first_key)[:, None] + np.arange(1, tiles.grid.block_q + 1)
        return np.zeros((1, 1), np.int64) if self.reach is None else end - self.reach, end


class Causal(_Band, frozen=True):
    """The value of `causal()`."""

    def __repr__(self) -> str:
        return "causal()"


class Window(_Band, frozen=True):
    """The value of `window(n)`."""

    n: int

    @property
    def reach(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"window({self.n})"


def band(pattern: Pattern) -> int | None:
    """Return the window of a pattern that is only causal or a window: keys up to a query's own, 0 for all; or None."""
    if isinstance(pattern, _Band):
        return pattern.reach or 0
    if not isinstance(pattern, Both | Either):
        return None
    each = [band(part) for part in pattern.parts]
    reaches = [reach for reach in each if reach is not None]
    if len(reaches) < len(each):
        return None
    bounded = [reach for reach in reaches if reach]
    if isinstance(pattern, Both):
        return min(bounded, default=0)
    return 0 if len(bounded) < len(reaches) else max(bounded)


class Prefix(Pattern, frozen=True):
    """The value of `prefix(n)`."""

    n: int

    def __repr__(self) -> str:
        return f"prefix({self.n})"

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        return k < self.n

    def candidates(self, grid: Grid) -> Candidates:
        whole = everywhere(grid)
        return Spans(grid, whole.low, np.full_like(whole.high, min(-(-self.n // grid.block_k), grid.key_tiles)))

    def full_span(self, grid: Grid) -> Span:
        low = np.zeros((1, 1, grid.row_tiles), np.int64)
        return inside(grid, low, low + self.n)

    def row_intervals(self, grid: Grid) -> Span:
        return np.zeros((1, 1), np.int32), np.full((1, 1), min(self.n, grid.kv_seq), np.int32)

    def state(self, tiles: Tiles) -> Array:
        return states(tiles.first_key >= self.n, tiles.last_key < self.n)

    def key(self, tiles: Tiles) -> Array:
        return tiles.j

    def intervals(self, tiles: Tiles) -> Span:
        high = (self.n - tiles.first_key)[:, None]
        return np.zeros((1, 1), np.int64), high


class Padding(Pattern, frozen=True):
    """The value of `padding(lengths, side)`."""

    lengths: tuple[int, ...]
    side: Literal["left", "right"] = "right"

    def __repr__(self) -> str:
        return f"padding({shown_numbers(self.lengths)}, side={self.side!r})"

    def check(self, shape: Shape) -> None:
        if len(self.lengths) not in (1, shape[0]):
            raise UsageError(
                f"mask: padding got {len(self.lengths)} lengths; it takes one for each of {shape[0]} sequences"
            )
        if max(self.lengths) > shape[3]:
            raise UsageError(f"mask: padding got the length {max(self.lengths)}; there are {shape[3]} keys")

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        return len(self.lengths), 1

    def _bounds(self, kv_seq: int) -> tuple[Array, Array]:
        lengths = np.array(self.lengths)
        return (
            (np.zeros_like(lengths), lengths)
            if self.side == "right"
            else (kv_seq - lengths, np.full_like(lengths, kv_seq))
        )

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        import mlx.core as mx

        tokens = mx.array(self.lengths)[b if len(self.lengths) > 1 else mx.zeros_like(b[:1])]
        return k < tokens if self.side == "right" else k >= lengths[1] - tokens

    def candidates(self, grid: Grid) -> Candidates:
        low, high = (x[:, None, None, None] for x in self._bounds(grid.kv_seq))
        shape = (len(self.lengths), 1, grid.row_tiles, 1)
        low, high = low // grid.block_k, np.where(high > low, -(-high // grid.block_k), low // grid.block_k)
        return Spans(grid, np.broadcast_to(low, shape), np.broadcast_to(high, shape))

    def full_span(self, grid: Grid) -> Span:
        shape = (len(self.lengths), 1, grid.row_tiles)
        low, high = (np.broadcast_to(x[:, None, None], shape) for x in self._bounds(grid.kv_seq))
        return inside(grid, low, high)

    def row_intervals(self, grid: Grid) -> Span:
        low, high = self._bounds(grid.kv_seq)
        return low[:, None], high[:, None]

    def _of_tiles(self, tiles: Tiles) -> tuple[Array, Array]:
        plane = tiles.b if len(self.lengths) > 1 else np.zeros(len(tiles), np.int64)
        low, high = self._bounds(tiles.grid.kv_seq)
        return low[plane], high[plane]

    def state(self, tiles: Tiles) -> Array:
        low, high = self._of_tiles(tiles)
        return states(
            (tiles.first_key >= high) | (tiles.last_key < low), (tiles.first_key >= low) & (tiles.last_key < high)
        )

    def key(self, tiles: Tiles) -> Array:
        return (tiles.b if len(self.lengths) > 1 else 0) * tiles.grid.key_tiles + tiles.j

    def intervals(self, tiles: Tiles) -> Span:
        low, high = self._of_tiles(tiles)
        return (low - tiles.first_key)[:, None], (high - tiles.first_key)[:, None]


class Documents(Pattern, frozen=True):
    """The value of `documents(...)`: runs of positions; those of all batches one after another."""

    starts: Table
    """First position of each run, batch * Lk + position, ascending; and the end of the last one."""
    hidden: Table
    """bool: whether a run is no document."""
    batches: int
    """Batches with runs of their own; 1 if all have the same."""

    def __repr__(self) -> str:
        lengths = np.diff(self.starts.array)
        shown = np.where(self.hidden.array, -lengths, lengths) if self.hidden.array.any() else lengths
        per_batch = "" if self.batches == 1 else f", {self.batches} sequences"
        return f"documents({shown_numbers(shown.tolist())}{per_batch})"

    @property
    def positions(self) -> int:
        """Positions of a sequence."""
        return int(self.starts.array[-1]) // self.batches

    def check(self, shape: Shape) -> None:
        _check_documents(self.batches, self.positions, shape)

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        return self.batches, 1

    @cached_property
    def _ids(self) -> Table:
        """The run of each position, -1 if hidden: (batches, Lk)."""
        runs = np.where(self.hidden.array, -1, np.arange(len(self.hidden.array), dtype=np.int32))
        return Table(np.repeat(runs.astype(np.int32), np.diff(self.starts.array)).reshape(self.batches, -1))

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        return _same_id(self._ids, b, q, k)

    def _runs(self, position: Array) -> Array:
        return np.searchsorted(self.starts.array, position, side="right") - 1

    def _sides(self, grid: Grid) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return `_side` of rows and keys, kept for the last grid."""
        known = self.__dict__.get("_latest")
        if known is None or known[0] != grid:
            rows = self._side(grid, grid.block_q, grid.shift, grid.row_tiles)
            known = grid, rows, self._side(grid, grid.block_k, 0, grid.key_tiles)
            self.__dict__["_latest"] = known
        return known[1], known[2]

    def _side(self, grid: Grid, size: int, shift: int, count: int) -> tuple[Array, Array]:
        """Return the first and the last run in each tile of a side, (batches, count)."""
        first = np.arange(count) * size + shift
        last = np.clip(np.minimum(first + size, grid.kv_seq) - 1, 0, None)
        base = np.arange(self.batches)[:, None] * grid.kv_seq
        return self._runs(base + np.clip(first, 0, None)), self._runs(base + last)

    def candidates(self, grid: Grid) -> Candidates:
        first, last = self._sides(grid)[0]
        base = np.arange(self.batches)[:, None] * grid.kv_seq
        low = (self.starts.array[first] - base) // grid.block_k
        high = -(-(self.starts.array[last + 1] - base) // grid.block_k)
        before = np.arange(grid.row_tiles) * grid.block_q + grid.block_q - 1 + grid.shift < 0
        nothing = ((first == last) & self.hidden.array[first]) | before
        high = np.where(nothing, low, high)
        return Spans(grid, low[:, None, :, None], high[:, None, :, None])

    def full_span(self, grid: Grid) -> Span:
        first, last = self._sides(grid)[0]
        base = np.arange(self.batches)[:, None] * grid.kv_seq
        rows = np.arange(grid.row_tiles) * grid.block_q + grid.shift
        whole = (first == last) & ~self.hidden.array[first] & (rows >= 0)
        low, high = inside(grid, self.starts.array[first] - base, self.starts.array[first + 1] - base)
        return low[:, None], np.where(whole, high, low)[:, None]

    def _tile_runs(self, tiles: Tiles) -> tuple[Array, ...]:
        grid, b = tiles.grid, self._batch(tiles)
        rows, keys = self._sides(grid)
        i, j = tiles.i, tiles.j
        return rows[0][b, i], rows[1][b, i], keys[0][b, j], keys[1][b, j]

    def _batch(self, tiles: Tiles) -> "Array | int":
        return tiles.b if self.batches > 1 else 0

    def state(self, tiles: Tiles) -> Array:
        first, last, first_key, last_key = self._tile_runs(tiles)
        hidden = self.hidden.array
        apart = (last < first_key) | (last_key < first) | (tiles.last < 0)
        nothing = ((first == last) & hidden[first]) | ((first_key == last_key) & hidden[first_key])
        same = (first == last) & (first_key == last_key) & (tiles.first >= 0)
        return states(apart | nothing, same)

    def key(self, tiles: Tiles) -> Array:
        grid, runs = tiles.grid, len(self.hidden.array)
        first, last, first_key, last_key = self._tile_runs(tiles)
        b = self._batch(tiles)
        # a tile whose rows are all of one run depends on that run and its keys, and the other way round
        rows = np.where((first == last) & (tiles.first >= 0), first, runs + b * grid.row_tiles + tiles.i)
        keys = np.where(first_key == last_key, first_key, runs + b * grid.key_tiles + tiles.j)
        return rows * (runs + self.batches * grid.key_tiles) + keys

    def intervals(self, tiles: Tiles) -> Span:
        grid = tiles.grid
        row = (self._batch(tiles) * grid.row_tiles if self.batches > 1 else 0) + tiles.i
        first_key = tiles.first_key.astype(np.int32)[:, None]
        low, high = (ends[row] - first_key for ends in self._ends(grid))
        return low, high

    def row_intervals(self, grid: Grid) -> Span:
        starts, lengths = self.starts.array[:-1] % grid.kv_seq, np.diff(self.starts.array)
        ends = np.where(self.hidden.array, starts, starts + lengths)
        return self._of_rows(grid, starts, lengths), self._of_rows(grid, ends, lengths)

    def _of_rows(self, grid: Grid, of_run: Array, lengths: Array) -> Array:
        """Return a number of each row's run, int32 (batches, Lq); 0 for rows of negative positions."""
        found = np.repeat(of_run.astype(np.int32), lengths).reshape(self.batches, -1)
        return found[:, grid.shift :] if grid.shift >= 0 else np.pad(found, ((0, 0), (-grid.shift, 0)))

    def _ends(self, grid: Grid) -> Span:
        """Return the keys [low, high) of each row of the row tiles, (batches * row_tiles, block_q); kept.

        Rows and keys beyond the last one repeat it: a tile within one run is full.
        """
        known = self.__dict__.get("_latest_ends")
        if known is None or known[0] != grid:
            low, high = self.row_intervals(grid)
            high = np.where(high == grid.kv_seq, np.int32(grid.key_tiles * grid.block_k), high)
            beyond = ((0, 0), (0, grid.row_tiles * grid.block_q - grid.seq))
            rows = (np.pad(ends, beyond, mode="edge").reshape(-1, grid.block_q) for ends in (low, high))
            known = (grid, *rows)
            self.__dict__["_latest_ends"] = known
        return known[1], known[2]


class Groups(Pattern, frozen=True):
    """The value of `documents(ids=...)` where the same id returns after others."""

    ids: Table
    """int32 (batches, Lk); negative is no document."""

    def __repr__(self) -> str:
        return f"documents(ids={self.ids!r})"

    def check(self, shape: Shape) -> None:
        _check_documents(len(self.ids.array), self.ids.array.shape[1], shape)

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        return len(self.ids.array), 1

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        return _same_id(self.ids, b, q, k)

    def _batch(self, tiles: Tiles) -> Array:
        return np.broadcast_to(tiles.b if len(self.ids.array) > 1 else 0, len(tiles))

    def _range(self, first: Array, last: Array) -> tuple[Array, Array]:
        """Return the least and the largest id from position `first` to `last` of each tile of a side."""
        starts = np.stack([np.clip(first, 0, None), np.clip(last, 0, None) + 1], axis=1).ravel()
        padded = np.concatenate([self.ids.array, np.zeros((len(self.ids.array), 1), np.int32)], axis=1)
        return np.minimum.reduceat(padded, starts, axis=1)[:, ::2], np.maximum.reduceat(padded, starts, axis=1)[:, ::2]

    def state(self, tiles: Tiles) -> Array:
        grid, b = tiles.grid, self._batch(tiles)
        rows, keys = np.arange(grid.row_tiles) * grid.block_q + grid.shift, np.arange(grid.key_tiles) * grid.block_k
        i, j = tiles.i, tiles.j
        ends = (np.minimum(x + size, grid.kv_seq) - 1 for x, size in ((rows, grid.block_q), (keys, grid.block_k)))
        least, most = (x[b, i] for x in self._range(rows, next(ends)))
        least_key, most_key = (x[b, j] for x in self._range(keys, next(ends)))
        empty = (np.minimum(most, most_key) < np.maximum(np.maximum(least, least_key), 0)) | (tiles.last < 0)
        full = (least == most) & (least_key == most_key) & (least >= 0) & (tiles.first >= 0)
        return states(empty, full & (least == least_key))

    def tile_bits(self, tiles: Tiles) -> Array:
        b, position = self._batch(tiles)[:, None], tiles.positions()
        ids = np.where(position < 0, -1, self.ids.array[b, np.clip(position, 0, None)])
        return packed((ids[:, :, None] == self.ids.array[b, tiles.keys()][:, None]) & (ids >= 0)[:, :, None])


class Dilated(Pattern, frozen=True):
    """The value of `dilated(n, stride)`."""

    n: int
    stride: int

    def __repr__(self) -> str:
        return f"dilated({self.n}, {self.stride})"

    @property
    def _furthest(self) -> int:
        return (self.n - 1) * self.stride

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        return (k <= q) & (q - k <= self._furthest) & ((q - k) % self.stride == 0)

    def candidates(self, grid: Grid) -> Candidates:
        return Window(self._furthest + 1).candidates(grid)

    def state(self, tiles: Tiles) -> Array:
        least, most = tiles.first - tiles.last_key, tiles.last - tiles.first_key
        largest = np.minimum(most, self._furthest) // self.stride * self.stride
        empty = (most < 0) | (largest < np.maximum(least, 0))
        return states(empty, least == most)

    def key(self, tiles: Tiles) -> Array:
        grid, difference = tiles.grid, tiles.first - tiles.first_key
        inside = (difference >= grid.block_k) & (difference + grid.block_q <= self._furthest)
        return np.where(inside, difference % self.stride, difference + grid.seq + grid.kv_seq + self.stride)

    def tile_bits(self, tiles: Tiles) -> Array:
        grid = tiles.grid
        apart = np.arange(grid.block_q)[:, None] - np.arange(grid.block_k)
        apart = (tiles.first - tiles.first_key)[:, None, None] + apart
        return packed((apart >= 0) & (apart <= self._furthest) & (apart % self.stride == 0))


class Blocks(Pattern, frozen=True):
    """The value of `blocks(array, block)`."""

    array: Table
    """bool (batches, heads, row blocks, key blocks)."""
    block: int = DEFAULT_BLOCK

    def __repr__(self) -> str:
        shown = self.array.array
        return f"blocks(array of shape {shown.shape}, {shown.mean():.1%} visible, block={self.block})"

    def check(self, shape: Shape) -> None:
        own = self.array.array.shape
        wanted = (-(-shape[2] // self.block), -(-shape[3] // self.block))
        if own[0] not in (1, shape[0]) or own[1] not in (1, shape[1]) or own[2:] != wanted:
            raise UsageError(
                f"mask: blocks got an array of shape {own}; with blocks of {self.block} it takes "
                f"({shape[0]} or 1, {shape[1]} or 1, {wanted[0]}, {wanted[1]}) for (B, H, Lq, Lk) = {shape}"
            )

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        return self.array.array.shape[0], self.array.array.shape[1]

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        import mlx.core as mx

        batches, heads = self.planes(0, 0)
        b, h = (x if own > 1 else mx.zeros_like(x[:1, :1]) for x, own in ((b, batches), (h, heads)))
        rows = (q - (lengths[1] - lengths[0])) // self.block
        return self.array.mlx()[b, h, rows, k // self.block]

    def _aligned(self, grid: Grid) -> bool:
        return self.block % grid.block_q == 0 and self.block % grid.block_k == 0

    def candidates(self, grid: Grid) -> Candidates:
        batches, heads = self.planes(0, 0)
        row, j = np.divmod(np.flatnonzero(self._touched(grid)), grid.key_tiles)
        return Listed(Tiles(grid, batches, heads, row, j))

    def block_flags(self, grid: Grid) -> BlockFlags | None:
        if not self._aligned(grid):
            return None
        tall, wide = min(self.block // grid.block_q, grid.row_tiles), min(self.block // grid.block_k, grid.key_tiles)
        return BlockFlags(self.array.array, tall, wide)

    def whole_tiles(self, grid: Grid) -> tuple[Array, Array] | None:
        if not self._aligned(grid):
            return None
        array, split = self.array.array, min(self.block // grid.block_q, grid.row_tiles)
        if self.block > grid.block_k:
            wide = min(self.block // grid.block_k, grid.key_tiles)
            array = np.repeat(array, wide, axis=3)[..., : grid.key_tiles]
        width = array.shape[3]
        counts = np.count_nonzero(array, axis=3).ravel() if width % 8 else _bytes_set(array)
        starts = np.cumsum(counts) - counts
        keys = _places_set(array, int(counts.sum()))
        keys -= np.repeat(np.arange(len(counts)) * width, counts)
        keys = keys.astype(np.int32)
        if split == 1:
            return counts, keys
        per_plane = self.array.array.shape[2]
        block = np.arange(per_plane * split) // split
        block = block[: grid.row_tiles]  # the last block may have fewer row tiles
        planes = len(counts) // per_plane
        run = (np.arange(planes)[:, None] * per_plane + block).ravel()
        return counts[run], _runs_of(keys, starts[run], counts[run])

    def _touched(self, grid: Grid) -> Array:
        """Return which tiles have a visible block, (batches, heads, row tiles, key tiles)."""
        array = self.array.array
        if (self.block, self.block) == (grid.block_q, grid.block_k):
            return array
        if self._aligned(grid):
            # a block may be longer than the scores
            tall, broad = (
                min(self.block // grid.block_q, grid.row_tiles),
                min(self.block // grid.block_k, grid.key_tiles),
            )
            wide = np.repeat(array, broad, axis=3)[..., : grid.key_tiles]
            return np.repeat(wide, tall, axis=2)[..., : grid.row_tiles, :]
        return self._counts(grid)[0] > 0

    def _counts(self, grid: Grid) -> tuple[Array, Array]:
        """Return the number of visible blocks that each tile touches, and of all (row tiles, key tiles)."""
        array = self.array.array
        sums = np.zeros((*array.shape[:2], array.shape[2] + 1, array.shape[3] + 1), np.int32)
        np.cumsum(np.cumsum(array, axis=2, dtype=np.int32), axis=3, out=sums[:, :, 1:, 1:])
        low, high = self._touching(grid.row_tiles, grid.block_q, grid.seq)
        left, right = self._touching(grid.key_tiles, grid.block_k, grid.kv_seq)
        taken = sums[:, :, high] - sums[:, :, low]
        return taken[..., right] - taken[..., left], np.outer(high - low, right - left)

    def _touching(self, count: int, size: int, length: int) -> tuple[Array, Array]:
        first = np.arange(count) * size
        return first // self.block, (np.minimum(first + size, length) - 1) // self.block + 1

    def _plane(self, tiles: Tiles) -> tuple["Array | int", "Array | int"]:
        batches, heads = self.planes(0, 0)
        return tiles.b if batches > 1 else 0, tiles.h if heads > 1 else 0

    def state(self, tiles: Tiles) -> Array:
        grid, (b, h) = tiles.grid, self._plane(tiles)
        if self._aligned(grid):
            i, j = tiles.i * grid.block_q // self.block, tiles.j * grid.block_k // self.block
            return np.where(self.array.array[b, h, i, j], np.uint8(FULL), np.uint8(EMPTY))
        seen, whole = self._counts(grid)
        found = seen[b, h, tiles.i, tiles.j]
        return states(found == 0, found == whole[tiles.i, tiles.j])

    def key(self, tiles: Tiles) -> Array:
        b, h = self._plane(tiles)
        grid = tiles.grid
        key: Array = ((b * self.array.array.shape[1] + h) * grid.row_tiles + tiles.i) * grid.key_tiles + tiles.j
        return key

    def tile_bits(self, tiles: Tiles) -> Array:
        b, h = (np.asarray(x).reshape(-1, 1, 1) for x in self._plane(tiles))
        rows = (tiles.positions() - tiles.grid.shift)[:, :, None] // self.block
        return packed(self.array.array[b, h, rows, tiles.keys()[:, None] // self.block])


class Where(Pattern, frozen=True, eq=False):
    """The value of `where(f)`, equal by the function's identity."""

    f: Visible

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where) and other.f is self.f

    def __hash__(self) -> int:
        return hash((Where, id(self.f)))

    def __repr__(self) -> str:
        return f"where({getattr(self.f, '__name__', repr(self.f))})"

    def check(self, shape: Shape) -> None:
        _planes_of(self, shape[0], shape[1])

    def probe(self, batch: int, heads: int) -> tuple[int, int]:
        """Call the function with one query and key, check what it returns, and return its planes."""
        import mlx.core as mx

        b, h = mx.arange(batch).reshape(-1, 1, 1, 1), mx.arange(heads).reshape(1, -1, 1, 1)
        one = mx.zeros((1, 1, 1, 1), mx.int32)
        found = self._call(b, h, one, one).shape
        return found[0], found[1]

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        return _planes_of(self, batch, heads)

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        return self._call(b, h, q, k)

    def _call(self, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        """Call the function and check what it returns; 4-D."""
        import mlx.core as mx

        name = repr(self)
        try:
            seen: Any = self.f(b, h, q, k)
        except Exception as error:  # the function is the user's
            raise UsageError(f"mask: {name}: its function raised {error_line(error)}") from error
        if isinstance(seen, bool):
            seen = mx.array(seen)
        if not isinstance(seen, mx.array):
            raise UsageError(
                f"mask: {name}: its function returned {type(seen).__name__}; it must return a bool mlx.core.array"
            )
        if seen.dtype != mx.bool_:
            dtype = str(seen.dtype).removeprefix("mlx.core.")
            raise UsageError(
                f"mask: {name}: its function returned an array of {dtype}; it must be bool, True is visible"
            )
        sizes = tuple(max(axis) for axis in zip(*(x.shape for x in (b, h, q, k)), strict=True))
        own = (1,) * (4 - seen.ndim) + tuple(seen.shape)
        if seen.ndim > 4 or any(n not in (1, whole) for n, whole in zip(own, sizes, strict=True)):
            raise UsageError(
                f"mask: {name}: its function returned shape {tuple(seen.shape)}; it must broadcast to that of "
                f"its arguments, {sizes}"
            )
        return seen.reshape(own)

    def tile_bits(self, tiles: Tiles) -> Array:
        import mlx.core as mx

        count, (block_q, block_k) = len(tiles), (tiles.grid.block_q, tiles.grid.block_k)
        rows = mx.array(tiles.positions().reshape(1, 1, -1, 1).astype(np.int32))
        keys = mx.array(np.repeat(tiles.keys().astype(np.int32), block_q, axis=0)[None, None])
        b, h = (
            mx.array(np.repeat(np.broadcast_to(x, count), block_q).reshape(1, 1, -1, 1).astype(np.int32))
            for x in (tiles.b, tiles.h)
        )
        seen = mx.broadcast_to(self._call(b, h, rows, keys), (1, 1, count * block_q, block_k))
        try:
            return packed(np.array(seen).reshape(count, block_q, block_k))
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"mask: {self!r}: its result cannot be computed: {error_line(error)}") from error


def _check_documents(batches: int, positions: int, shape: Shape) -> None:
    if positions != shape[3]:
        raise UsageError(f"mask: documents got {positions} positions in all; there are {shape[3]} keys")
    if batches not in (1, shape[0]):
        raise UsageError(f"mask: documents got {batches} sequences; the batch has {shape[0]}")


@lru_cache(maxsize=256)
def _planes_of(mask: Where, batch: int, heads: int) -> tuple[int, int]:
    return mask.probe(batch, heads)


def _bytes_set(array: Array) -> Array:
    """Return the number of true values of each row of a bool array, whose length is a multiple of 8."""
    counts: Array = np.bitwise_count(np.ascontiguousarray(array).view(np.uint64)).sum(axis=-1, dtype=np.int64)
    return counts.ravel()


SEARCHED_SHARE: Final = 0.1
"""Share of true values up to which `np.flatnonzero` searches for the next one, instead of passing over all alike."""
QUICK_SHARE: Final = 0.03
"""Share up to which searching is faster."""


def _places_set(array: Array, count: int) -> Array:
    """Return the flat index of each of the `count` true values: in half the time if they are few, not rare."""
    flat = array.reshape(-1)
    if not QUICK_SHARE * flat.size < count <= SEARCHED_SHARE * flat.size:
        return np.flatnonzero(flat)
    more = int((SEARCHED_SHARE * flat.size - count) / (1 - SEARCHED_SHARE)) + 1
    return np.flatnonzero(np.concatenate([flat, np.ones(more, bool)]))[:count]


def _runs_of(values: Array, starts: Array, counts: Array) -> Array:
    """Return runs of values, given by their starts and lengths, one after another."""
    ends = np.cumsum(counts)
    index: Array = np.repeat(starts - ends + counts, counts)
    return values[index + np.arange(len(index))]


def _same_id(table: Table, b: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
    import mlx.core as mx

    ids = table.mlx()
    b = b if ids.shape[0] > 1 else mx.zeros_like(b[:1])
    own = mx.where(q < 0, -1, ids[b, mx.maximum(q, 0)])
    return (own == ids[b, k]) & (own >= 0)


def shown_numbers(values: Sequence[int]) -> str:
    """Format whole numbers, shortened if they are many or all the same."""
    if len(set(values)) == 1 and len(values) > 2:
        return f"[{values[0]}] * {len(values)}"
    shown = ", ".join(str(value) for value in values[:MAX_SHOWN_NUMBERS])
    return f"[{shown}]" if len(values) <= MAX_SHOWN_NUMBERS else f"[{shown}, … {len(values)} in all]"


Chunks = tuple[tuple[int, int], ...]
"""Ranges [start, stop), ascending and disjoint."""


class Section(Pattern, frozen=True):
    """The pairs of a mask over (Lq, Lk) between some row chunks, one after another, and some key chunks.

    A call's rows and keys are those of the chunks; where chunks are whole tiles, the lists are those of the whole mask.
    """

    whole: Pattern
    lengths: Lengths
    """(Lq, Lk) of the whole mask."""
    rows: Chunks
    """Row indices, 0 to Lq."""
    keys: Chunks

    def __repr__(self) -> str:
        return f"part of {self.whole!r}"

    def check(self, shape: Shape) -> None:
        self.whole.check((*shape[:2], *self.lengths))

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        return self.whole.planes(batch, heads)

    def visible(self, lengths: Lengths, b: "mx.array", h: "mx.array", q: "mx.array", k: "mx.array") -> "mx.array":
        import mlx.core as mx

        rows, keys = mx.array(self._row_positions()), mx.array(indices(self.keys))
        return self.whole.visible(self.lengths, b, h, rows[q - (lengths[1] - lengths[0])], keys[k])

    def tile_bits(self, tiles: Tiles) -> Array:
        import mlx.core as mx

        count, (block_q, block_k) = len(tiles), (tiles.grid.block_q, tiles.grid.block_k)
        rows = self._row_positions()[tiles.positions() - tiles.grid.shift].reshape(1, 1, -1, 1)
        keys = np.repeat(indices(self.keys)[tiles.keys()], block_q, axis=0)[None, None]
        b, h = (
            mx.array(np.repeat(np.broadcast_to(x, count), block_q).reshape(1, 1, -1, 1).astype(np.int32))
            for x in (tiles.b, tiles.h)
        )
        seen = self.whole.visible(self.lengths, b, h, mx.array(rows), mx.array(keys))
        seen = mx.broadcast_to(seen, (1, 1, count * block_q, block_k))
        return packed(np.array(seen).reshape(count, block_q, block_k))

    def _row_positions(self) -> Array:
        return indices(self.rows) + np.int32(self.lengths[1] - self.lengths[0])

    def _build(self, shape: Shape, block_q: int, block_k: int) -> BlockList:
        self.check(shape)
        grid = Grid(*shape, block_q, block_k)
        seq, kv_seq = self.lengths
        if not (is_aligned(self.rows, seq, block_q) and is_aligned(self.keys, kv_seq, block_k)):
            return lists.build(self, grid)
        whole = self.whole.block_list((*shape[:2], seq, kv_seq), block_q, block_k)
        return lists.part(whole, grid, tiles_of(self.rows, block_q), tiles_of(self.keys, block_k))


def indices(chunks: Chunks) -> Array:
    """Return the indices of chunks, int32."""
    return np.concatenate([np.arange(*chunk, dtype=np.int32) for chunk in chunks])


def is_aligned(chunks: Chunks, length: int, block: int) -> bool:
    """Return whether chunks of an axis consist of its whole tiles; its last tile may be cut by the axis's end."""
    whole = all(start % block == 0 and (stop % block == 0 or stop == length) for start, stop in chunks)
    return whole and all(end % block == 0 for end in list(accumulate(stop - start for start, stop in chunks))[:-1])


def tiles_of(chunks: Chunks, block: int) -> Array:
    """Return the tiles of an axis that aligned chunks consist of."""
    return np.concatenate([np.arange(start // block, -(-stop // block)) for start, stop in chunks])
