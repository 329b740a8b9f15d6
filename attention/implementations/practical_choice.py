"""How `practical` computes a call: as a whole, in slices or in blocks, and how large these are."""

from typing import Final, Literal

from msgspec import Struct, structs

from attention.device import Backend
from attention.implementations.blocks import MIB, Blocks, Shape, choose
from attention.implementations.blockwise import blocks_of
from attention.implementations.budget import comfort
from attention.implementations.mlx_sdpa import fused_bytes, why_unfused
from attention.implementations.unfused import unfused_bytes
from attention.implementations.waiting import AT_ONCE
from attention.masks import of_workload
from attention.route import PLAIN, Needs
from attention.workload import ITEM_BYTES, Workload

FORWARD_ARRAYS: Final = 8
"""Score-sized float32 arrays alive at once in a forward tile, measured: MLX allocates some operations ahead."""
TRAINING_ARRAYS: Final = 20
"""The same in a backward tile under mx.compile, which shares less memory; without it there are about 11."""
WORTHWHILE_SKIP: Final = 0.1
"""Share of the scores that must be skipped for blocks to be chosen on a CPU where the whole score matrix would fit."""
WORTHWHILE_BACKWARD_BYTES: Final = 256 * MIB
"""A smaller gradient is left whole where MLX can only fuse it for a multiple of 128 rows."""
SURE: Final = 1.5
"""How many times what is predicted of an unfused path must fit: its peak depends on the order that MLX finds."""
SURE_SLICE: Final = 1.15
"""The same of one slice, a single call of MLX's own with nothing before or after it."""
SLICES: Final = 8
"""Slices of rows under a mask that lets the later ones see more: they skip 7 of 16 parts of the scores."""
EVEN: Final = 128
"""Rows of which slices have a multiple where they have as many: MLX's fused backward on CUDA asks for it."""

FUSED: Final = "MLX has a fused kernel for this shape, backward too"

Way = Literal[
    "fused",
    "whole",
    "fused, blocks behind",
    "whole, blocks behind",
    "fused, slices behind",
    "whole, slices behind",
    "slices",
    "blocks",
]


class Choice(Struct, frozen=True):
    """How a call will be computed."""

    way: Way
    blocks: Blocks
    """The tile, where blocks are taken: also for what slices cannot do."""
    backward: Blocks
    """The tile of a training pass."""
    reason: str
    fits_forward: bool = False
    """Whether the whole score matrix would fit the budget without a gradient."""
    slices: Blocks | None = None
    """The size of a slice, and of one of a training pass, where slices are taken."""
    backward_slices: Blocks | None = None
    waits: bool = False
    """Whether slices have to wait for each other, since all of them together would not fit."""


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


def choice(workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed = NOTHING) -> Choice:
    """How a call is computed within a budget.

    Args:
        workload: the call.
        backend: where.
        needs: what goes beyond the workload.
        budget: bytes above inputs and outputs.
        handed: what MLX's SDPA is handed beside an array mask.
    """
    ask = _ask_cpu if backend == "cpu" or needs.softcap else _ask_gpu
    return ask(_Question(workload, backend, needs, budget, handed))


class _Question:
    """What is asked, and what MLX would do with it."""

    def __init__(self, workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed) -> None:
        self.workload, self.backend, self.needs, self.budget, self.handed = workload, backend, needs, budget, handed
        # A call cannot see whether a gradient will be asked of it: what it takes must hold for both passes.
        self.forward, self.training = (structs.replace(workload, pass_=pass_) for pass_ in ("forward", "training"))
        self.fits_forward = surely(self.forward, needs) + handed.size(workload) <= budget
        self.excess = surely(self.training, needs) + handed.size(workload)
        self.refusal = None if needs.softcap else why_unfused(self.forward, backend, needs)
        self.behind = self.refusal or (None if needs.softcap else why_unfused(self.training, backend, needs))

    def told(self, way: Way, reason: str, waits: bool = False) -> Choice:
        blocks, backward = (tile(one, self.backend, self.budget) for one in (self.workload, self.training))
        made = Choice(way, blocks, backward, reason, self.fits_forward, waits=waits)
        if "slices" not in way:
            return made
        slices, behind = (
            slice_size(one, self.backend, self.needs, self.budget, self.handed) for one in (self.forward, self.training)
        )
        return structs.replace(made, slices=slices, backward_slices=behind)

    @property
    def too_much(self) -> str:
        return f"the scores need {mib(self.excess)} in training, the budget is {mib(self.budget)}"

    @property
    def enough(self) -> str:
        return f"{self.behind}; the scores fit the budget of {mib(self.budget)}"


def _ask_cpu(asked: _Question) -> Choice:
    """Blocks with an online softmax: they are what a CPU's caches like; anywhere, what MLX's SDPA cannot do."""
    if asked.needs.softcap:
        return asked.told("blocks", "MLX's SDPA has no softcap")
    if not asked.behind:
        return asked.told("fused", FUSED)
    skipped = skipped_share(asked.workload, tile(asked.workload, asked.backend, asked.budget))
    if asked.refusal and skipped >= WORTHWHILE_SKIP:
        return asked.told("blocks", f"{asked.refusal}; blocks skip {skipped:.0%} of the scores")
    if asked.excess <= asked.budget:
        return asked.told("whole" if asked.refusal else "fused", asked.enough)
    return asked.told("blocks" if asked.refusal else "fused, blocks behind", f"{asked.behind}; {asked.too_much}")


