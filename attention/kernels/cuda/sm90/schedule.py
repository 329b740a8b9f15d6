"""Static tile schedule: a dynamic scheduler simulated on the host, once per shape."""

import bisect
import functools
import heapq
from typing import Final

L2_BYTES: Final = 32 * 2**20
"""Budget for the keys and values of heads in flight, of the H200's 60 MB of L2."""
TILE_OVERHEAD: Final = 1.2
"""Prologue and epilogue of a tile, in key tiles (from timings of short against long sequences)."""
MAX_SHARES: Final = 8
"""Maximum number of blocks per split tile, on average."""

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
def make_works(
    blocks: int, planes: int, ranges: tuple[tuple[int, int], ...], plane_bytes: int, joining: float
) -> tuple[tuple[tuple[Work, ...], ...], int]:
    """Return the work table of the forward kernel (blocks x rounds), and the number of tile parts in it.

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
    return [works + pieces.get(block, []) for block, works in enumerate(rounds)], parts


def makespan(blocks: int, planes: int, ranges: tuple[tuple[int, int], ...], joining: float) -> float:
    """Return the estimated makespan in key tiles."""
    costs = [_cost(keys) + TILE_OVERHEAD for keys in ranges]
    if len(set(ranges)) > 1:
        return max(*costs, planes * sum(costs) / blocks)
    whole, left = divmod(planes * len(ranges), blocks)
    shared = left * _cost(ranges[0]) / min(blocks, MAX_SHARES * max(1, left)) + 2 * TILE_OVERHEAD + joining
    return whole * costs[0] + (min(costs[0], shared) if left else 0.0)


def part_word(first: int, count: int, index: int) -> int:
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
