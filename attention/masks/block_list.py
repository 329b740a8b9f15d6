"""Block lists: per tile of query rows, the tiles of keys with a visible pair, and packed bits of the partial ones."""

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar, cast

import numpy as np
from msgspec import Struct

from attention.masks.tiles import EMPTY, PARTIAL, Array, Candidates, Grid, Span, Tiles, unpacked

if TYPE_CHECKING:
    import mlx.core as mx

    MlxArray: TypeAlias = mx.array
else:
    MlxArray = Any  # `help` evaluates the types of fields, and MLX is imported when it is first used

T = TypeVar("T")
MAX_CHUNK_PAIRS: Final = 1 << 22
"""Pairs whose visibility is evaluated at once."""
MAX_CACHED_BYTES: Final = 256 << 20
PICTURE_COLUMNS: Final = 64


class Expression(Protocol):
    """What a block list is built from; a part that a tile still depends on is a bit in `needed`."""

    def planes(self, batch: int, heads: int) -> tuple[int, int]:
        """Return the number of planes along batch and heads: 1 where the mask is the same for all."""
        ...

    def candidates(self, grid: Grid) -> Candidates:
        """Return tiles that include all with a visible pair."""
        ...

    def whole_tiles(self, grid: Grid) -> tuple[Array, Array] | None:
        """Return how many key tiles each row tile has, and these in order, if all are full; None if unknown."""
        ...

    def full_span(self, grid: Grid) -> Span | None:
        """Return a range of key tiles of each row tile that are surely full; None if unknown."""
        ...

    def row_intervals(self, grid: Grid) -> Span | None:
        """Return the keys [low, high) that each row sees, int32 (batches, Lq); None if they need not be adjacent."""
        ...

    def block_flags(self, grid: Grid) -> "BlockFlags | None":
        """Return the blocks that the mask consists of, if tiles divide them; otherwise None."""
        ...

    def classify(self, tiles: Tiles) -> tuple[Array, Array]:
        """Return the state of each tile, and for partial tiles the bits of the parts that decide them."""
        ...

    def signature(self, tiles: Tiles, needed: int) -> list[Array]:
        """Return columns of integers; the needed parts have the same bits in tiles where all columns are equal."""
        ...

    def bits(self, tiles: Tiles, needed: int) -> Array:
        """Return the packed bits (tiles, block_q, words) of the needed parts combined."""
        ...


class BlockFlags(Struct, frozen=True, eq=False):
    """Blocks of `tall` row tiles and `wide` key tiles each; those at the edges may have fewer."""

    flags: Array
    """bool (batches, heads, rows of blocks, blocks)."""
    tall: int
    wide: int


class Builder(Protocol):
    """Compiled code that makes the lists of some masks as `build` does, in less time."""

    def of_blocks(self, blocks: BlockFlags, grid: Grid) -> tuple[Array, Array]:
        """Return offsets and entries of whole blocks."""
        ...

    def of_intervals(self, low: Array, high: Array, grid: Grid) -> tuple[Array, Array, Array, int]:
        """Return offsets, entries, bits and the number of visible pairs of rows that see the keys [low, high)."""
        ...


_builder: Builder | None = None


def use_builder(builder: Builder | None) -> None:
    """Make patterns' lists by compiled code from now on, or by NumPy: the same tiles, with bits in another order."""
    global _builder  # noqa: PLW0603  one a process
    _builder = builder


def current_builder() -> Builder | None:
    """Return the compiled code in use."""
    return _builder


class BlockLists(Struct, frozen=True, eq=False):
    """Lists in compressed form: tile t of a plane has `entries[offsets[i]:offsets[i + 1]]`, i = plane * tiles + t."""

    offsets: Array
    """int32 (planes * tiles + 1,)."""
    entries: Array
    """int32 (n, 2): tile of the other axis, ascending, and index into `bits`, or -1 if all pairs are visible."""
    _device: list[tuple[MlxArray, MlxArray]] = []

    def arrays(self) -> "tuple[mx.array, mx.array]":
        """Return offsets and entries as MLX arrays, made once."""
        if not self._device:
            import mlx.core as mx

            self._device.append((mx.array(self.offsets), mx.array(self.entries.reshape(-1, 2))))
        return self._device[0]


