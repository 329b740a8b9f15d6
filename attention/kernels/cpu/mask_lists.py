"""The part of the compiled library that makes block lists of masks."""

from types import ModuleType

import numpy as np

from attention.masks import block_list as lists
from attention.masks.tiles import Array, Grid


class Builder:
    """Makes lists by a module that has the part `lists`."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def of_blocks(self, blocks: lists.BlockFlags, grid: Grid) -> tuple[Array, Array]:
        """Return offsets and entries of whole blocks."""
        flags = np.ascontiguousarray(blocks.flags)
        planes, (rows, width) = flags.shape[0] * flags.shape[1], flags.shape[2:]
        tall, wide = blocks.tall, blocks.wide
        fits = (
            flags.dtype == bool
            and 0 <= rows * tall - grid.row_tiles < tall
            and 0 <= width * wide - grid.key_tiles < wide
        )
        if not fits:
            raise ValueError(f"blocks: got {flags.dtype} {flags.shape} of {tall} x {wide} tiles for {grid}")
        given = (flags.ctypes.data, (planes, rows, width), (tall, wide), (grid.row_tiles, grid.key_tiles))
        offsets = np.empty(planes * grid.row_tiles + 1, np.int32)
        self._module.count_blocks(*given, offsets.ctypes.data)
        entries = np.empty((int(offsets[-1]), 2), np.int32)
        self._module.list_blocks(*given, offsets.ctypes.data, entries.ctypes.data)
        return offsets, entries

    def of_intervals(self, low: Array, high: Array, grid: Grid) -> tuple[Array, Array, Array, int]:
        """Return offsets, entries, bits and the number of visible pairs of rows that see the keys [low, high)."""
        for ends in (low, high):
            if ends.dtype != np.int32 or ends.shape != (len(low), grid.seq) or not ends.flags.c_contiguous:
                raise ValueError(f"intervals: got {ends.dtype} {ends.shape} for {grid}")
        made = self._module.list_intervals(
            low.ctypes.data, high.ctypes.data, (*low.shape, grid.kv_seq), (grid.block_q, grid.block_k)
        )
        offsets, entries, bits = (
            np.frombuffer(data, kind) for data, kind in zip(made, (np.int32, np.int32, np.uint32), strict=False)
        )
        return offsets, entries.reshape(-1, 2), bits.reshape(-1, grid.block_q, grid.words), made[3]
