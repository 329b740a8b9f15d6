"""How large the blocks of a blockwise attention may be: pure arithmetic."""

import math
from collections.abc import Callable
from typing import Final

from msgspec import Struct, structs

MIB: Final = 1 << 20
DEFAULT_BUDGET_BYTES: Final = 256 * MIB
ROWS: Final = 256
"""Query rows a block has before it takes more heads: enough for a matrix product to run at its full rate."""
SMALLEST_ROWS: Final = 32
SMALLEST_KEYS: Final = 256
MAX_TINY_TILES: Final = 1024
TINY_BYTES: Final = MIB
"""A tile of less grows beyond the budget where there are more than so many."""
SUMS_SHARE: Final = 0.25
"""Share of the budget that a backward pass may spend on sums of dQ, which save it a second look at every tile."""


class Shape(Struct, frozen=True, kw_only=True):
    """One call, as far as block sizes depend on it."""

    batch: int
    kv_heads: int
    group: int
    """Query heads that share a key head."""
    seq: int
    kv_seq: int
    head_dim: int
    value_dim: int
    score_bytes: int
    """Bytes alive for each score of a block: how many score-sized arrays a tile holds, times their items' size."""
    window: int | None = None
    """Keys that a row sees at most, where a mask says so."""
    training: bool = False


class Blocks(Struct, frozen=True, kw_only=True):
    """The size of a tile: batches x kv_heads x (all query heads that share them) x rows x keys."""

    batches: int
    kv_heads: int
    rows: int
    keys: int
    sums_queries: bool = False
    """Whether a backward pass keeps float32 sums of the tile's whole dQ, so that it looks at each tile once."""


def choose(shape: Shape, budget_bytes: int, comfort_bytes: int | None = None) -> Blocks:
    """Picks a tile whose working memory fits the budget.

    First one key head with all keys: then no row needs a second look. Where that is too much, rows and keys are halved,
    rows not below what a matrix product likes while there are keys to halve. Then the tile takes in more heads,
    more sequences and more rows while it stays within comfort, which is the budget unless given: on a CPU a tile gains
    nothing from outgrowing the caches.
    A tile never gets smaller than one row and one key, so a budget below `tile_bytes` of that cannot be kept. Nor can
    one that would cut a call into more than `MAX_TINY_TILES` of less than `TINY_BYTES`: their graph would take minutes.
    """
    comfort = budget_bytes if comfort_bytes is None else min(comfort_bytes, budget_bytes)
    blocks = Blocks(batches=1, kv_heads=1, rows=min(shape.seq, ROWS), keys=shape.kv_seq)
    blocks = _halved(blocks, lambda candidate: tile_bytes(shape, candidate) <= budget_bytes)
    if shape.training and blocks.keys < shape.kv_seq and query_sum_bytes(shape, blocks) <= SUMS_SHARE * budget_bytes:
        blocks = structs.replace(blocks, sums_queries=True)
        blocks = _halved(blocks, lambda candidate: tile_bytes(shape, candidate) <= budget_bytes)
    wholes = {"kv_heads": shape.kv_heads, "batches": shape.batch, "rows": shape.seq, "keys": shape.kv_seq}
    for axis in ("kv_heads", "batches", "rows"):
        blocks = _grown(blocks, axis, wholes[axis], lambda candidate: tile_bytes(shape, candidate) <= comfort)
    while tile_count(shape, blocks) > MAX_TINY_TILES:
        larger = blocks
        for axis in ("rows", "keys"):
            larger = structs.replace(larger, **{axis: min(wholes[axis], 2 * getattr(larger, axis))})
        if larger == blocks or tile_bytes(shape, larger) > TINY_BYTES:
            break
        blocks = larger
    return blocks


def tile_count(shape: Shape, blocks: Blocks) -> int:
    """How many tiles there are, those that a mask hides included."""
    axes = ((shape.batch, blocks.batches), (shape.kv_heads, blocks.kv_heads), (shape.seq, blocks.rows))
    return math.prod(-(-whole // part) for whole, part in (*axes, (shape.kv_seq, blocks.keys)))


def tile_bytes(shape: Shape, blocks: Blocks) -> int:
    """Working memory of one tile: its scores, its slices of the inputs in float32, and what it sums up.

    How many slices are alive at once is measured: MLX allocates a few operations ahead of the one that runs.
    """
    width = 4 * (shape.head_dim + shape.value_dim)
    rows, seen = shape.group * blocks.rows, seen_keys(shape, blocks)
    # forward: K, its transpose and V; backward: those, V's transpose, dK and dV summed over all keys of the block, and
    # the four slices of a query-side array; both: a few finished blocks that wait to be written
    sides = 4 * seen + 12 * blocks.keys + 14 * rows if shape.training else 4 * seen + 6 * rows
    scratch = blocks.batches * blocks.kv_heads * (rows * seen * shape.score_bytes + sides * width)
    return scratch + (query_sum_bytes(shape, blocks) if blocks.sums_queries else 0)


def query_sum_bytes(shape: Shape, blocks: Blocks) -> int:
    """The float32 sums of dQ for all rows of a tile's heads."""
    return blocks.batches * blocks.kv_heads * shape.group * shape.seq * shape.head_dim * 4


def seen_keys(shape: Shape, blocks: Blocks) -> int:
    """The keys of a tile that its rows may see at most."""
    return blocks.keys if shape.window is None else min(blocks.keys, blocks.rows + shape.window - 1)


def _halved(blocks: Blocks, fits: Callable[[Blocks], bool]) -> Blocks:
    """Halves rows to what is still efficient, then keys likewise, then whichever there is more of, until it fits."""
    while not fits(blocks) and (blocks.rows > 1 or blocks.keys > 1):
        halve_rows = blocks.rows > SMALLEST_ROWS or (blocks.keys <= SMALLEST_KEYS and blocks.rows >= blocks.keys)
        axis = "rows" if halve_rows or blocks.keys == 1 else "keys"
        blocks = structs.replace(blocks, **{axis: -(-getattr(blocks, axis) // 2)})
    return blocks


def _grown(blocks: Blocks, axis: str, whole: int, fits: Callable[[Blocks], bool]) -> Blocks:
    """Doubles one axis while the tile fits, up to the whole of it."""
    while getattr(blocks, axis) < whole:
        larger = structs.replace(blocks, **{axis: min(whole, 2 * getattr(blocks, axis))})
        if not fits(larger):
            break
        blocks = larger
    return blocks
