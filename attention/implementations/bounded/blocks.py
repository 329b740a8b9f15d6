"""Tile sizes of blockwise attention, from a memory budget: pure arithmetic."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct, structs

from attention.masks import Mask

MIB: Final = 1 << 20
DEFAULT_BUDGET_BYTES: Final = 256 * MIB
ROWS: Final = 256
"""Rows of a block before it grows to more heads: enough for matrix products at full rate."""
MIN_ROWS: Final = 32
MIN_KEYS: Final = 256
MAX_TINY_TILES: Final = 1024
TINY_BYTES: Final = 4 * MIB
"""A budget below this is exceeded if it would give more than MAX_TINY_TILES tiles."""
GRAPH_BYTES: Final = 64 * 1024
"""Measured memory of the hundred nodes of a traced tile; mx.compile needs three times as much."""
MAX_GRAPH_BYTES: Final = 256 * MIB
"""A graph larger than this is at most as large as a tile."""
MAX_FLAT_TILES: Final = 512
"""Above this number, tiles are made as square as possible: the same scores then need fewer keys and rows."""
SAMPLED_ROWS: Final = 16
"""Number of evenly spaced row blocks whose tiles are counted."""
SUMS_SHARE: Final = 0.25
"""Share of the budget that a backward pass may spend on sums of dQ, which avoid a second pass over the tiles."""


class ProblemSize(Struct, frozen=True, kw_only=True):
    """The properties of a call that block sizes depend on."""

    batch: int
    kv_heads: int
    group: int
    """Query heads that share a key head."""
    seq: int
    kv_seq: int
    head_dim: int
    value_dim: int
    score_bytes: int
    """Peak bytes per score of a block: the number of score-sized arrays in a tile, times their item size."""
    causal: bool = False
    window: int | None = None
    """Maximum number of keys that a row attends to; None without a window."""
    training: bool = False
    unpacking: float = 0.0
    """Further float32 arrays of a tile's keys and values while these are dequantized."""


class Blocks(Struct, frozen=True, kw_only=True):
    """The size of a tile: batches x kv_heads x (all query heads that share them) x rows x keys."""

    batches: int
    kv_heads: int
    rows: int
    keys: int
    sums_queries: bool = False
    """Whether a backward pass keeps float32 sums of the tile's whole dQ, so that it computes each tile once."""


def choose_blocks(shape: ProblemSize, budget_bytes: int, target_bytes: int | None = None) -> Blocks:
    """Choose a tile whose working memory fits the budget.

    The first candidate is one key head with all keys, which needs no second pass. If it is too large, rows and keys are
    halved; rows stay at MIN_ROWS or more while there are keys to halve. Then the tile grows to more heads, sequences
    and rows, up to `target_bytes` (by default the budget): on a CPU a tile gains nothing from outgrowing the caches.
    If there would be hundreds of tiles, they are made as square as possible.
    A tile has at least one row and one key, so a budget below its `tile_bytes` is exceeded. So is one that would give
    too many tiles (`is_affordable`): their graph would need more memory than the tiles, and minutes to trace and
    compile. The budget is then exceeded by as little as possible; memory grows with the square root of the scores.
    """
    allowed, target = budget_bytes, budget_bytes if target_bytes is None else min(target_bytes, budget_bytes)
    while True:
        blocks = _fitting(shape, allowed, target)
        count = visible_tiles(shape, blocks)
        if count <= 1 or is_affordable(count, allowed):
            return blocks
        allowed, target = raised(allowed), raised(target)


def is_affordable(tiles: int, budget_bytes: int) -> bool:
    """Return whether one graph may have this number of tiles, each within the budget."""
    if tiles <= MAX_TINY_TILES:
        return True
    return budget_bytes >= TINY_BYTES and tiles * GRAPH_BYTES <= max(budget_bytes, MAX_GRAPH_BYTES)


def raised(budget_bytes: int) -> int:
    """Return the next larger budget to try."""
    return min(2 * budget_bytes, TINY_BYTES) if budget_bytes < TINY_BYTES else budget_bytes + budget_bytes // 4