def _ask_gpu(asked: _Question) -> Choice:
    """Slices, as large as the budget lets them be, where the whole does not fit: a GPU wants few and large kernels."""
    forward, training = (
        beside(one, asked.backend, asked.needs, refusal, asked.handed)
        for one, refusal in ((asked.forward, asked.refusal), (asked.training, asked.behind))
    )
    if not asked.behind:
        if max(forward, training) <= asked.budget:
            return asked.told("fused", FUSED)
        needed = f"MLX's fused kernels need {mib(max(forward, training))}, with what they make of a mask"
        why = f"{needed}; the budget is {mib(asked.budget)}"
        return asked.told("fused, slices behind" if forward <= asked.budget else "slices", why, waits=True)
    fits = max(forward, asked.excess) <= asked.budget
    scores = asked.workload.scores * ITEM_BYTES[asked.workload.dtype]
    uneven = asked.backend == "cuda" and not asked.refusal and asked.workload.seq > EVEN
    if fits and not (uneven and scores >= WORTHWHILE_BACKWARD_BYTES):
        return asked.told("whole" if asked.refusal else "fused", asked.enough)
    why = f"{asked.behind}; {'slices of such rows have one' if fits else asked.too_much}"
    if forward <= asked.budget:
        return asked.told("whole, slices behind" if asked.refusal else "fused, slices behind", why, waits=not fits)
    return asked.told("slices", why, waits=True)


def beside(workload: Workload, backend: Backend, needs: Needs, refusal: str | None, handed: Handed = NOTHING) -> int:
    """Bytes above inputs and outputs of one call of MLX's SDPA, which has a fused kernel unless it has a refusal."""
    if refusal is None:
        spread, given = fused_bytes(workload, backend, needs), fused_bytes(workload, backend) + handed.size(workload)
        return max(spread, given) - workload.output_bytes
    return int(SURE_SLICE * (unfused_bytes(workload, needs) - workload.output_bytes)) + handed.size(workload)


def slice_size(workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed = NOTHING) -> Blocks:
    """The largest slices of which as many fit a budget as may be in memory at once."""
    rows = _rows_at_first(workload, backend, needs)
    blocks = Blocks(batches=workload.batch, kv_heads=workload.kv_heads, rows=rows, keys=workload.kv_seq)
    while slices_bytes(workload, blocks, backend, needs, handed) > budget:
        smaller = _smaller(blocks)
        if smaller == blocks:
            break
        blocks = smaller
    return blocks


def slices_bytes(workload: Workload, blocks: Blocks, backend: Backend, needs: Needs, handed: Handed = NOTHING) -> int:
    """What slices take at once above inputs and outputs: their own memory, and the sums of dK and dV."""
    group = workload.heads // workload.kv_heads
    keys = workload.kv_seq if workload.window is None else min(workload.kv_seq, blocks.rows + workload.window - 1)
    part = structs.replace(
        workload,
        batch=blocks.batches,
        heads=blocks.kv_heads * group,
        kv_heads=blocks.kv_heads,
        seq=min(blocks.rows, workload.seq),
        kv_seq=keys,
    )
    sums = 0
    if workload.pass_ == "training":
        width = workload.head_dim + workload.value_dim
        sums = 3 * 4 * blocks.batches * blocks.kv_heads * workload.kv_seq * width
    own = beside(part, backend, needs, why_unfused(part, backend, needs), handed) + part.output_bytes
    return int(AT_ONCE[backend] * own) + sums


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


def _smaller(blocks: Blocks) -> Blocks:
    """Half of the sequences, or of the heads, or of the rows: whichever there is more than one of."""
    for axis in ("batches", "kv_heads"):
        if getattr(blocks, axis) > 1:
            return structs.replace(blocks, **{axis: -(-getattr(blocks, axis) // 2)})
    half = -(-blocks.rows // 2)
    return structs.replace(blocks, rows=_even(half) if half > EVEN else half)


def _even(rows: int) -> int:
    return rows - rows % EVEN


def tile(workload: Workload, backend: Backend, budget: int) -> Blocks:
    """The tile of blocks for a workload."""
    return choose(shape_of(workload), int(budget / AT_ONCE[backend]), comfort(backend))


def surely(workload: Workload, needs: Needs = PLAIN) -> int:
    """Bytes above inputs and outputs that an unfused path stays within.

    On a CPU keys and values in half precision are multiplied as float32.
    """
    widened = 2 * workload.key_value_bytes if workload.dtype != "float32" else 0
    return int(SURE * (unfused_bytes(workload, needs) - workload.output_bytes)) + widened


def skipped_share(workload: Workload, blocks: Blocks) -> float:
    """The share of the score matrix that lies in no tile because the mask rules it out."""
    mask, seq, kv_seq = of_workload(workload), workload.seq, workload.kv_seq
    computed = sum(len(rows) * len(mask.visible_keys(rows, seq, kv_seq)) for rows in blocks_of(seq, blocks.rows))
    return 1.0 - computed / (seq * kv_seq)


def shape_of(workload: Workload) -> Shape:
    """What block sizes depend on."""
    training = workload.pass_ == "training"
    return Shape(
        batch=workload.batch,
        kv_heads=workload.kv_heads,
        group=workload.heads // workload.kv_heads,
        seq=workload.seq,
        kv_seq=workload.kv_seq,
        head_dim=workload.head_dim,
        value_dim=workload.value_dim,
        score_bytes=4 * (TRAINING_ARRAYS if training else FORWARD_ARRAYS),
        window=workload.window,
        training=training,
    )


def mib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / MIB:,.0f} MiB"
