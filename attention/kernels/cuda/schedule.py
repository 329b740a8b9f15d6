"""Which block computes which tiles: a dynamic scheduler, played on the host once for each shape."""

import functools
import heapq
from typing import Final

L2_BYTES: Final = 32 * 2**20
"""What the keys and values of heads in flight may take, of the H200's 60 MB."""
TILE_OVERHEAD: Final = 1.2
"""Start and end of a tile, in tiles of keys (from timings of short against long sequences)."""


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