class BlockList(Struct, frozen=True, eq=False):
    """The tiles of a mask that have a visible pair, for one shape and tile size.

    Rows beyond Lq and keys beyond Lk have unspecified bits; a tile at the edge is full if all its pairs within the
    scores are visible.
    """

    block_q: int
    block_k: int
    batches: int
    """Planes along the batch: 1 if all batches share their lists. Plane = batch * heads + head."""
    heads: int
    shape: tuple[int, int, int, int]
    """(B, H, Lq, Lk)."""
    rows: BlockLists
    """For each row tile its key tiles."""
    bits: Array
    """uint32 (m, block_q, block_k / 32), at least one: bit j of word w is key 32 w + j of the tile."""
    pairs: int
    """Visible pairs of all batches and heads."""
    _made: "dict[object, object]" = {}

    @property
    def row_tiles(self) -> int:
        """Tiles along the query rows."""
        return -(-self.shape[2] // self.block_q)

    @property
    def key_tiles(self) -> int:
        """Tiles along the keys."""
        return -(-self.shape[3] // self.block_k)

    @property
    def offsets(self) -> Array:
        """int32 (batches * heads * row_tiles + 1,): where the entries of each row tile start."""
        return self.rows.offsets

    @property
    def entries(self) -> Array:
        """int32 (n, 2): (key tile, bits tile or -1), ascending by key tile within a row tile."""
        return self.rows.entries

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and bits on the host."""
        return int(self.offsets.nbytes + self.entries.nbytes + self.bits.nbytes)

    @property
    def density(self) -> float:
        """Share of the pairs that are visible."""
        batch, heads, seq, kv_seq = self.shape
        return self.pairs / (batch * heads * seq * kv_seq)

    def arrays(self) -> "tuple[mx.array, mx.array, mx.array]":
        """Return offsets, entries and bits as MLX arrays, made once."""
        return (*self.rows.arrays(), self.device_bits())

    def device_bits(self) -> "mx.array":
        """Return the bits as an MLX array, made once."""
        import mlx.core as mx

        return self.derived("bits", lambda own: mx.array(own.bits))

    def derived(self, key: object, make: Callable[["BlockList"], T]) -> T:
        """Return what `make` returns for this list, made once per key and kept with the list."""
        if key not in self._made:
            self._made[key] = make(self)
        return cast("T", self._made[key])

    def transposed(self) -> BlockLists:
        """Return the same tiles as lists of row tiles for each key tile; bits stay as they are, [row][key]."""
        return self.derived("transposed", BlockList._transposed)

    def _transposed(self) -> BlockLists:
        planes, counts = self.batches * self.heads, np.diff(self.offsets)
        row = np.repeat(np.tile(np.arange(self.row_tiles, dtype=np.int32), planes), counts)
        first_key = np.repeat(np.arange(planes, dtype=np.int32) * self.key_tiles, self.row_tiles)
        key = np.repeat(first_key, counts) + self.entries[:, 0]
        lists = planes * self.key_tiles
        order = np.argsort(key.astype(np.uint16) if lists <= 1 << 16 else key, kind="stable")  # 16 bits: radix sort
        entries = np.empty_like(self.entries)
        entries[:, 0], entries[:, 1] = row[order], self.entries[order, 1]
        return BlockLists(_offsets(key, lists), entries, [])

    def row_of_entry(self) -> Array:
        """Return plane * row_tiles + row tile of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def dense(self) -> Array:
        """Return the whole mask as bool (batches, heads, Lq, Lk); for tests and small shapes."""
        shape = (self.batches * self.heads * self.row_tiles, self.key_tiles)
        tiles = np.zeros((*shape, self.block_q, self.block_k), bool)
        row, (key, index) = self.row_of_entry(), self.entries.T
        tiles[row, key] = np.where(index[:, None, None] < 0, True, unpacked(self.bits)[index])
        whole = tiles.swapaxes(1, 2).reshape(self.batches, self.heads, self.row_tiles * self.block_q, -1)
        return whole[:, :, : self.shape[2], : self.shape[3]]

    def picture(self, columns: int = PICTURE_COLUMNS, plane: int = 0) -> str:
        """Draw the tiles of a plane, at most `columns` wide: `█` is full, `▒` partial, `·` not visited.

        A character stands for a square of tiles if there are more than fit; it is full if they all are.
        """
        step = max(1, -(-max(self.key_tiles, self.row_tiles) // columns))
        height, width = -(-self.row_tiles // step), -(-self.key_tiles // step)
        begin, end = (int(self.offsets[(plane + n) * self.row_tiles]) for n in (0, 1))
        row = self.row_of_entry()[begin:end] - plane * self.row_tiles
        key, index = self.entries[begin:end].T
        square = row // step * width + key // step
        seen, full = (np.bincount(square[one], minlength=height * width) for one in (slice(None), index < 0))
        tall, wide = (
            np.minimum(np.arange(n) * step + step, whole) - np.arange(n) * step
            for n, whole in ((height, self.row_tiles), (width, self.key_tiles))
        )
        drawn = np.where(seen == 0, "·", np.where(full == np.outer(tall, wide).ravel(), "█", "▒"))
        return "\n".join("".join(line) for line in drawn.reshape(height, width))

    def __str__(self) -> str:
        batch, heads, seq, kv_seq = self.shape
        partial = int((self.entries[:, 1] >= 0).sum())
        head = (
            f"{len(self.entries):,} of {self.batches * self.heads * self.row_tiles * self.key_tiles:,} tiles of "
            f"{self.block_q} x {self.block_k}, {partial:,} of them partial ({len(self.bits):,} stored); "
            f"{self.pairs:,} pairs, {self.density:.1%} of B={batch} H={heads} {seq} x {kv_seq}"
        )
        return f"{head}\n{self.picture()}"


def build(mask: Expression, grid: Grid, builder: Builder | None = None) -> BlockList:
    """Build the block list of a mask, by compiled code if a builder is given that takes it."""
    batches, heads = mask.planes(grid.batch, grid.heads)
    made = None if builder is None else _built(builder, mask, grid, batches, heads)
    if made is not None:
        return made
    whole = None if _has_edge(grid) else mask.whole_tiles(grid)
    if whole is not None:
        counts, keys = whole
        return _made_of(grid, batches, heads, np.cumsum(counts), keys, -1, _no_bits(grid), len(keys) * grid.pairs)
    tiles = mask.candidates(grid).tiles(batches, heads)
    opened = _not_surely_full(mask, tiles)
    own = tiles if opened is None else tiles.take(opened)
    state, needed = mask.classify(own)
    index = np.full(len(own), -1, np.int32)
    visible = (state != EMPTY) * (_capacity(grid)[_kinds(own)] if _has_edge(grid) else grid.pairs)
    bits = _resolve(mask, own, state, needed, index, visible)
    if opened is not None:
        of_own, of_visible = index, visible
        index = np.full(len(tiles), -1, np.int32)
        visible = _capacity(grid)[_kinds(tiles)] if _has_edge(grid) else np.full(len(tiles), grid.pairs)
        index[opened], visible[opened] = of_own, of_visible
    if not visible.all():
        kept = np.flatnonzero(visible)
        tiles, index, visible = tiles.take(kept), index[kept], visible[kept]
    ends = np.cumsum(np.bincount(tiles.row, minlength=batches * heads * grid.row_tiles))
    return _made_of(grid, batches, heads, ends, tiles.j, index, bits, int(visible.sum()))


def _built(builder: Builder, mask: Expression, grid: Grid, batches: int, heads: int) -> BlockList | None:
    """Return the list of a mask that compiled code takes; otherwise None."""
    blocks = None if _has_edge(grid) else mask.block_flags(grid)
    if blocks is not None:
        offsets, entries = builder.of_blocks(blocks, grid)
        return _list_of(grid, batches, heads, offsets, entries, _no_bits(grid), len(entries) * grid.pairs)
    seen = mask.row_intervals(grid) if heads == 1 else None
    if seen is None:
        return None
    low, high = (np.ascontiguousarray(np.broadcast_to(x, (batches, grid.seq)), np.int32) for x in seen)
    return _list_of(grid, batches, heads, *builder.of_intervals(low, high, grid))


def part(whole: BlockList, grid: Grid, rows: Array, keys: Array) -> BlockList:
    """Return the list of some row tiles of a whole list against some of its key tiles, both ascending.

    Args:
        whole: the list to take them from.
        grid: the grid of the part, whose edges are those of the whole, if its last tiles are.
        rows: row tiles of the whole.
        keys: key tiles of the whole.
    """
    planes = whole.batches * whole.heads
    lists = (np.arange(planes)[:, None] * whole.row_tiles + rows).ravel()
    starts, counts = whole.offsets[lists].astype(np.int64), np.diff(whole.offsets).astype(np.int64)[lists]
    ends = np.cumsum(counts)
    taken = np.repeat(starts - ends + counts, counts) + np.arange(int(ends[-1]) if len(ends) else 0)
    row = np.repeat(np.arange(len(lists)), counts)
    place = np.full(whole.key_tiles, -1, np.int64)
    place[keys] = np.arange(len(keys))
    j, index = place[whole.entries[taken, 0]], whole.entries[taken, 1]
    row, j, index = row[j >= 0], j[j >= 0], index[j >= 0]
    used, number = np.unique(index[index >= 0], return_inverse=True)
    bits = whole.bits[used] if len(used) else _no_bits(grid)
    index = index.copy()
    index[index >= 0] = number
    tiles = Tiles(grid, whole.batches, whole.heads, row, j)
    kinds = _kinds(tiles) if _has_edge(grid) else np.zeros(len(tiles), np.int64)
    pairs = np.where(index < 0, _capacity(grid)[kinds], _visible_pairs(bits, grid)[kinds, np.maximum(index, 0)])
    ends = np.cumsum(np.bincount(row, minlength=planes * grid.row_tiles))
    return _made_of(grid, whole.batches, whole.heads, ends, j, index, bits, int(pairs.sum()))


def _not_surely_full(mask: Expression, tiles: Tiles) -> Array | None:
    """Return the index of the tiles that the mask does not show as full without a look at each; None for all."""
    span = mask.full_span(tiles.grid)
    if span is None:
        return None
    shape = (tiles.batches, tiles.heads, tiles.grid.row_tiles)
    low, high = (np.broadcast_to(x, shape).ravel()[tiles.row] for x in span)
    return np.flatnonzero((tiles.j < low) | (tiles.j >= high))


def _made_of(
    grid: Grid, batches: int, heads: int, ends: Array, keys: Array, index: "Array | int", bits: Array, pairs: int
) -> BlockList:
    """Return a list; `ends` is where the entries of each row tile end, `pairs` those of these planes."""
    entries = np.empty((len(keys), 2), np.int32)
    entries[:, 0], entries[:, 1] = keys, index
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends
    return _list_of(grid, batches, heads, offsets, entries, bits, pairs)


def _list_of(
    grid: Grid, batches: int, heads: int, offsets: Array, entries: Array, bits: Array, pairs: int
) -> BlockList:
    return BlockList(
        block_q=grid.block_q,
        block_k=grid.block_k,
        batches=batches,
        heads=heads,
        shape=(grid.batch, grid.heads, grid.seq, grid.kv_seq),
        rows=BlockLists(offsets, entries, []),
        bits=np.ascontiguousarray(bits),  # kernels read it row by row
        pairs=(grid.batch // batches) * (grid.heads // heads) * pairs,
        _made={},
    )


def _resolve(mask: Expression, tiles: Tiles, state: Array, needed: Array, index: Array, visible: Array) -> Array:
    """Evaluate the partial tiles, set their bits tile and their number of visible pairs; return the bits.

    Tiles that turn out to be full keep index -1; those without a visible pair get 0 pairs.
    """
    grid, stored, count = tiles.grid, [], 0
    capacity = _capacity(grid)
    partial = np.flatnonzero(state == PARTIAL)
    of_partial = needed[partial]
    same = not len(partial) or of_partial.min() == of_partial.max()
    for parts in of_partial[:1].tolist() if same else np.unique(of_partial).tolist():
        group = partial if same else partial[of_partial == parts]
        own = tiles.take(group)
        first, which = _distinct(mask.signature(own, parts))
        kinds = _kinds(own) if _has_edge(grid) else np.zeros(len(own), np.int64)
        for chunk, bits in _evaluated(mask, own, parts, first):
            pairs = _visible_pairs(bits, grid)
            place = (
                np.flatnonzero((which >= chunk.start) & (which < chunk.stop))
                if len(chunk) < len(first)
                else np.arange(len(own))
            )
            local = which[place] - chunk.start
            seen = pairs[kinds[place], local]
            mixed = (seen > 0) & (seen < capacity[kinds[place]])
            used = np.zeros(len(bits), bool)
            used[local[mixed]] = True
            number = np.cumsum(used) - 1 + count
            visible[group[place]] = seen
            index[group[place]] = np.where(mixed, number[local], -1)
            stored.append(bits if used.all() else bits[used])
            count += int(used.sum())
    if not count:
        return _no_bits(grid)
    return stored[0] if len(stored) == 1 else np.concatenate(stored)


def _no_bits(grid: Grid) -> Array:
    return np.zeros((1, grid.block_q, grid.words), np.uint32)


def _evaluated(mask: Expression, tiles: Tiles, parts: int, first: Array) -> Iterator[tuple[range, Array]]:
    size = max(1, MAX_CHUNK_PAIRS // (tiles.grid.block_q * tiles.grid.block_k))
    for start in range(0, len(first), size):
        chunk = first[start : start + size]
        yield range(start, start + len(chunk)), mask.bits(tiles.take(chunk), parts)


def _distinct(columns: list[Array]) -> tuple[Array, Array]:
    """Return where each distinct row of columns is first found, and for each row the number of its distinct row."""
    first, which = (x for x in np.unique(columns[0], return_index=True, return_inverse=True)[1:])
    for column in columns[1:]:
        second = np.unique(column, return_inverse=True)[1]
        first, which = np.unique(which * (int(second.max()) + 1) + second, return_index=True, return_inverse=True)[1:]
    return first, which


def _has_edge(grid: Grid) -> bool:
    return bool(grid.seq % grid.block_q or grid.kv_seq % grid.block_k)


def _kinds(tiles: Tiles) -> Array:
    """Return for each tile 0, plus 1 in the last row tile, plus 2 in the last key tile."""
    grid = tiles.grid
    kinds: Array = (tiles.i == grid.row_tiles - 1).astype(np.int64) + 2 * (tiles.j == grid.key_tiles - 1)
    return kinds


def _capacity(grid: Grid) -> Array:
    """Return the number of pairs of a tile of each kind."""
    rows, keys = grid.edge()
    return np.array([grid.block_q * grid.block_k, rows * grid.block_k, grid.block_q * keys, rows * keys])


def _visible_pairs(bits: Array, grid: Grid) -> Array:
    """Return the number of visible pairs of tiles, if they were of each kind: (4, tiles)."""
    if not _has_edge(grid):
        flat = np.ascontiguousarray(bits).reshape(len(bits), -1)
        wide = flat.view(np.uint64) if flat.shape[1] % 2 == 0 else flat
        counts: Array = np.bitwise_count(wide).sum(axis=1, dtype=np.int64)
        return counts[None]
    rows, keys = grid.edge()
    inside = np.packbits(np.arange(grid.block_k) < keys, bitorder="little").view("<u4").astype(np.uint32)
    whole, cut = (np.bitwise_count(one).sum(axis=2, dtype=np.int64) for one in (bits, bits & inside))
    return np.stack([whole.sum(axis=1), whole[:, :rows].sum(axis=1), cut.sum(axis=1), cut[:, :rows].sum(axis=1)])


def _offsets(row: Array, rows: int) -> Array:
    offsets = np.zeros(rows + 1, np.int32)
    np.cumsum(np.bincount(row, minlength=rows), out=offsets[1:])
    return offsets


class ListCache:
    """The most recently used block lists, up to a number of bytes on the host; safe for threads."""

    def __init__(self, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lists: dict[object, BlockList] = {}
        """In the order of use: unlike OrderedDict, `dict.pop` compares a key once."""
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], BlockList]) -> BlockList:
        """Return the list of a key, made if it is not kept."""
        with self._lock:
            found = self._lists.pop(key, None)
            if found is not None:
                self._lists[key] = found
                return found
        made = make()
        with self._lock:
            if key not in self._lists:
                self._lists[key] = made
                self._bytes += made.nbytes
            while self._bytes > self._max_bytes and len(self._lists) > 1:
                self._bytes -= self._lists.pop(next(iter(self._lists))).nbytes
        return made

    def clear(self) -> None:
        """Drop all lists."""
        with self._lock:
            self._lists.clear()
            self._bytes = 0


cache: Final = ListCache()
