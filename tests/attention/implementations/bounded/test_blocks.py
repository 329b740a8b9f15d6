"""Block sizes: pure arithmetic, for any shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.implementations.bounded.blocks import (
    GRAPH_BYTES,
    MAX_GRAPH_BYTES,
    MAX_TINY_TILES,
    MIB,
    TINY_BYTES,
    Blocks,
    ProblemSize,
    choose_blocks,
    is_affordable,
    tile_bytes,
    visible_tiles,
)
from attention.masks import Mask

shapes = st.builds(
    ProblemSize,
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 64),
    group=st.integers(1, 16),
    seq=st.integers(1, 200_000),
    kv_seq=st.integers(1, 2_000_000),
    head_dim=st.integers(1, 512),
    value_dim=st.integers(1, 512),
    score_bytes=st.sampled_from([28, 44]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 10_000),
    training=st.booleans(),
)
budgets = st.integers(1, 1024 * MIB)
SMALLEST = Blocks(batches=1, kv_heads=1, rows=1, keys=1)


@given(shapes, budgets)
def test_a_tile_fits_its_budget_wherever_any_tile_can(shape: ProblemSize, budget: int) -> None:
    blocks = choose_blocks(shape, budget)
    kept = max(budget, tile_bytes(shape, SMALLEST), TINY_BYTES)
    if tile_bytes(shape, blocks) > kept:  # only where smaller tiles would be too many
        smaller = choose_blocks(shape, tile_bytes(shape, blocks) // 2)
        assert tile_bytes(shape, smaller) > kept / 2
        assert visible_tiles(shape, blocks) * 4 * GRAPH_BYTES > MAX_GRAPH_BYTES


@pytest.mark.slow
@given(shapes, budgets)
def test_tiles_and_their_graph_take_about_as_much_memory(shape: ProblemSize, budget: int) -> None:
    blocks = choose_blocks(shape, budget)
    count = visible_tiles(shape, blocks)
    assert is_affordable(count, max(budget, tile_bytes(shape, blocks) * 2))


def test_long_contexts_take_few_thousand_tiles() -> None:
    size = 262_144
    for training, score_bytes, most in ((False, 32, 4096), (True, 80, 8192)):
        shape = ProblemSize(
            batch=1,
            kv_heads=1,
            group=1,
            seq=size,
            kv_seq=size,
            head_dim=128,
            value_dim=128,
            score_bytes=score_bytes,
            causal=True,
            training=training,
        )
        blocks = choose_blocks(shape, 256 * MIB, 32 * MIB)
        assert visible_tiles(shape, blocks) <= most
        assert tile_bytes(shape, blocks) <= 640 * MIB


@pytest.mark.thorough
@given(shapes, budgets)
def test_tiles_are_counted_as_they_are_computed(shape: ProblemSize, budget: int) -> None:
    blocks = choose_blocks(shape, budget)
    mask, counted = Mask(causal=shape.causal, window=shape.window), 0
    for start in range(0, shape.seq, blocks.rows):
        rows = range(start, min(start + blocks.rows, shape.seq))
        counted += -(-len(mask.visible_keys(rows, shape.seq, shape.kv_seq)) // blocks.keys)
    passes = 2 if shape.training and not blocks.sums_queries and blocks.keys < shape.kv_seq else 1
    counted *= passes * -(-shape.batch // blocks.batches) * -(-shape.kv_heads // blocks.kv_heads)
    assert counted / 1.3 - 64 <= visible_tiles(shape, blocks) <= counted * 1.3 + 64


def test_a_tiny_budget_does_not_make_thousands_of_tiles() -> None:
    shape = ProblemSize(batch=3, kv_heads=2, group=8, seq=220, kv_seq=300, head_dim=32, value_dim=32, score_bytes=80)
    blocks = choose_blocks(shape, 64 * 1024)
    assert visible_tiles(shape, blocks) <= MAX_TINY_TILES
    assert tile_bytes(shape, blocks) <= TINY_BYTES
