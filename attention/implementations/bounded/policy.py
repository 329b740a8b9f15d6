"""The policy of `practical`: compute a call as a whole, in slices or in blocks, and of which size."""

import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

from msgspec import Struct, structs

from attention.core.kv_format import DENSE
from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import ITEM_BYTES, Workload
from attention.implementations.baseline import computes_in_float32, in_tf32, unfused_call_bytes, unpacking_arrays
from attention.implementations.bounded.blocks import (
    DEFAULT_BUDGET_BYTES,
    MIB,
    Blocks,
    ProblemSize,
    choose_blocks,
    is_affordable,
    raised,
)
from attention.implementations.bounded.blockwise import blocks_of
from attention.implementations.bounded.listed import choose_listed_blocks, computed_share
from attention.implementations.bounded.memory import RESIDENT_TILES
from attention.implementations.mlx_sdpa import fused_bytes, materializes_mask, why_unfused
from attention.implementations.quantized_kv import packed_bytes, reads_packed
from attention.masks import Pattern, of_workload
from attention.measure.device import Backend

SLICE_SAFETY_FACTORS: Final = {"forward": 1.15, "training": 1.3, "decode": 1.15}
"""Safety factors on the predicted bytes of a slice, measured on CUDA: other arrays live until the slice is done."""
MASK_SAFETY_FACTOR: Final = 1.35
"""Safety factor if MLX's fused kernel materialises a mask: three slices' masks were alive when they were not fenced."""
ROW_SLICES: Final = 8
"""Number of row slices under a causal mask; they skip 7/16 of the scores."""
ROW_MULTIPLE: Final = 128
"""Slices of at least this many rows have a multiple of it: MLX's fused backward pass on CUDA requires that."""
KEY_MULTIPLE: Final = 16
"""Slices have a multiple of this many keys if possible: rows of scores are then aligned for matrix products."""
UNALIGNED_BYTES: Final = 32 * MIB
"""Upper bound of the workspace of CUDA's matrix products for unaligned rows of scores; measured up to 25 MiB."""


DEQUANTIZED_BYTES: Final = 256 * MIB
"""Upper bound of slices with dequantized keys and values, however large the budget: packed ones are to save memory."""


class MaskCopies(Struct, frozen=True):
    """Copies of an array mask for MLX's SDPA: fully masked rows unmasked, values in the query's dtype."""

    batches: int = 0
    """Batches of the mask; 1 if it is the same for all."""
    heads: int = 0
    pair_bytes: int = 0
    """Bytes of all copies per pair of a query and a key."""

    def size(self, workload: Workload) -> int:
        """Return the bytes of the copies for a call or a part of one."""
        arrays = min(self.batches, workload.batch) * min(self.heads, workload.heads)
        return arrays * workload.seq * workload.kv_seq * self.pair_bytes


NO_MASK_COPIES: Final = MaskCopies()


def sdpa_workspace_bytes(
    workload: Workload, backend: Backend, needs: Needs, refusal: str | None, mask_copies: MaskCopies = NO_MASK_COPIES
) -> int:
    """Return the bytes above inputs and outputs of one call of MLX's SDPA, fused if `refusal` is None."""
    if refusal is None:
        spread, given = (
            fused_bytes(workload, backend, needs),
            fused_bytes(workload, backend) + mask_copies.size(workload),
        )
        sure = MASK_SAFETY_FACTOR if materializes_mask(workload, backend, needs) else 1.0
        return int(sure * (max(spread, given) - workload.output_bytes))
    unaligned = backend == "cuda" and workload.kv_seq * ITEM_BYTES[workload.dtype] % KEY_MULTIPLE
    products = UNALIGNED_BYTES if unaligned else 0
    own = int(
        SLICE_SAFETY_FACTORS[workload.pass_] * (unfused_call_bytes(workload, backend, needs) - workload.output_bytes)
    )
    return own + mask_copies.size(workload) + products


def slice_size(
    workload: Workload, backend: Backend, needs: Needs, budget: int, mask_copies: MaskCopies = NO_MASK_COPIES
) -> Blocks | None:
    """Return the size with the fewest slices such that all that may be resident fit the budget; None if no size fits.

    Among sizes that give equally few, it is the one with the most rows: sums over rows are then written less often.
    Slices of fewer than ROW_MULTIPLE rows are a last resort, since their matrix products are slow. A budget that would
    give too many slices for one graph is exceeded by as little as possible.
    """
    size = _fitting(workload, backend, needs, budget, mask_copies)
    while size is not None and not is_affordable(_slice_count(size, workload), budget):
        budget = raised(budget)
        size = _fitting(workload, backend, needs, budget, mask_copies)
    return size


