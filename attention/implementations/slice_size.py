"""How large the slices of a call are: few of them, and of as many together as may be in memory at once."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct, structs

from attention.device import Backend
from attention.implementations.blocks import MIB, Blocks, is_affordable, raised
from attention.implementations.mlx_sdpa import fused_bytes, spreads_mask, why_unfused
from attention.implementations.unfused import whole_bytes
from attention.implementations.waiting import AT_ONCE
from attention.route import Needs
from attention.workload import ITEM_BYTES, Workload

SURE_SLICE: Final = {"forward": 1.15, "training": 1.3, "decode": 1.15}
"""How many times what is predicted of a slice must fit, measured on CUDA: some more lives until a slice is done."""
SURE_MASK: Final = 1.35
"""The same where MLX's fused kernel spreads a mask; three slices' masks were there, before these had to wait too."""
SLICES: Final = 8
"""Slices of rows under a mask that lets the later ones see more: they skip 7 of 16 parts of the scores."""
EVEN: Final = 128
"""Rows of which slices have a multiple where they have as many: MLX's fused backward on CUDA asks for it."""
ALIGNED: Final = 16
"""Keys of which slices have a multiple where they may: rows of scores then begin where matrix products like them to."""
UNALIGNED_BYTES: Final = 32 * MIB
"""What CUDA's matrix products take beside a slice whose rows of scores do not, at most; measured up to 25 MiB."""


class Handed(Struct, frozen=True):
    """What MLX's SDPA is handed beside an array mask: rows that see nothing opened, numbers in the query's type."""

    batches: int = 0
    """Of the array: one, where it is the same for all."""
    heads: int = 0
    pair_bytes: int = 0
    """Of all arrays on the way there, for a query and a key."""

    def size(self, workload: Workload) -> int:
        """Bytes of it for a call, or for a part of one."""
        arrays = min(self.batches, workload.batch) * min(self.heads, workload.heads)
        return arrays * workload.seq * workload.kv_seq * self.pair_bytes


NOTHING: Final = Handed()


def beside(workload: Workload, backend: Backend, needs: Needs, refusal: str | None, handed: Handed = NOTHING) -> int:
    """Bytes above inputs and outputs of one call of MLX's SDPA, which has a fused kernel unless it has a refusal."""
    if refusal is None:
        spread, given = fused_bytes(workload, backend, needs), fused_bytes(workload, backend) + handed.size(workload)
        sure = SURE_MASK if spreads_mask(workload, backend, needs) else 1.0
        return int(sure * (max(spread, given) - workload.output_bytes))
    unaligned = backend == "cuda" and workload.kv_seq * ITEM_BYTES[workload.dtype] % ALIGNED
    products = UNALIGNED_BYTES if unaligned else 0
    own = int(SURE_SLICE[workload.pass_] * (whole_bytes(workload, backend, needs) - workload.output_bytes))
    return own + handed.size(workload) + products


def slice_size(
    workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed = NOTHING
) -> Blocks | None:
    """The fewest slices of which as many fit a budget as may be in memory at once; None if none of any size does.

    Of as few, those with most rows: what is summed over rows is then written more seldom. Slices of a handful of rows
    are taken only where no others fit: matrix products do not like them. A budget that would give too many for a graph
    is exceeded by as little as helps.
    """
    size = _fitting(workload, backend, needs, budget, handed)
    while size is not None and not is_affordable(_count(size, workload), budget):
        budget = raised(budget)
        size = _fitting(workload, backend, needs, budget, handed)
    return size


def _fitting(workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed) -> Blocks | None:
    """The fewest slices for a budget."""
    most = _rows_at_first(workload, backend, needs)
    sizes = []
    for heads in _heads_together(workload):

        def fits(rows: int, heads: Blocks = heads) -> bool:
            return slices_bytes(workload, structs.replace(heads, rows=rows), backend, needs, handed) <= budget

        rows = most if fits(most) else _about_even(_most_rows(fits, most), workload.seq)
        if rows:
            sizes.append(structs.replace(heads, rows=rows))
    small = min(EVEN, workload.seq)
    return min(sizes, key=lambda size: (size.rows < small, _count(size, workload), -size.rows), default=None)


