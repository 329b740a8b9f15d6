"""Block sizes: pure arithmetic, for any shape."""

from hypothesis import given
from hypothesis import strategies as st

from attention.implementations.blocks import (
    MAX_TINY_TILES,
    MIB,
    TINY_BYTES,
    Blocks,
    Shape,
    choose,
    tile_bytes,
    tile_count,
)

shapes = st.builds(
    Shape,
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 64),
    group=st.integers(1, 16),
    seq=st.integers(1, 200_000),
    kv_seq=st.integers(1, 2_000_000),
    head_dim=st.integers(1, 512),
    value_dim=st.integers(1, 512),
    score_bytes=st.sampled_from([28, 44]),
    window=st.none() | st.integers(1, 10_000),
    training=st.booleans(),
)
budgets = st.integers(1, 1024 * MIB)
SMALLEST = Blocks(batches=1, kv_heads=1, rows=1, keys=1)


@given(shapes, budgets)
def test_a_tile_fits_its_budget_wherever_any_tile_can(shape: Shape, budget: int) -> None:
    taken = tile_bytes(shape, choose(shape, budget))
    assert taken <= max(budget, tile_bytes(shape, SMALLEST), TINY_BYTES)


@given(shapes, budgets, st.integers(1, 64 * MIB))
def test_a_tile_lies_inside_the_scores(shape: Shape, budget: int, comfort: int) -> None:
    blocks = choose(shape, budget, comfort)
    assert 1 <= blocks.batches <= shape.batch
    assert 1 <= blocks.kv_heads <= shape.kv_heads
    assert 1 <= blocks.rows <= shape.seq
    assert 1 <= blocks.keys <= shape.kv_seq


@given(shapes, budgets)
def test_nothing_is_cut_that_fits_whole(shape: Shape, budget: int) -> None:
    whole = Blocks(batches=shape.batch, kv_heads=shape.kv_heads, rows=shape.seq, keys=shape.kv_seq)
    if tile_bytes(shape, whole) <= budget:
        assert choose(shape, budget) == whole


@given(shapes, budgets)
def test_a_larger_budget_never_gives_fewer_scores_in_a_tile(shape: Shape, budget: int) -> None:
    def scores(blocks: Blocks) -> int:
        return blocks.batches * blocks.kv_heads * blocks.rows * blocks.keys

    assert scores(choose(shape, 4 * budget)) >= scores(choose(shape, budget)) / 2


def test_a_tiny_budget_does_not_make_thousands_of_tiles() -> None:
    shape = Shape(batch=3, kv_heads=2, group=8, seq=220, kv_seq=300, head_dim=32, value_dim=32, score_bytes=80)
    blocks = choose(shape, 64 * 1024)
    assert tile_count(shape, blocks) <= MAX_TINY_TILES
    assert tile_bytes(shape, blocks) <= TINY_BYTES
