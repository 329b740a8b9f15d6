"""The table of tiles and its arithmetic."""

from pathlib import Path

import pytest

from attention.kernels import metal
from attention.kernels.metal.call import CallParams, CallShape
from attention.kernels.metal.tiles import HEAD_DIMS, KINDS, SIZES, table, tile_of
from benchmarks.metal.traffic import traffic

README = Path(metal.__file__).parents[3] / "docs" / "kernels" / "metal.md"
ALL = [(kind, head_dim, dtype) for kind in KINDS for head_dim in HEAD_DIMS for dtype in SIZES]


@pytest.mark.parametrize(("kind", "head_dim", "dtype"), ALL)
def test_every_tile_fits_and_is_whole(kind, head_dim, dtype):
    for rows in (1, 9, 32) if kind == "decode" else (0,):
        tile = tile_of(kind, head_dim, dtype, rows)
        assert tile.threadgroup_bytes <= 32768
        assert tile.threads <= 1024
        assert head_dim % tile.chunk == 0
        assert tile.chunk % 8 == tile.block_q % 8 == tile.block_k % 8 == 0


def test_the_arithmetic_of_one_tile_is_that_of_the_algorithm():
    tile = tile_of("forward", 64, "float16")
    assert (tile.block_q, tile.block_k, tile.threads) == (32, 32, 128)
    assert tile.threadgroup_bytes == (32 + 32) * (64 + 8) * 2
    assert tile.flops_per_tile == 4 * 32 * 32 * 64
    assert tile.bytes_per_tile == 2 * 32 * 64 * 2
    assert tile.registers == 2 * (64 // 8 + 32 // 8 + 2) + 32  # O, S, and two operands, two elements a lane; the rest
    assert tile_of("backward_query", 64, "float16").flops_per_tile == 6 * 32 * 32 * 64
    assert tile_of("backward_key", 64, "float16").flops_per_tile == 8 * 32 * 32 * 64


def test_the_arithmetic_of_a_whole_call_is_that_of_its_tiles():
    shape, call = CallShape(2, 4, 2, 128, 256, 64, "float16"), CallParams(0.1)
    tile, found = tile_of("forward", 64, "float16"), traffic("forward", shape, call)
    tiles = 2 * 4 * (128 // 32) * (256 // 32)
    assert found.flops == tiles * tile.flops_per_tile
    assert 2 * (found.reads["k"] + found.reads["v"]) == tiles * tile.bytes_per_tile


def test_causal_tiles_above_the_diagonal_are_skipped():
    shape = CallShape(1, 1, 1, 256, 256, 64, "float16")
    for kind in ("forward", "backward_query", "backward_key"):
        tile = tile_of(kind, 64, "float16")
        of_blocks = tile.products_per_block * (256 // tile.block_q)
        full, causal = (traffic(kind, shape, CallParams(0.1, causal=c)).products - of_blocks for c in (False, True))
        assert causal / full == (1 + 1 / 8) / 2


def test_the_readme_shows_the_table_as_it_is():
    assert table() in README.read_text()
