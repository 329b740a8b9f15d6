"""Which block computes which tiles: a dynamic scheduler, played on the host once for each shape."""

import bisect
import functools
import heapq
from typing import Final

L2_BYTES: Final = 32 * 2**20
"""What the keys and values of heads in flight may take, of the H200's 60 MB."""
TILE_OVERHEAD: Final = 1.2
"""Start and end of a tile, in tiles of keys (from timings of short against long sequences)."""
MOST_SHARES: Final = 8
"""Blocks that share a tile, on average, at most."""

Piece = tuple[int, int, int, int]
"""Tile of all planes, the tiles of keys from and to, and the part (see `part_word`)."""
Work = tuple[int, ...]
"""Plane, tile of its queries, the tiles of keys from and to, the part (see `part_word`); and zeros up to 32 bytes."""
NO_WORK: Final[Work] = (-1, 0, 0, 0, 0, 0, 0, 0)


@functools.lru_cache(maxsize=256)
def make_schedule(blocks: int, planes: int, costs: tuple[int, ...], plane_bytes: int) -> tuple[tuple[int, ...], ...]:
    """A table (rounds x blocks) of tile numbers, plane * len(costs) + tile of the plane; -1 ends a block's list.

    `costs` are the key blocks of each tile of a plane, `plane_bytes` the size of a plane's keys and values. Planes are
    taken in groups whose keys and values fit in the L2 cache; in a group long tiles go first; each tile goes to the
    block that is free first. Of the larger groups that fit, the one that ends first is taken.
    """
    if len(set(costs)) == 1:
        sizes = [1]  # nothing to balance: head after head
    else:
        largest = max(1, min(planes, L2_BYTES // max(1, plane_bytes)))
        sizes = sorted({largest - largest * i // 12 for i in range(7)}, reverse=True)
    _, lists = min((_play(blocks, planes, costs, size) for size in sizes), key=lambda plan: plan[0])
    rounds = max(map(len, lists)) + 1
    return tuple(tuple(tiles[i] if i < len(tiles) else -1 for tiles in lists) for i in range(rounds))


def _play(blocks: int, planes: int, costs: tuple[int, ...], group: int) -> tuple[float, list[list[int]]]:
    """When the last block ends, and the tiles of each block, for one group size."""
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
    """The forward kernel's table (blocks x rounds), and how many parts of tiles there are in it.

    If all tiles cost the same, and do not fill the last round well, its tiles are dealt out by their keys.

    Args:
        blocks: that run at once; fewer are made if there is less to do.
        planes: of queries.
        ranges: the tiles of keys of each tile of a plane, from and to.
        plane_bytes: the size of a plane's keys and values.
        joining: what it takes to add up the parts of tiles, in tiles of keys.
    """
    tiles = planes * len(ranges)
    if len(set(ranges)) == 1:
        lists, parts = _deal_out(blocks, tiles, ranges[0], joining)
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


def _deal_out(blocks: int, tiles: int, keys: tuple[int, int], joining: float) -> tuple[list[list[Piece]], int]:
    """Equal tiles: whole rounds, and the rest cut into pieces. No parts, if that would end no sooner."""
    whole, left = divmod(tiles, blocks)
    if not left or _cost(keys) < 2:
        return [], 0
    sharing = min(blocks, MOST_SHARES * left)
    pieces, parts = _cut(sharing, whole * blocks, left, keys)
    longest = max(sum(end - first + TILE_OVERHEAD for _, first, end, _ in own) for own in pieces.values())
    if longest + joining >= _cost(keys) + TILE_OVERHEAD:
        return [], 0
    used = blocks if whole else sharing
    rounds = [[(turn * blocks + block, *keys, 0) for turn in range(whole)] for block in range(used)]
    return [works + pieces.get(block, []) for block, works in enumerate(rounds)], parts


def makespan(blocks: int, planes: int, ranges: tuple[tuple[int, int], ...], joining: float) -> float:
    """About when the last block ends, in tiles of keys."""
    costs = [_cost(keys) + TILE_OVERHEAD for keys in ranges]
    if len(set(ranges)) > 1:
        return max(*costs, planes * sum(costs) / blocks)
    whole, left = divmod(planes * len(ranges), blocks)
    shared = left * _cost(ranges[0]) / min(blocks, MOST_SHARES * max(1, left)) + 2 * TILE_OVERHEAD + joining
    return whole * costs[0] + (min(costs[0], shared) if left else 0.0)


def part_word(first: int, count: int, index: int) -> int:
    """A part as join.cuh reads it: the parts of all tiles before, how many this tile has, and which of them it is."""
    return first << 8 | count << 4 | index


def _cut(blocks: int, first_tile: int, tiles: int, keys: tuple[int, int]) -> tuple[dict[int, list[Piece]], int]:
    """The keys of some tiles, laid end to end and cut into equal shares: the blocks' pieces, and how many are parts."""
    first, end = keys
    cost = end - first
    cuts = [_smoothed(tiles * cost * block // blocks, cost) for block in range(blocks + 1)]
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


def _smoothed(cut: int, cost: int) -> int:
    """A cut moved to the end of a tile that it would leave a sliver of."""
    beyond = cut % cost
    if cost > 2 and beyond == 1:
        return cut - 1
    return cut + 1 if cost > 2 and beyond == cost - 1 else cut
