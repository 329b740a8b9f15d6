"""A part of a mask: some of its rows against some of its keys, such as one rank's share."""

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from attention.masks import block_list as lists
from attention.masks.block_list import BlockList
from attention.masks.pattern import Lengths, Pattern, Shape
from attention.masks.tiles import Array, Grid, Tiles, packed

if TYPE_CHECKING:
    import mlx.core as mx

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
