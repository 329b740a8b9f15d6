"""How large the blocks of a blockwise attention may be: pure arithmetic."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct, structs

from attention.masks import Mask

MIB: Final = 1 << 20
DEFAULT_BUDGET_BYTES: Final = 256 * MIB
ROWS: Final = 256
"""Query rows a block has before it takes more heads: enough for a matrix product to run at its full rate."""
MIN_ROWS: Final = 32
MIN_KEYS: Final = 256
MAX_TINY_TILES: Final = 1024
TINY_BYTES: Final = 4 * MIB
"""A budget of less is exceeded where it would give more tiles than that."""
GRAPH_BYTES: Final = 64 * 1024
"""Memory of the hundred nodes of a traced tile, measured, before mx.compile takes three times as much."""
MAX_GRAPH_BYTES: Final = 256 * MIB
"""A graph of more is as large as a tile at most."""
MAX_FLAT_TILES: Final = 512
"""More tiles than that are made as square as they may be: the same scores then need fewer keys and rows."""
SAMPLED_ROWS: Final = 16
"""Blocks of rows of which the tiles are counted, evenly spaced."""
SUMS_SHARE: Final = 0.25
"""Share of the budget that a backward pass may spend on sums of dQ, which save it a second look at every tile."""


class ProblemSize(Struct, frozen=True, kw_only=True):
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
    causal: bool = False
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


def choose_blocks(shape: ProblemSize, budget_bytes: int, comfort_bytes: int | None = None) -> Blocks:
    """Picks a tile whose working memory fits the budget.

    First one key head with all keys: then no row needs a second look. Where that is too much, rows and keys are halved,
    rows not below what a matrix product likes while there are keys to halve. Then the tile takes in more heads,
    more sequences and more rows while it stays within comfort, which is the budget unless given: on a CPU a tile gains
    nothing from outgrowing the caches.
    Where that would give hundreds of tiles, they are as square as they may be.
    A tile never gets smaller than one row and one key, so a budget below `tile_bytes` of that cannot be kept. Nor can
    one that would give too many tiles (`is_affordable`): their graph would take more memory than they do, and minutes
    to trace and compile. The budget is then exceeded by as little as helps; memory grows with the root of the scores.
    """
    allowed, comfort = budget_bytes, budget_bytes if comfort_bytes is None else min(comfort_bytes, budget_bytes)
    while True:
        blocks = _fitting(shape, allowed, comfort)
        count = visible_tiles(shape, blocks)
        if count <= 1 or is_affordable(count, allowed):
            return blocks
        allowed, comfort = raised(allowed), raised(comfort)


def is_affordable(tiles: int, budget_bytes: int) -> bool:
    """Whether so many tiles may be in one graph, within a budget for each."""
    if tiles <= MAX_TINY_TILES:
        return True
    return budget_bytes >= TINY_BYTES and tiles * GRAPH_BYTES <= max(budget_bytes, MAX_GRAPH_BYTES)


def raised(budget_bytes: int) -> int:
    """The next larger budget to try."""
    return min(2 * budget_bytes, TINY_BYTES) if budget_bytes < TINY_BYTES else budget_bytes + budget_bytes // 4


def _fitting(shape: ProblemSize, budget_bytes: int, comfort_bytes: int) -> Blocks:
    """A tile for a budget, however many it takes."""
    blocks = Blocks(batches=1, kv_heads=1, rows=min(shape.seq, ROWS), keys=shape.kv_seq)
    blocks = _shrink(blocks, lambda candidate: tile_bytes(shape, candidate) <= budget_bytes)
    if shape.training and blocks.keys < shape.kv_seq and query_sum_bytes(shape, blocks) <= SUMS_SHARE * budget_bytes:
        blocks = structs.replace(blocks, sums_queries=True)
        blocks = _shrink(blocks, lambda candidate: tile_bytes(shape, candidate) <= budget_bytes)
    wholes = {"kv_heads": shape.kv_heads, "batches": shape.batch, "rows": shape.seq}
    for axis, whole in wholes.items():
        blocks = _grow(blocks, axis, whole, lambda candidate: tile_bytes(shape, candidate) <= comfort_bytes)
    if visible_tiles(shape, blocks) > MAX_FLAT_TILES:
        blocks = min([blocks, *_square(shape, budget_bytes)], key=lambda one: visible_tiles(shape, one))
    return blocks


def _square(shape: ProblemSize, budget_bytes: int) -> Iterator[Blocks]:
    """Tiles of one key head, of any number of rows by doubling and as many keys as fit."""
    rows = min(shape.seq, MIN_ROWS)
    while True:
        for sums in (False, True) if shape.training else (False,):
            blocks = Blocks(batches=1, kv_heads=1, rows=rows, keys=shape.kv_seq, sums_queries=sums)
            sizes = range(MIN_KEYS, shape.kv_seq + MIN_KEYS, MIN_KEYS)

            def exceeds(keys: int, blocks: Blocks = blocks) -> bool:
                return tile_bytes(shape, structs.replace(blocks, keys=min(keys, shape.kv_seq))) > budget_bytes

            if fitting := bisect_left(sizes, True, key=exceeds):
                yield structs.replace(blocks, keys=min(sizes[fitting - 1], shape.kv_seq))
        if rows == shape.seq:
            return
        rows = min(2 * rows, shape.seq)


def visible_tiles(shape: ProblemSize, blocks: Blocks) -> int:
    """About how many tiles are computed: those that a mask hides are left out, a second pass for dQ counts."""
    mask = Mask(causal=shape.causal, window=shape.window)
    runs = range(mask.empty_rows(shape.seq, shape.kv_seq) // blocks.rows, -(-shape.seq // blocks.rows))
    step = -(-len(runs) // SAMPLED_ROWS)
    sample = runs[(step - 1) // 2 :: step]
    seen = 0
    for run in sample:
        rows = range(run * blocks.rows, min((run + 1) * blocks.rows, shape.seq))
        seen += -(-len(mask.visible_keys(rows, shape.seq, shape.kv_seq)) // blocks.keys)
    passes = 2 if shape.training and not (blocks.sums_queries or blocks.keys >= shape.kv_seq) else 1
    heads = -(-shape.batch // blocks.batches) * -(-shape.kv_heads // blocks.kv_heads)
    return heads * passes * -(-seen * len(runs) // len(sample))


def tile_bytes(shape: ProblemSize, blocks: Blocks) -> int:
    """Working memory of one tile: its scores, its slices of the inputs in float32, and what it sums up.

    How many slices are alive at once is measured: MLX allocates a few operations ahead of the one that runs.
    """
    width = 4 * (shape.head_dim + shape.value_dim)
    rows, seen = shape.group * blocks.rows, visible_keys(shape, blocks)
    # forward: K, its transpose and V; backward: those, V's transpose, dK and dV summed over all keys of the block, and
    # the four slices of a query-side array; both: a few finished blocks that wait to be written
    sides = 4 * seen + 12 * blocks.keys + 14 * rows if shape.training else 4 * seen + 6 * rows
    scratch = blocks.batches * blocks.kv_heads * (rows * seen * shape.score_bytes + sides * width)
    return scratch + (query_sum_bytes(shape, blocks) if blocks.sums_queries else 0)


def query_sum_bytes(shape: ProblemSize, blocks: Blocks) -> int:
    """The float32 sums of dQ for all rows of a tile's heads."""
    return blocks.batches * blocks.kv_heads * shape.group * shape.seq * shape.head_dim * 4


def visible_keys(shape: ProblemSize, blocks: Blocks) -> int:
    """The keys of a tile that its rows may see at most."""
    return blocks.keys if shape.window is None else min(blocks.keys, blocks.rows + shape.window - 1)


def _shrink(blocks: Blocks, fits: Callable[[Blocks], bool]) -> Blocks:
    """Halves rows to what is still efficient, then keys likewise, then whichever there is more of, until it fits."""
    while not fits(blocks) and (blocks.rows > 1 or blocks.keys > 1):
        halve_rows = blocks.rows > MIN_ROWS or (blocks.keys <= MIN_KEYS and blocks.rows >= blocks.keys)
        axis = "rows" if halve_rows or blocks.keys == 1 else "keys"
        blocks = structs.replace(blocks, **{axis: -(-getattr(blocks, axis) // 2)})
    return blocks


def _grow(blocks: Blocks, axis: str, whole: int, fits: Callable[[Blocks], bool]) -> Blocks:
    """Doubles one axis while the tile fits, up to the whole of it."""
    while getattr(blocks, axis) < whole:
        larger = structs.replace(blocks, **{axis: min(whole, 2 * getattr(blocks, axis))})
        if not fits(larger):
            break
        blocks = larger
    return blocks
