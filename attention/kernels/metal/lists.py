"""Block lists as the kernels read them."""

from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention.kernels.metal.call import CallShape
from attention.kernels.metal.tiles import LIST_KEYS, LIST_QUERIES
from attention.masks import BlockList, Pattern

MIN_DEVICE_ELEMENTS: Final = 8
"""Minimum number of elements for which MLX passes an array as device memory."""
RECORD: Final = 8
"""Elements of a record of `ListArrays.lists`, of which five are used: each array is at least `MIN_DEVICE_ELEMENTS`."""
BITS: Final = 32
"""Bits of a word."""
FULL: Final = -1
"""In place of a tile of bits: all pairs are visible."""
ABSENT: Final = -2
Ints = NDArray[np.int32]


class ListArrays(NamedTuple):
    """The lists of a pattern for rows (forward and dQ) and for keys (dK and dV)."""

    lists: mx.array
    """int32 (batches, heads, row tiles, 8): for each list, where its entries begin and end; for the i-th threadgroup,
    longest lists first, its batch, head and tile."""
    entries: mx.array
    """int32 (n, 2): key tile, and tile of bits or -1 if all pairs are visible."""
    bits: mx.array
    """uint32 (m, queries of a tile, keys of a tile / 32)."""
    key_lists: mx.array
    """int32 (batches, heads, key tiles, 8): as `lists`, but scheduled are key heads, each with several lists."""
    key_entries: mx.array
    """int32 (n, 2): row tile, and tile of bits or -1."""


def list_arrays(lists: BlockList, group: int) -> ListArrays:
    """Return the arrays of block lists, made once; `group` is the number of query heads per key head."""
    return lists.derived(("metal", group), lambda lists: _list_arrays(lists, group))


def _list_arrays(lists: BlockList, group: int) -> ListArrays:
    turned = lists.transposed()
    shape = (lists.batches, lists.heads)
    return ListArrays(
        mx.array(_records(lists.offsets, (*shape, lists.row_tiles), 1)),
        _at_least_device(lists.entries),
        lists.device_bits(),
        mx.array(_records(turned.offsets, (*shape, lists.key_tiles), group)),
        _at_least_device(turned.entries),
    )


def lists_of_pattern(pattern: Pattern, shape: CallShape) -> ListArrays:
    """Return the block lists of a pattern for a call, made once.

    Raises:
        UsageError: the pattern does not fit the shape.
    """
    whole = (shape.batch, shape.heads, shape.queries, shape.keys)
    return list_arrays(pattern.block_list(whole, LIST_QUERIES, LIST_KEYS), shape.group)


def visible_pairs(lists: mx.array, entries: mx.array, bits: mx.array, queries: int, keys: int) -> mx.array:
    """Return the visible pairs as bool (batches, heads, queries, keys); arrays as in `ListArrays`."""
    batches, heads, tiles = lists.shape[:3]
    of_queries, words = bits.shape[1:]
    key_tiles = -(-keys // (BITS * words))
    planes = batches * heads * tiles
    begins, end = lists[..., 0].reshape(-1), lists[..., 1].reshape(-1)[-1]
    number = mx.arange(entries.shape[0])
    owner = mx.zeros(entries.shape[0] + 1, mx.int32).at[begins].add(1).cumsum()[:-1] - 1
    place = mx.where(number < end, owner * key_tiles + entries[:, 0], planes * key_tiles)  # the last is for padding
    tile_bits = mx.full(planes * key_tiles + 1, ABSENT, dtype=mx.int32)
    tile_bits[place] = entries[:, 1]
    tile_bits = tile_bits[:-1]
    shifts = mx.arange(BITS, dtype=mx.uint32)
    pairs = (bits[mx.maximum(tile_bits, 0)][..., None] >> shifts & 1).astype(mx.bool_)
    pairs = (pairs | (tile_bits == FULL)[:, None, None, None]) & (tile_bits != ABSENT)[:, None, None, None]
    pairs = pairs.reshape(batches, heads, tiles, key_tiles, of_queries, BITS * words).swapaxes(3, 4)
    return pairs.reshape(batches, heads, tiles * of_queries, -1)[:, :, :queries, :keys]


def _records(offsets: NDArray[Any], shape: tuple[int, int, int], group: int) -> Ints:
    """Return the records of lists (batches, heads, tiles); a threadgroup iterates over the lists of `group` heads."""
    batches, heads, tiles = shape
    scheduled = max(1, heads // group)
    made = np.zeros((batches * heads * tiles, RECORD), np.int32)
    made[:, 0], made[:, 1] = offsets[:-1], offsets[1:]
    lengths = np.diff(offsets).reshape(batches, scheduled, -1, tiles).sum(axis=2).reshape(-1)
    order = np.argsort(-lengths, kind="stable")
    made[: order.size, 2:5] = np.stack(np.unravel_index(order, (batches, scheduled, tiles)), axis=-1)
    return made.reshape(*shape, RECORD)


def _at_least_device(entries: NDArray[Any]) -> mx.array:
    missing = max(0, MIN_DEVICE_ELEMENTS // 2 - len(entries))
    return mx.array(np.pad(entries, ((0, missing), (0, 0))))
