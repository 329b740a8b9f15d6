"""Static tile schedule: a dynamic scheduler simulated on the host, once per shape."""

import bisect
import functools
import heapq
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]

L2_BYTES: Final = 32 * 2**20
"""Budget for the keys and values of heads in flight, of the H200's 60 MB of L2."""
TILE_OVERHEAD: Final = 1.2
"""Prologue and epilogue of a tile, in key tiles (from timings of short against long sequences)."""
MAX_SHARES: Final = 8
"""Maximum number of blocks per split tile, on average."""
MAX_PARTS: Final = 15
"""Most parts of a tile, see `part_word`."""

Piece = tuple[int, int, int, int]
"""Tile index over all planes, first and end key tile, and part (see `part_word`)."""
Work = tuple[int, ...]
"""Plane, query tile, first and end key tile, part (see `part_word`); zero-padded to 32 bytes."""
NO_WORK: Final[Work] = (-1, 0, 0, 0, 0, 0, 0, 0)


@functools.lru_cache(maxsize=256)
def make_schedule(blocks: int, planes: int, costs: tuple[int, ...], plane_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Return a table (rounds x blocks) of tile indices, plane * len(costs) + tile of the plane; -1 ends a block's list.

    `costs` are the key tiles of each query tile of a plane, `plane_bytes` the size of a plane's keys and values. Planes
    are processed in groups whose keys and values fit in the L2 cache. Within a group, tiles are assigned longest first,
    each to the block that is free first. Several group sizes are simulated, and the smallest makespan is chosen.
    """
    if len(set(costs)) == 1:
        sizes = [1]  # uniform tiles need no balancing: one plane at a time
    else:
        largest = max(1, min(planes, L2_BYTES // max(1, plane_bytes)))
        sizes = sorted({largest - largest * i // 12 for i in range(7)}, reverse=True)
    _, lists = min((_simulate(blocks, planes, costs, size) for size in sizes), key=lambda plan: plan[0])
    rounds = max(map(len, lists)) + 1
    return tuple(tuple(tiles[i] if i < len(tiles) else -1 for tiles in lists) for i in range(rounds))


def _simulate(blocks: int, planes: int, costs: tuple[int, ...], group: int) -> tuple[float, list[list[int]]]:
    """Simulate the schedule for one group size; return the makespan and the tiles of each block."""
    longest_first = sorted(range(len(costs)), key=lambda tile: -costs[tile])
    free = [(0.0, block) for block in range(blocks)]
    lists: list[list[int]] = [[] for _ in range(blocks)]
    for first in range(0, planes, group):
        for tile in longest_first:
            for plane in range(first, min(first + group, planes)):
                time, block = free[0]
                lists[block].append(plane * len(costs) + tile)
                heapq.heapreplace(free, (time + costs[tile] + TILE_OVERHEAD, block))
    return max(time for time, _ in free), lists


@functools.lru_cache(maxsize=256)
def make_work_items(
    blocks: int, planes: int, ranges: tuple[tuple[int, int], ...], plane_bytes: int, joining: float
) -> tuple[tuple[tuple[Work, ...], ...], int]:
    """Return the table of work items of the forward kernel (blocks x rounds), and the number of tile parts in it.

    If all tiles cost the same and the last round is not full, the tiles of that round are split along their keys.

    Args:
        blocks: concurrent blocks; fewer are used if there is less work.
        planes: planes of queries.
        ranges: half-open range of key tiles of each query tile of a plane.
        plane_bytes: size of a plane's keys and values.
        joining: cost of combining the parts of a tile, in key tiles.
    """
    tiles = planes * len(ranges)
    if len(set(ranges)) == 1:
        lists, parts = _distribute(blocks, tiles, ranges[0], joining)
        if parts:
            return _table(lists, len(ranges)), parts
    columns = zip(*make_schedule(min(blocks, tiles), planes, tuple(map(_cost, ranges)), plane_bytes), strict=True)
    lists = [[(tile, *ranges[tile % len(ranges)], 0) for tile in column if tile >= 0] for column in columns]
    return _table(lists, len(ranges)), 0


def list_work_items(
    blocks: int, offsets: Ints, planes: Ints, tiles: int, plane_bytes: int, joining: float
) -> tuple[NDArray[np.int32], int]:
    """Return the table of work items of block lists (blocks x rounds x 8), and the number of tile parts in it.

    Work items are ranges of entries. Planes are processed in groups whose keys and values fit in the L2 cache; within a
    group the longest work items come first, each assigned to the block that is free first. Lists longer than a block's
    share, or those of the last round, are split into parts if that ends earlier.

    Args:
        blocks: concurrent blocks; fewer are used if there is less work.
        offsets: first entry of each list, and the end of the last.
        planes: plane of the lists for each plane of queries.
        tiles: query tiles per plane.
        plane_bytes: size of a plane's keys and values.
        joining: cost of combining the parts of a tile, in key tiles.
    """
    lists = (planes[:, None] * tiles + np.arange(tiles)).ravel()
    first, cost = offsets[lists].astype(np.int64), np.diff(offsets).astype(np.int64)[lists]
    plane, tile = np.divmod(np.arange(len(lists)), tiles)
    order = np.lexsort((plane, tile, -cost, plane // max(1, L2_BYTES // max(1, plane_bytes))))
    plane, tile, first, cost = plane[order], tile[order], first[order], cost[order]
    counts = [np.ones(len(order), np.int64)]
    share = max(3 * joining, float(cost.sum()) / blocks + joining)
    if cost.max() > share:
        counts.append(np.minimum(np.ceil(cost / share).astype(np.int64).clip(1), MAX_PARTS))
    left = len(order) % blocks
    if left and cost[-left:].min() > 3 * joining:
        counts.append(np.where(np.arange(len(order)) < len(order) - left, 1, min(MAX_PARTS, blocks // left)))
    owner, index, block = min((_assign(blocks, cost, count, joining) for count in counts), key=lambda made: made[0])[1:]
    return _list_table((plane, tile, first, cost), owner, index, block)


def list_schedule(blocks: int, offsets: Ints, planes: Ints, tiles: int, plane_bytes: int) -> NDArray[np.int32]:
    """Return the table of the backward kernel (rounds x 2 x blocks): key tile over all planes, or -1, and its steps.

    Args:
        blocks: concurrent blocks; fewer are used if there is less work.
        offsets: first entry of each list by key tile, and the end of the last.
        planes: planes of the lists for each key plane, one for each query head of it.
        tiles: key tiles per plane.
        plane_bytes: size of what the query planes of a key plane keep in the L2 cache.
    """
    steps = np.diff(offsets).astype(np.int64).reshape(-1, tiles)[planes].sum(axis=1).ravel()
    plane, tile = np.divmod(np.arange(len(steps)), tiles)
    order = np.lexsort((plane, tile, -steps, plane // max(1, L2_BYTES // max(1, plane_bytes))))
    block, _ = _by_load(min(blocks, len(order)), steps[order] + TILE_OVERHEAD)
    by_block, place = _places(block)
    table = np.zeros((int(place.max()) + 2, 2, int(block.max()) + 1), np.int32)
    table[:, 0] = NO_WORK[0]
    table[place, :, block[by_block]] = np.stack([order, steps[order]], axis=1)[by_block]
    return table


def _places(block: Ints) -> tuple[Ints, Ints]:
    """Return the order of the work items by block, and the position of each in its block's list."""
    per_block = np.bincount(block)
    place = np.arange(len(block)) - np.repeat(np.cumsum(per_block) - per_block, per_block)
    return np.argsort(block, kind="stable"), place


def _assign(blocks: int, cost: Ints, counts: Ints, joining: float) -> tuple[float, Ints, Ints, Ints]:
    """Return the makespan of work items in `counts` parts, and of each part its work item, its index and its block."""
    owner = np.repeat(np.arange(len(cost)), counts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    costs = cost[owner] / counts[owner] + TILE_OVERHEAD + joining * (counts[owner] > 1)
    block, makespan = _by_load(min(blocks, len(owner)), costs)
    return makespan, owner, index, block


def _list_table(items: tuple[Ints, ...], owner: Ints, index: Ints, block: Ints) -> tuple[NDArray[np.int32], int]:
    """Return the table of work items (plane, tile, first entry, entries) in parts, and the number of parts."""
    plane, tile, first, cost = (column[owner] for column in items)
    counts = np.bincount(owner)
    several = np.where(counts > 1, counts, 0)
    count, earlier = counts[owner], (np.cumsum(several) - several)[owner]
    word = np.where(count > 1, part_word(earlier, count, index), 0)
    columns = (plane, tile, first + cost * index // count, first + cost * (index + 1) // count, word)
    by_block, place = _places(block)
    table = np.zeros((int(block.max()) + 1, int(place.max()) + 2, len(NO_WORK)), np.int32)
    table[:, :, 0] = NO_WORK[0]
    table[block[by_block], place, : len(columns)] = np.stack(columns, axis=1)[by_block]
    return table, int(several.sum())


def _by_load(blocks: int, costs: NDArray[np.float64]) -> tuple[Ints, float]:
    """Assign work items in order, each to a block with little load, many at once; return the blocks and the makespan.

    A block takes part in a round if its load does not exceed the least by more than the next work item's cost.
    """
    made, loads, done = np.empty(len(costs), np.int64), np.zeros(blocks), 0
    while done < len(costs):
        free = np.argsort(loads, kind="stable")
        free = free[loads[free] <= loads[free[0]] + costs[done]][: len(costs) - done]
        made[done : done + len(free)] = free
        loads[free] += costs[done : done + len(free)]
        done += len(free)
    return made, float(loads.max())


def _cost(keys: tuple[int, int]) -> int:
    return max(0, keys[1] - keys[0])


def _table(lists: list[list[Piece]], row_blocks: int) -> tuple[tuple[Work, ...], ...]:
    rounds = max(map(len, lists)) + 1
    return tuple(
        tuple((tile // row_blocks, tile % row_blocks, *rest, 0, 0, 0) for tile, *rest in pieces)
        + (NO_WORK,) * (rounds - len(pieces))
        for pieces in lists
    )


def _distribute(blocks: int, tiles: int, keys: tuple[int, int], joining: float) -> tuple[list[list[Piece]], int]:
    """Assign equal tiles in whole rounds and split the remaining ones; no parts if splitting is not faster."""
    whole, left = divmod(tiles, blocks)
    if not left or _cost(keys) < 2:
        return [], 0
    sharing = min(blocks, MAX_SHARES * left)
    pieces, parts = _cut_evenly(sharing, whole * blocks, left, keys)
    longest = max(sum(end - first + TILE_OVERHEAD for _, first, end, _ in own) for own in pieces.values())
    if longest + joining >= _cost(keys) + TILE_OVERHEAD:
        return [], 0
    used = blocks if whole else sharing
    rounds = [[(turn * blocks + block, *keys, 0) for turn in range(whole)] for block in range(used)]
    return [items + pieces.get(block, []) for block, items in enumerate(rounds)], parts


def tile_ranges(
    queries: int, keys: int, tile: tuple[int, int], causal: bool, window: int | None, position: Callable[[int], int]
) -> tuple[tuple[int, int], ...]:
    """Return the half-open range of key tiles of each query tile.

    Args:
        queries: rows of the query.
        keys: rows of the key.
        tile: queries and keys of a tile.
        causal: whether a row sees no later keys.
        window: keys that a row sees; None if all.
        position: of a row among the keys.
    """
    rows, columns = tile
    ranges = []
    for first in range(0, queries, rows):
        last = min(queries, first + rows) - 1
        last_key = min(keys, max(0, position(last) + 1)) if causal else keys
        first_key = 0 if window is None else max(0, position(first) + 1 - window)
        ranges.append((first_key // columns, -(-last_key // columns)))
    return tuple(ranges)


def makespan(blocks: int, planes: int, ranges: tuple[tuple[int, int], ...], joining: float) -> float:
    """Return the estimated makespan in key tiles."""
    costs = [_cost(keys) + TILE_OVERHEAD for keys in ranges]
    if len(set(ranges)) > 1:
        return max(*costs, planes * sum(costs) / blocks)
    whole, left = divmod(planes * len(ranges), blocks)
    shared = left * _cost(ranges[0]) / min(blocks, MAX_SHARES * max(1, left)) + 2 * TILE_OVERHEAD + joining
    return whole * costs[0] + (min(costs[0], shared) if left else 0.0)


def part_word(first: Any, count: Any, index: Any) -> Any:
    """Encode a part for join.cuh: the number of parts of all earlier tiles, the parts of this tile, and its index."""
    return first << 8 | count << 4 | index


def _cut_evenly(blocks: int, first_tile: int, tiles: int, keys: tuple[int, int]) -> tuple[dict[int, list[Piece]], int]:
    """Concatenate the keys of `tiles` tiles and cut them into equal shares; return pieces per block, and part count."""
    first, end = keys
    cost = end - first
    cuts = [_without_slivers(tiles * cost * block // blocks, cost) for block in range(blocks + 1)]
    pieces: dict[int, list[Piece]] = {}
    parts = 0
    for tile in range(tiles):
        bounds = sorted({tile * cost, (tile + 1) * cost, *(c for c in cuts if tile * cost < c < (tile + 1) * cost)})
        count = len(bounds) - 1
        for index in range(count):
            start = bounds[index]
            owner = bisect.bisect_right(cuts, start, hi=blocks) - 1
            word = part_word(parts, count, index) if count > 1 else 0
            work = (first_tile + tile, first + start - tile * cost, first + bounds[index + 1] - tile * cost, word)
            pieces.setdefault(owner, []).append(work)
        parts += count if count > 1 else 0
    return pieces, parts


def _without_slivers(cut: int, cost: int) -> int:
    """Move a cut that is one key tile from a tile boundary onto the boundary."""
    beyond = cut % cost
    if cost > 2 and beyond == 1:
        return cut - 1
    return cut + 1 if cost > 2 and beyond == cost - 1 else cut