def _count(blocks: Blocks, workload: Workload) -> int:
    """How many slices of a size there are."""
    sequences = -(-workload.batch // blocks.batches) * -(-workload.kv_heads // blocks.kv_heads)
    return sequences * -(-workload.seq // blocks.rows)


def _heads_together(workload: Workload) -> Iterator[Blocks]:
    """All sequences and heads, half of the sequences and so on to one; then half of the heads and so on to one."""
    blocks = Blocks(batches=workload.batch, kv_heads=workload.kv_heads, rows=1, keys=workload.kv_seq)
    yield blocks
    for axis in ("batches", "kv_heads"):
        while (size := getattr(blocks, axis)) > 1:
            blocks = structs.replace(blocks, **{axis: -(-size // 2)})
            yield blocks


def _most_rows(fits: Callable[[int], bool], below: int) -> int:
    """The most rows that fit, below a number that does not: as many as MLX fuses, or else fewer; 0 if not even one."""
    for step in (EVEN, 1):
        numbers = range(step, (below if step == EVEN else min(below, EVEN)) + 1, step)
        fitting = bisect_left(numbers, True, key=lambda rows: not fits(rows))
        if fitting:
            return numbers[fitting - 1]
    return 0


def _about_even(rows: int, seq: int) -> int:
    """As many slices as of so many rows, but of about the same size."""
    if not rows:
        return 0
    even = -(-seq // -(-seq // rows))
    return min(rows, _even(even + EVEN - 1)) if rows >= EVEN else even


def slices_bytes(workload: Workload, blocks: Blocks, backend: Backend, needs: Needs, handed: Handed = NOTHING) -> int:
    """What slices take at once above inputs and outputs: their own memory, and the sums of dK and dV."""
    odd = workload.seq % EVEN if blocks.rows % EVEN == 0 else 0
    own = max(_own_bytes(workload, blocks, rows, backend, needs, handed) for rows in {blocks.rows, odd} - {0})
    sums = 0
    if workload.pass_ == "training":
        width = workload.head_dim + workload.value_dim
        # the sums, and a share of each of the two slices under way; in half precision another one, converted: measured
        copies = 3 if workload.dtype == "float32" else 4
        sums = copies * 4 * blocks.batches * blocks.kv_heads * workload.kv_seq * width
    return int(AT_ONCE[backend] * own) + sums


def _own_bytes(workload: Workload, blocks: Blocks, rows: int, backend: Backend, needs: Needs, handed: Handed) -> int:
    """What a slice of so many rows takes, with its output and its gradients."""
    group = workload.heads // workload.kv_heads
    keys = workload.kv_seq
    if workload.window is not None:
        keys = min(keys, -(-(rows + workload.window - 1) // ALIGNED) * ALIGNED)
    part = structs.replace(
        workload,
        batch=blocks.batches,
        heads=blocks.kv_heads * group,
        kv_heads=blocks.kv_heads,
        seq=min(rows, workload.seq),
        kv_seq=keys,
    )
    return beside(part, backend, needs, why_unfused(part, backend, needs), handed) + part.output_bytes


def _rows_at_first(workload: Workload, backend: Backend, needs: Needs) -> int:
    """All rows, but for a rest, where MLX fuses them; otherwise as few as let slices skip what a mask rules out."""
    rows = _even(workload.seq) if workload.seq > EVEN else workload.seq
    if workload.window is None and not needs.array_mask:
        first = structs.replace(workload, seq=rows, kv_seq=max(1, workload.kv_seq - workload.seq + rows))
        if why_unfused(first, backend, needs) is None:
            return rows
    return _eighth(workload) if workload.causal or workload.window is not None else workload.seq


def _eighth(workload: Workload) -> int:
    rows = -(-workload.seq // SLICES) + EVEN - 1
    return min(_even(rows), workload.seq)


def _even(rows: int) -> int:
    return rows - rows % EVEN