def _fitting(workload: Workload, backend: Backend, needs: Needs, budget: int, mask_copies: MaskCopies) -> Blocks | None:
    """Return the size that gives the fewest slices within a budget, or None if no size fits."""
    most = _initial_rows(workload, backend, needs)
    sizes = []
    for heads in _head_splits(workload):

        def fits(rows: int, heads: Blocks = heads) -> bool:
            return slices_bytes(workload, structs.replace(heads, rows=rows), backend, needs, mask_copies) <= budget

        rows = most if fits(most) else _balanced_rows(_max_rows(fits, most), workload.seq)
        if rows:
            sizes.append(structs.replace(heads, rows=rows))
    small = min(ROW_MULTIPLE, workload.seq)
    return min(sizes, key=lambda size: (size.rows < small, _slice_count(size, workload), -size.rows), default=None)


def _slice_count(blocks: Blocks, workload: Workload) -> int:
    """Return the number of slices of a size."""
    sequences = -(-workload.batch // blocks.batches) * -(-workload.kv_heads // blocks.kv_heads)
    return sequences * -(-workload.seq // blocks.rows)


def _head_splits(workload: Workload) -> Iterator[Blocks]:
    """Yield all sequences and heads, then half of the sequences, down to one, then half of the heads, down to one."""
    blocks = Blocks(batches=workload.batch, kv_heads=workload.kv_heads, rows=1, keys=workload.kv_seq)
    yield blocks
    for axis in ("batches", "kv_heads"):
        while (size := getattr(blocks, axis)) > 1:
            blocks = structs.replace(blocks, **{axis: -(-size // 2)})
            yield blocks


def _max_rows(fits: Callable[[int], bool], below: int) -> int:
    """Return the most rows below `below` that fit: a multiple of ROW_MULTIPLE, otherwise fewer; 0 if none fit."""
    for step in (ROW_MULTIPLE, 1):
        numbers = range(step, (below if step == ROW_MULTIPLE else min(below, ROW_MULTIPLE)) + 1, step)
        fitting = bisect_left(numbers, True, key=lambda rows: not fits(rows))
        if fitting:
            return numbers[fitting - 1]
    return 0


def _balanced_rows(rows: int, seq: int) -> int:
    """Return the rows of the same number of slices, but of about equal size."""
    if not rows:
        return 0
    even = -(-seq // -(-seq // rows))
    return min(rows, _rounded_down(even + ROW_MULTIPLE - 1)) if rows >= ROW_MULTIPLE else even


def slices_bytes(
    workload: Workload, blocks: Blocks, backend: Backend, needs: Needs, mask_copies: MaskCopies = NO_MASK_COPIES
) -> int:
    """Return the peak bytes of slices above inputs and outputs: the slices in memory, and the sums of dK and dV."""
    odd = workload.seq % ROW_MULTIPLE if blocks.rows % ROW_MULTIPLE == 0 else 0
    own = max(_own_bytes(workload, blocks, rows, backend, needs, mask_copies) for rows in {blocks.rows, odd} - {0})
    sums = 0
    if workload.pass_ == "training":
        width = workload.head_dim + workload.value_dim
        # measured: the sums, a share of each of the two slices in flight, and in half precision a converted one
        copies = 3 if workload.dtype == "float32" else 4
        sums = copies * 4 * blocks.batches * blocks.kv_heads * workload.kv_seq * width
    return int(RESIDENT_TILES[backend] * own) + sums


def _own_bytes(
    workload: Workload, blocks: Blocks, rows: int, backend: Backend, needs: Needs, mask_copies: MaskCopies
) -> int:
    """Return the bytes of a slice of `rows` rows, with its output and its gradients."""
    group = workload.heads // workload.kv_heads
    keys = workload.kv_seq
    dequantized = 0
    if workload.quantized:
        workload = structs.replace(workload, kv_format=DENSE)
        rows_of_keys = blocks.batches * blocks.kv_heads * keys
        width = workload.head_dim + workload.value_dim
        steps = 0 if workload.dtype == "float32" else 4  # through float32
        dequantized = rows_of_keys * width * (ITEM_BYTES[workload.dtype] + steps)
    if workload.window is not None:
        keys = min(keys, -(-(rows + workload.window - 1) // KEY_MULTIPLE) * KEY_MULTIPLE)
    part = structs.replace(
        workload,
        batch=blocks.batches,
        heads=blocks.kv_heads * group,
        kv_heads=blocks.kv_heads,
        seq=min(rows, workload.seq),
        kv_seq=keys,
    )
    own = sdpa_workspace_bytes(part, backend, needs, why_unfused(part, backend, needs), mask_copies)
    return own + part.output_bytes + dequantized


def _initial_rows(workload: Workload, backend: Backend, needs: Needs) -> int:
    """Return all rows but a remainder if MLX fuses them, otherwise few enough for slices to skip masked scores."""
    rows = _rounded_down(workload.seq) if workload.seq > ROW_MULTIPLE else workload.seq
    if workload.window is None and not needs.array_mask:
        first = structs.replace(workload, seq=rows, kv_seq=max(1, workload.kv_seq - workload.seq + rows))
        if why_unfused(first, backend, needs) is None:
            return rows
    return _eighth_of_rows(workload) if workload.causal or workload.window is not None else workload.seq


def _eighth_of_rows(workload: Workload) -> int:
    rows = -(-workload.seq // ROW_SLICES) + ROW_MULTIPLE - 1
    return min(_rounded_down(rows), workload.seq)


def _rounded_down(rows: int) -> int:
    return rows - rows % ROW_MULTIPLE


GPU_SHARE: Final = 32
"""A GPU's budget is its memory divided by this: a tile costs a dozen launches, so tiles must be large."""
MAX_TILE_TARGET: Final = 32 * MIB
"""Tile size beyond which there is no gain, however large the cache: it is shared."""
MIN_TILE_TARGET: Final = 4 * MIB
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


def default_budget(backend: Backend, memory_bytes: int) -> int:
    """Return the default budget of a call in bytes above inputs and outputs."""
    if backend == "cpu":
        return DEFAULT_BUDGET_BYTES
    return max(DEFAULT_BUDGET_BYTES, memory_bytes // GPU_SHARE)


def tile_target_bytes(backend: Backend) -> int | None:
    """Return the preferred maximum size of a tile in bytes, or None if only the budget counts."""
    if backend != "cpu":
        return None
    return min(max(last_level_cache_bytes() or MAX_TILE_TARGET, MIN_TILE_TARGET), MAX_TILE_TARGET)


@cache
def last_level_cache_bytes() -> int | None:
    """Return the size of the last-level cache in bytes, or None if the system does not report it."""
    try:
        if sys.platform == "darwin":
            output = subprocess.run(
                ["sysctl", "-n", "hw.perflevel0.l2cachesize"], capture_output=True, text=True, check=True, timeout=5
            )
            return int(output.stdout)
        sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
        return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=None)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


FORWARD_ARRAYS: Final = 8
"""Score-sized float32 arrays alive at once in a forward tile, measured: MLX allocates a few operations ahead."""
TRAINING_ARRAYS: Final = 20
"""Score-sized float32 arrays alive at once in a backward tile under mx.compile; about 11 without it."""
WORTHWHILE_SKIP: Final = 0.1
"""Minimum share of skipped scores for blocks on a CPU if the whole score matrix would fit."""
WORTHWHILE_BACKWARD_BYTES: Final = 256 * MIB
"""A smaller gradient is computed as a whole if MLX can fuse it only for a multiple of 128 rows."""
UNFUSED_SAFETY_FACTOR: Final = 1.5
"""Safety factor on the predicted bytes of an unfused path, whose peak depends on MLX's evaluation order."""
FUSED: Final = "MLX has a fused kernel for this shape, backward too"


class Method(Enum):
    """How a pass is computed."""

    FUSED = "fused"
    """By a fused kernel of MLX."""
    WHOLE = "whole"
    """By MLX with the whole score matrix in memory."""
    SLICES = "slices"
    BLOCKS = "blocks"

    @property
    def is_cut(self) -> bool:
        """Whether the pass is split into slices or blocks."""
        return self in (Method.SLICES, Method.BLOCKS)


class Strategy(Struct, frozen=True):
    """The strategy for a call."""

    forward: Method
    backward: Method
    """A method that is not cut is the gradient of MLX's SDPA."""
    blocks: Blocks
    """Tile of blocks, used also for what slices cannot do."""
    backward_blocks: Blocks
    """Tile of the backward pass."""
    reason: str
    slices: Blocks | None = None
    """Size of a slice, forward and training, if slices are used."""
    backward_slices: Blocks | None = None
    waits: bool = False
    """Whether slices must run one after another because they do not fit in memory together."""


def choose_strategy(
    workload: Workload, backend: Backend, needs: Needs, budget: int, mask_copies: MaskCopies = NO_MASK_COPIES
) -> Strategy:
    """Choose the strategy of a call within a budget.

    Args:
        workload: the call.
        backend: the backend it runs on.
        needs: features that the workload does not describe.
        budget: bytes above inputs and outputs.
        mask_copies: copies of an array mask that are passed to MLX's SDPA.
    """
    if needs.pattern or needs.alibi or needs.logsumexp:
        inputs = _StrategyInputs(workload, backend, needs, budget, mask_copies)
        return inputs.strategy(Method.BLOCKS, Method.BLOCKS, _only_blocks(needs))
    choose = _cpu_strategy if backend == "cpu" or needs.softcap else _gpu_strategy
    return choose(_StrategyInputs(workload, backend, needs, budget, mask_copies))


def _only_blocks(needs: Needs) -> str:
    if needs.pattern:
        return "MLX's SDPA takes a pattern only as a mask as large as the scores"
    return "MLX's SDPA has no ALiBi" if needs.alibi else "MLX's SDPA does not return the logsumexp"


@lru_cache(maxsize=64)
def listed_strategy(workload: Workload, backend: Backend, needs: Needs, budget: int, pattern: Pattern) -> Strategy:
    """Return the strategy of a call with a pattern: blocks, without the tiles that have no visible pair."""
    tiles = pattern.block_list((workload.batch, workload.heads, workload.seq, workload.kv_seq))
    within, target = int(budget / RESIDENT_TILES[backend]), tile_target_bytes(backend)
    training = structs.replace(workload, pass_="training")
    blocks, backward = (
        choose_listed_blocks(problem_size(one, backend), tiles, within, target) for one in (workload, training)
    )
    share = computed_share(tiles, blocks)
    reason = f"{_only_blocks(needs)}; tiles of {blocks.rows} x {blocks.keys} skip {1 - share:.0%} of the scores"
    return Strategy(Method.BLOCKS, Method.BLOCKS, blocks, backward, reason)


@lru_cache(maxsize=256)
def quantized_strategy(
    workload: Workload,
    backend: Backend,
    needs: Needs,
    budget: int,
    pattern: Pattern | None,
    mask_copies: MaskCopies = NO_MASK_COPIES,
) -> Strategy:
    """Return the strategy of a call with quantized keys and values, arguments as of `choose_strategy`.

    Few rows: two packed products. Otherwise on a GPU slices of heads, whose keys and values are dequantized for MLX's
    fused SDPA, where it has one; otherwise blocks.
    """
    widened, packed = computes_in_float32(workload.dtype, backend), reads_packed(workload, backend)
    simple = not (needs.softcap or needs.alibi or needs.sinks or needs.logsumexp or needs.pattern)
    scores = int(UNFUSED_SAFETY_FACTOR * (packed_bytes(workload, needs, widened) - workload.output_bytes))
    # On a CPU a tile gains nothing from outgrowing the caches, and quantized keys and values are there to save memory.
    tiles_budget = min(budget, tile_target_bytes(backend) or budget)
    blocks = block_size(workload, backend, tiles_budget)
    if packed and simple and scores <= budget:
        reason = "few rows: each reads the keys and values packed, and the scores fit the budget"
        return Strategy(Method.WHOLE, Method.WHOLE, blocks, blocks, reason)
    added = needs.array_mask and needs.mask_dtype != "bool"  # MLX's fused SDPA may lack its gradient
    if not packed and simple and not added and backend != "cpu":
        slices = _dequantized_slices(workload, backend, needs, budget, mask_copies)
        if slices is not None:
            heads = f"{slices.batches} x {slices.kv_heads} heads"
            reason = f"keys and values of {heads} at a time are dequantized for MLX's fused SDPA"
            return Strategy(Method.SLICES, Method.SLICES, blocks, blocks, reason, slices, slices, waits=True)
    if pattern is not None:
        tiles = pattern.block_list((workload.batch, workload.heads, workload.seq, workload.kv_seq))
        within, target = int(tiles_budget / RESIDENT_TILES[backend]), tile_target_bytes(backend)
        blocks = choose_listed_blocks(problem_size(workload, backend), tiles, within, target)
    how = "read packed" if packed else "dequantized"
    reason = f"keys and values are {how} a tile at a time, {blocks.rows} rows x {blocks.keys} keys"
    return Strategy(Method.BLOCKS, Method.BLOCKS, blocks, blocks, reason)


def _dequantized_slices(
    workload: Workload, backend: Backend, needs: Needs, budget: int, mask_copies: MaskCopies
) -> Blocks | None:
    """Return the most heads, with all rows, whose dequantized keys and values fit; None without a fused SDPA."""
    if why_unfused(workload, backend, needs) is not None:
        return None
    sizes = [structs.replace(heads, rows=workload.seq) for heads in _head_splits(workload)]
    fitting = [
        size
        for size in sizes
        if slices_bytes(workload, size, backend, needs, mask_copies) <= min(budget, DEQUANTIZED_BYTES)
    ]
    return fitting[0] if fitting else None


class _StrategyInputs:
    """A call with its budget, and how MLX would compute it."""

    def __init__(
        self, workload: Workload, backend: Backend, needs: Needs, budget: int, mask_copies: MaskCopies
    ) -> None:
        self.workload, self.backend, self.needs = workload, backend, needs
        self.budget, self.mask_copies = budget, mask_copies
        # A call cannot know whether its gradient will be needed: the strategy must hold for both passes.
        self.forward, self.training = (structs.replace(workload, pass_=pass_) for pass_ in ("forward", "training"))
        self.excess = safe_unfused_bytes(self.training, backend, needs) + mask_copies.size(workload)
        self.refusal = None if needs.softcap else why_unfused(self.forward, backend, needs)
        self.training_refusal = self.refusal or (None if needs.softcap else why_unfused(self.training, backend, needs))

    def strategy(self, forward: Method, backward: Method, reason: str, waits: bool = False) -> Strategy:
        """Return a strategy with its sizes; blocks replace slices of which not even the smallest fits the budget."""
        blocks, backward_blocks = (block_size(one, self.backend, self.budget) for one in (self.workload, self.training))
        made = Strategy(forward, backward, blocks, backward_blocks, reason, waits=waits)
        if Method.SLICES not in (forward, backward):
            return made
        slices, backward_slices = (
            slice_size(one, self.backend, self.needs, self.budget, self.mask_copies)
            for one in (self.forward, self.training)
        )
        in_blocks = structs.replace(made, forward=Method.BLOCKS, backward=Method.BLOCKS)
        if forward is Method.SLICES and slices is None:
            return structs.replace(in_blocks, reason=f"{reason}, and no slice fits it")
        dtype = "float32" if computes_in_float32(self.workload.dtype, self.backend) else self.workload.dtype
        if backward_slices is None and forward is not Method.FUSED and in_tf32(dtype, self.backend):
            why = f"{reason}, and a gradient in blocks does not match an output in TF32"
            return structs.replace(in_blocks, reason=why)
        if backward_slices is None:
            tighter = f"{reason}, and no slice of a backward pass fits it"
            return structs.replace(made, backward=Method.BLOCKS, reason=tighter, slices=slices)
        return structs.replace(made, slices=slices, backward_slices=backward_slices)

    @property
    def whole(self) -> Method:
        """The method of MLX's SDPA on the whole forward pass."""
        return Method.WHOLE if self.refusal else Method.FUSED

    @property
    def over_budget(self) -> str:
        need, budget = size_text(self.excess), size_text(self.budget)
        if self.workload.pass_ == "training":
            return f"the scores need {need}, the budget is {budget}"
        return f"with gradients, for which the path has to hold too, the scores need {need}, the budget is {budget}"

    @property
    def within_budget(self) -> str:
        return f"{self.training_refusal}; the scores fit the budget of {size_text(self.budget)}"


def _cpu_strategy(inputs: _StrategyInputs) -> Strategy:
    """Choose blocks with an online softmax, which suit a CPU's caches, unless the whole call is better."""
    if inputs.needs.softcap:
        return inputs.strategy(Method.BLOCKS, Method.BLOCKS, "MLX's SDPA has no softcap")
    if not inputs.training_refusal:
        return inputs.strategy(Method.FUSED, Method.FUSED, FUSED)
    skipped = skipped_share(inputs.workload, block_size(inputs.workload, inputs.backend, inputs.budget))
    if inputs.refusal and skipped >= WORTHWHILE_SKIP:
        return inputs.strategy(
            Method.BLOCKS, Method.BLOCKS, f"{inputs.refusal}; blocks skip {skipped:.0%} of the scores"
        )
    if inputs.excess <= inputs.budget:
        return inputs.strategy(inputs.whole, Method.WHOLE, inputs.within_budget)
    forward = Method.BLOCKS if inputs.refusal else Method.FUSED
    return inputs.strategy(forward, Method.BLOCKS, f"{inputs.training_refusal}; {inputs.over_budget}")


def _gpu_strategy(inputs: _StrategyInputs) -> Strategy:
    """Choose the largest slices that fit the budget if the whole call does not: a GPU prefers few, large kernels."""
    forward, training = (
        sdpa_workspace_bytes(one, inputs.backend, inputs.needs, refusal, inputs.mask_copies)
        for one, refusal in ((inputs.forward, inputs.refusal), (inputs.training, inputs.training_refusal))
    )
    if not inputs.training_refusal:
        if max(forward, training) <= inputs.budget:
            return inputs.strategy(Method.FUSED, Method.FUSED, FUSED)
        needed = f"MLX's fused kernels need {size_text(max(forward, training))}, with what they make of a mask"
        why = f"{needed}; the budget is {size_text(inputs.budget)}"
        method = Method.FUSED if forward <= inputs.budget else Method.SLICES
        return inputs.strategy(method, Method.SLICES, why, waits=True)
    fits = max(forward, inputs.excess) <= inputs.budget
    scores = inputs.workload.scores * ITEM_BYTES[inputs.workload.dtype]
    uneven = inputs.backend == "cuda" and not inputs.refusal and inputs.workload.seq > ROW_MULTIPLE
    if fits and not (uneven and scores >= WORTHWHILE_BACKWARD_BYTES):
        return inputs.strategy(inputs.whole, Method.WHOLE, inputs.within_budget)
    why = f"{inputs.training_refusal}; {'slices of such rows have one' if fits else inputs.over_budget}"
    if forward <= inputs.budget:
        return inputs.strategy(inputs.whole, Method.SLICES, why, waits=not fits)
    return inputs.strategy(Method.SLICES, Method.SLICES, why, waits=True)


def block_size(workload: Workload, backend: Backend, budget: int) -> Blocks:
    """Return the tile size of blocks for a workload."""
    return choose_blocks(
        problem_size(workload, backend), int(budget / RESIDENT_TILES[backend]), tile_target_bytes(backend)
    )


def safe_unfused_bytes(workload: Workload, backend: Backend, needs: Needs = NO_NEEDS) -> int:
    """Return an upper bound of an unfused path's bytes above inputs and outputs."""
    return int(UNFUSED_SAFETY_FACTOR * (unfused_call_bytes(workload, backend, needs) - workload.output_bytes))


def skipped_share(workload: Workload, blocks: Blocks) -> float:
    """Return the share of the score matrix in tiles that are skipped because they are fully masked."""
    if workload.mask_spec.pattern is not None:  # a program's own mask, of which only the density is known
        return 0.0
    mask, seq, kv_seq = of_workload(workload), workload.seq, workload.kv_seq
    if mask.pattern is not None:
        return 1 - computed_share(mask.pattern.block_list((workload.batch, workload.heads, seq, kv_seq)), blocks)
    computed = sum(len(rows) * len(mask.visible_keys(rows, seq, kv_seq)) for rows in blocks_of(seq, blocks.rows))
    return 1.0 - computed / (seq * kv_seq)


def problem_size(workload: Workload, backend: Backend) -> ProblemSize:
    """Return the sizes that block sizes depend on."""
    training = workload.pass_ == "training"
    return ProblemSize(
        batch=workload.batch,
        kv_heads=workload.kv_heads,
        group=workload.heads // workload.kv_heads,
        seq=workload.seq,
        kv_seq=workload.kv_seq,
        head_dim=workload.head_dim,
        value_dim=workload.value_dim,
        score_bytes=4 * (TRAINING_ARRAYS if training else FORWARD_ARRAYS),
        causal=workload.causal,
        window=workload.window,
        training=training,
        unpacking=0.0 if reads_packed(workload, backend) else unpacking_arrays(workload, backend),
    )


def size_text(size: int) -> str:
    """Format bytes: in MiB below 10 GiB, beyond in GiB and TiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30)):
        if size >= 10 * factor:
            return f"{size / factor:,.0f} {unit}"
    return f"{size / MIB:,.0f} MiB"
