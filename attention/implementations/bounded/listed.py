"""Tiles of blockwise attention under a pattern: those without a visible pair are skipped, full ones need no mask.

The tiles are coarser than those of kernels: each is a dozen MLX operations. Their states are counted from the pattern's
block list, which is exact; a tile that covers a part of a listed tile counts as partial.
"""

from functools import lru_cache
from typing import Any, Final

import mlx.core as mx
import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from attention.implementations.bounded.blocks import (
    SUMS_SHARE,
    Blocks,
    ProblemSize,
    is_affordable,
    query_sum_bytes,
    raised,
    tile_bytes,
)
from attention.masks import BlockList, Pattern

Array = NDArray[Any]
SIDES: Final = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Rows and keys of the tiles that are considered."""
TILE_PAIRS: Final = 40_000
"""Pairs whose computation takes as long as queueing the operations of a tile."""


def choose_listed_blocks(shape: ProblemSize, tiles: BlockList, budget_bytes: int, target_bytes: int | None) -> Blocks:
    """Choose the tile for a pattern: the least work of those within the budget whose graph is affordable.

    If none is, the budget is exceeded by as little as possible, as in `choose_blocks`.
    """
    while True:
        found = _sizes(shape, tiles, budget_bytes, target_bytes or budget_bytes)
        fitting = [one for one in found if is_affordable(one.count, budget_bytes)]
        if fitting:
            return min(fitting, key=lambda one: one.work).blocks
        budget_bytes = raised(budget_bytes)


class _Size(Struct, frozen=True):
    blocks: Blocks
    count: int
    work: float


def _sizes(shape: ProblemSize, tiles: BlockList, budget: int, target: int) -> list[_Size]:
    found: list[_Size] = []
    for side in SIDES:
        blocks = Blocks(batches=1, kv_heads=1, rows=min(side, shape.seq), keys=min(side, shape.kv_seq))
        if not found:
            while tile_bytes(shape, blocks) > budget and (blocks.rows > 1 or blocks.keys > 1):
                axis = "rows" if blocks.rows >= blocks.keys else "keys"
                blocks = structs.replace(blocks, **{axis: -(-getattr(blocks, axis) // 2)})
        elif tile_bytes(shape, blocks) > budget:
            break
        if shape.training and query_sum_bytes(shape, blocks) <= SUMS_SHARE * budget:
            summed = structs.replace(blocks, sums_queries=True)
            blocks = summed if tile_bytes(shape, summed) <= budget else blocks
        for axis, whole, own in (("kv_heads", shape.kv_heads, tiles.heads), ("batches", shape.batch, tiles.batches)):
            while own == 1 and getattr(blocks, axis) < whole:
                larger = structs.replace(blocks, **{axis: min(whole, 2 * getattr(blocks, axis))})
                if tile_bytes(shape, larger) > min(target, budget):
                    break
                blocks = larger
        count = _count(shape, tiles, blocks)
        pairs = blocks.batches * blocks.kv_heads * shape.group * blocks.rows * blocks.keys
        found.append(_Size(blocks, count, count * (TILE_PAIRS + pairs)))
        if side >= max(shape.seq, shape.kv_seq):
            break
    return found


def _count(shape: ProblemSize, tiles: BlockList, blocks: Blocks) -> int:
    """Return about how many tiles are computed, with a second pass for dQ."""
    listed = _coarse_count(tiles, max(1, blocks.rows // tiles.block_q), max(1, blocks.keys // tiles.block_k))
    if tiles.heads > 1:  # at most; query heads that share a key head share tiles
        repeated = shape.batch if tiles.batches == 1 else 1
    else:
        batches = -(-shape.batch // blocks.batches) if tiles.batches == 1 else 1
        repeated = -(-shape.kv_heads // blocks.kv_heads) * batches
    split = -(-min(tiles.block_q, shape.seq) // blocks.rows) * -(-min(tiles.block_k, shape.kv_seq) // blocks.keys)
    passes = 2 if shape.training and not (blocks.sums_queries or blocks.keys >= shape.kv_seq) else 1
    return listed * repeated * passes * max(1, split)


def computed_share(tiles: BlockList, blocks: Blocks) -> float:
    """Return the share of the scores in tiles that are computed, roughly at the edges."""
    rows, keys = max(1, blocks.rows // tiles.block_q), max(1, blocks.keys // tiles.block_k)
    whole = tiles.batches * tiles.heads * -(-tiles.row_tiles // rows) * -(-tiles.key_tiles // keys)
    return _coarse_count(tiles, rows, keys) / whole


def _coarse_count(tiles: BlockList, rows: int, keys: int) -> int:
    """Return how many squares of rows x keys tiles have a listed one."""
    row_tiles, key_tiles = -(-tiles.row_tiles // rows), -(-tiles.key_tiles // keys)
    plane, row = np.divmod(tiles.row_of_entry(), tiles.row_tiles)
    seen = np.zeros(tiles.batches * tiles.heads * row_tiles * key_tiles, bool)
    seen[(plane * row_tiles + row // rows) * key_tiles + tiles.entries[:, 0] // keys] = True
    return int(np.count_nonzero(seen))


class TileMap:
    """The state of every tile of a call in blocks."""

    def __init__(self, pattern: Pattern, tiles: BlockList, blocks: Blocks) -> None:
        """Prepare the states; each row of tiles is computed when it is first needed."""
        self.pattern = pattern
        self._tiles = tiles
        self._keys = blocks.keys
        self._known: dict[tuple[int, ...], tuple[Array, Array]] = {}
        self._batch, _, self.seq, self.kv_seq = tiles.shape

    def key_blocks(self, batches: range, heads: range, rows: range) -> list[range]:
        """Return the blocks of keys of which a row of the heads sees any."""
        seen, _ = self._of_rows(batches, heads, rows)
        return [self._block(index) for index in np.flatnonzero(seen).tolist()]

    def sees(self, batches: range, heads: range, rows: range, keys: range) -> bool:
        """Return whether a pair of a tile is visible; the keys are one of the blocks."""
        return bool(self._of_rows(batches, heads, rows)[0][keys.start // self._keys])

    def tile(self, batches: range, heads: range, rows: range, keys: range) -> mx.array | None:
        """Return the mask of a tile: bool, broadcastable to (batches, heads, rows, keys); None if all is visible."""
        if self._of_rows(batches, heads, rows)[1][keys.start // self._keys]:
            return None
        # a batch mapped by vmap is a multiple of the mask's
        own = [index % self._batch for index in batches]
        return self.pattern.part((self.seq, self.kv_seq), own, heads, rows, keys)

    def _block(self, index: int) -> range:
        return range(index * self._keys, min((index + 1) * self._keys, self.kv_seq))

    def _of_rows(self, batches: range, heads: range, rows: range) -> tuple[Array, Array]:
        """Return for each block of keys whether any pair is visible, and whether all are."""
        tiles = self._tiles
        own_batches = sorted({index % self._batch for index in batches}) if tiles.batches > 1 else [0]
        own_heads = heads if tiles.heads > 1 else range(1)
        place = (own_batches[0], len(own_batches), own_heads.start, own_heads.stop, rows.start, rows.stop)
        if place not in self._known:
            planes = [b * tiles.heads + h for b in own_batches for h in own_heads]
            self._known[place] = self._states(planes, rows)
        return self._known[place]

    def _states(self, planes: list[int], rows: range) -> tuple[Array, Array]:
        tiles = self._tiles
        first, last = rows.start // tiles.block_q, -(-rows.stop // tiles.block_q)
        seen, full = np.zeros(tiles.key_tiles, np.int64), np.zeros(tiles.key_tiles, np.int64)
        for plane in planes:
            start, stop = (tiles.offsets[plane * tiles.row_tiles + at] for at in (first, last))
            key, index = tiles.entries[start:stop].T
            seen += np.bincount(key, minlength=tiles.key_tiles)
            full += np.bincount(key[index < 0], minlength=tiles.key_tiles)
        sums = [np.concatenate([[0], np.cumsum(x)]) for x in (seen, full)]
        blocks = np.arange(-(-self.kv_seq // self._keys))
        low = blocks * self._keys // tiles.block_k
        high = -(-np.minimum((blocks + 1) * self._keys, self.kv_seq) // tiles.block_k)
        visible, whole = (x[high] - x[low] for x in sums)
        return visible > 0, whole == (high - low) * (last - first) * len(planes)


@lru_cache(maxsize=16)
def tile_map(pattern: Pattern, shape: tuple[int, int, int, int], blocks: Blocks) -> TileMap:
    """Return the states of a call's tiles, kept for the last few calls."""
    return TileMap(pattern, pattern.block_list(shape), blocks)