def _fitting(shape: ProblemSize, budget_bytes: int, target_bytes: int) -> Blocks:
    """Return a tile for a budget, whatever the number of tiles."""
    blocks = Blocks(batches=1, kv_heads=1, rows=min(shape.seq, ROWS), keys=shape.kv_seq)
    blocks = _shrink(blocks, lambda candidate: tile_bytes(shape, candidate) <= budget_bytes)
    if shape.training and blocks.keys < shape.kv_seq and query_sum_bytes(shape, blocks) <= SUMS_SHARE * budget_bytes:
        blocks = structs.replace(blocks, sums_queries=True)
        blocks = _shrink(blocks, lambda candidate: tile_bytes(shape, candidate) <= budget_bytes)
    wholes = {"kv_heads": shape.kv_heads, "batches": shape.batch, "rows": shape.seq}
    for axis, whole in wholes.items():
        blocks = _grow(blocks, axis, whole, lambda candidate: tile_bytes(shape, candidate) <= target_bytes)
    if visible_tiles(shape, blocks) > MAX_FLAT_TILES:
        blocks = min([blocks, *_square(shape, budget_bytes)], key=lambda one: visible_tiles(shape, one))
    return blocks


def _square(shape: ProblemSize, budget_bytes: int) -> Iterator[Blocks]:
    """Yield tiles of one key head, with the number of rows doubled each time and as many keys as fit."""
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
    """Return the approximate number of tiles computed: without fully masked ones, with a second pass for dQ."""
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
    """Return the working memory of one tile: scores, float32 slices of the inputs, and sums.

    How many slices are alive at once is measured: MLX allocates a few operations ahead of the one that runs.
    """
    width = 4 * (shape.head_dim + shape.value_dim)
    rows, seen = shape.group * blocks.rows, visible_keys(shape, blocks)
    # forward: K, its transpose and V; backward: those, V's transpose, dK and dV summed over all keys of the block, and
    # the four slices of a query-side array; both: a few finished blocks not yet written
    sides = 4 * seen + 12 * blocks.keys + 14 * rows if shape.training else 4 * seen + 6 * rows
    unpacked = int(shape.unpacking * seen * width / 2)  # of keys or of values
    scratch = blocks.batches * blocks.kv_heads * (rows * seen * shape.score_bytes + sides * width + unpacked)
    return scratch + (query_sum_bytes(shape, blocks) if blocks.sums_queries else 0)


def query_sum_bytes(shape: ProblemSize, blocks: Blocks) -> int:
    """Return the bytes of the float32 sums of dQ for all rows of a tile's heads."""
    return blocks.batches * blocks.kv_heads * shape.group * shape.seq * shape.head_dim * 4


def visible_keys(shape: ProblemSize, blocks: Blocks) -> int:
    """Return the maximum number of keys of a tile that its rows attend to."""
    return blocks.keys if shape.window is None else min(blocks.keys, blocks.rows + shape.window - 1)


def _shrink(blocks: Blocks, fits: Callable[[Blocks], bool]) -> Blocks:
    """Halve rows down to MIN_ROWS, then keys down to MIN_KEYS, then the larger of the two, until the tile fits."""
    while not fits(blocks) and (blocks.rows > 1 or blocks.keys > 1):
        halve_rows = blocks.rows > MIN_ROWS or (blocks.keys <= MIN_KEYS and blocks.rows >= blocks.keys)
        axis = "rows" if halve_rows or blocks.keys == 1 else "keys"
        blocks = structs.replace(blocks, **{axis: -(-getattr(blocks, axis) // 2)})
    return blocks


def _grow(blocks: Blocks, axis: str, whole: int, fits: Callable[[Blocks], bool]) -> Blocks:
    """Double one axis while the tile fits, up to `whole`."""
    while getattr(blocks, axis) < whole:
        larger = structs.replace(blocks, **{axis: min(whole, 2 * getattr(blocks, axis))})
        if not fits(larger):
            break
        blocks = larger
    return blocks
