"""The tile schedule of the Hopper forward kernel; needs no GPU."""

from collections import Counter, defaultdict

import pytest

from attention.kernels.cuda.sm90.forward import specialise
from attention.kernels.cuda.sm90.schedule import NO_WORK, make_work_items

BLOCKS = 132
SHAPES = [  # planes, queries, keys
    (64, 2048, 2048),
    (16, 8192, 8192),
    (3, 500, 377),
    (8, 512, 512),
    (1, 64, 70000),
    (32, 77, 900),
    (1, 1, 1),
    (200, 300, 31),
]


def work_items_of(dim, causal, window, planes, queries, keys):
    kernel = specialise(dim, causal, "bf16", window=window > 0)
    ranges = kernel.tile_ranges(queries, keys, window)
    return make_work_items(BLOCKS, planes, ranges, 4 * keys * dim, 2.0), ranges


def parts(word):
    """Return, as join.cuh reads them, the parts before a tile, their number for the tile, and which they are."""
    return word >> 8, word >> 4 & 15, word & 15


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 100)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_key_that_a_tile_needs_is_some_blocks_work_once(dim, causal, window, shape):
    (table, _), ranges = work_items_of(dim, causal, window, *shape)
    items = [work for row in table for work in row if work[0] >= 0]
    covered = Counter((plane, tile, n) for plane, tile, first, end, *_ in items for n in range(first, end))
    needed = {(plane, i, n) for plane in range(shape[0]) for i, keys in enumerate(ranges) for n in range(*keys)}
    assert set(covered) == needed
    assert set(covered.values()) <= {1}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_is_listed_and_every_list_ends(shape):
    (table, _), ranges = work_items_of(64, True, 0, *shape)
    tiles = {work[:2] for row in table for work in row if work[0] >= 0}
    assert tiles == {(plane, tile) for plane in range(shape[0]) for tile in range(len(ranges))}
    assert all(row[-1] == NO_WORK for row in table)
    assert 0 < len(table) <= BLOCKS


@pytest.mark.parametrize("shape", [(64, 2048, 2048), (16, 8192, 8192), (1, 64, 70000), (128, 4096, 4096)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_end_together_where_all_tiles_cost_the_same(dim, shape):
    (table, count), _ = work_items_of(dim, False, 0, *shape)
    loads = [sum(end - first for _, _, first, end, *_ in row) for row in table]
    pieces = [sum(1 for work in row if work[4]) for row in table]
    assert max(loads) <= 1.01 * min(loads) + 2
    assert max(pieces) <= 2
    assert count


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_a_tile_know_each_other(shape):
    (table, count), _ = work_items_of(128, False, 0, *shape)
    by_tile = defaultdict(list)
    for row in table:
        for plane, tile, _, _, word, *_ in row:
            if word:
                by_tile[plane, tile].append(parts(word))
    for found in by_tile.values():
        assert len({(first, of) for first, of, _ in found}) == 1
        assert sorted(index for *_, index in found) == list(range(found[0][1]))
    places = sorted(first + index for found in by_tile.values() for first, _, index in found)
    assert places == list(range(count))
