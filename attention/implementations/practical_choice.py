"""The policy of `practical`: compute a call as a whole, in slices or in blocks, and of which size."""

from typing import Final, Literal, cast

from msgspec import Struct, structs

from attention.device import Backend
from attention.implementations.blocks import MIB, Blocks, Shape, choose
from attention.implementations.blockwise import blocks_of
from attention.implementations.budget import comfort
from attention.implementations.mlx_sdpa import why_unfused
from attention.implementations.slice_size import EVEN, NOTHING, Handed, beside, slice_size
from attention.implementations.unfused import in_tf32, whole_bytes
from attention.implementations.waiting import AT_ONCE
from attention.masks import of_workload
from attention.route import PLAIN, Needs
from attention.workload import ITEM_BYTES, Workload

FORWARD_ARRAYS: Final = 8
"""Score-sized float32 arrays alive at once in a forward tile, measured: MLX allocates a few operations ahead."""
TRAINING_ARRAYS: Final = 20
"""Score-sized float32 arrays alive at once in a backward tile under mx.compile; about 11 without it."""
WORTHWHILE_SKIP: Final = 0.1
"""Minimum share of skipped scores for blocks on a CPU if the whole score matrix would fit."""
WORTHWHILE_BACKWARD_BYTES: Final = 256 * MIB
"""A smaller gradient is computed as a whole if MLX can fuse it only for a multiple of 128 rows."""
SURE: Final = 1.5
"""Safety factor on the predicted bytes of an unfused path, whose peak depends on MLX's evaluation order."""
FUSED: Final = "MLX has a fused kernel for this shape, backward too"

Way = Literal[
    "fused",
    "whole",
    "fused, blocks behind",
    "whole, blocks behind",
    "fused, slices behind",
    "whole, slices behind",
    "slices",
    "slices, blocks behind",
    "blocks",
]


class Choice(Struct, frozen=True):
    """The strategy for a call."""

    way: Way
    blocks: Blocks
    """Tile of blocks, used also for what slices cannot do."""
    backward: Blocks
    """Tile of the backward pass."""
    reason: str
    fits_forward: bool = False
    """Whether the whole score matrix fits the budget without a gradient."""
    slices: Blocks | None = None
    """Size of a slice, forward and training, if slices are used."""
    backward_slices: Blocks | None = None
    waits: bool = False
    """Whether slices must run one after another because they do not fit in memory together."""

    @property
    def cuts_forward(self) -> bool:
        """Whether the forward pass is also split into slices or blocks."""
        return self.way.startswith(("slices", "blocks"))


def choice(workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed = NOTHING) -> Choice:
    """Choose the strategy of a call within a budget.

    Args:
        workload: the call.
        backend: the backend it runs on.
        needs: features that the workload does not describe.
        budget: bytes above inputs and outputs.
        handed: what MLX's SDPA is handed beside an array mask.
    """
    ask = _ask_cpu if backend == "cpu" or needs.softcap else _ask_gpu
    return ask(_Question(workload, backend, needs, budget, handed))


class _Question:
    """A call with its budget, and how MLX would compute it."""

    def __init__(self, workload: Workload, backend: Backend, needs: Needs, budget: int, handed: Handed) -> None:
        self.workload, self.backend, self.needs, self.budget, self.handed = workload, backend, needs, budget, handed
        # A call cannot know whether its gradient will be needed: the strategy must hold for both passes.
        self.forward, self.training = (structs.replace(workload, pass_=pass_) for pass_ in ("forward", "training"))
        self.fits_forward = surely(self.forward, backend, needs) + handed.size(workload) <= budget
        self.excess = surely(self.training, backend, needs) + handed.size(workload)
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
        if way == "slices" and slices is None:
            return structs.replace(made, way="blocks", reason=f"{reason}, and no slice fits it")
        if behind is None and not way.startswith("fused") and in_tf32(self.workload.dtype, self.backend):
            why = f"{reason}, and a gradient in blocks does not match an output in TF32"
            return structs.replace(made, way="blocks", reason=why)
        if behind is None:
            tighter = f"{reason}, and no slice of a backward pass fits it"
            way = cast("Way", f"{way.partition(',')[0]}, blocks behind")
            return structs.replace(made, way=way, reason=tighter, slices=slices)
        return structs.replace(made, slices=slices, backward_slices=behind)

    @property
    def too_much(self) -> str:
        return f"the scores need {mib(self.excess)} in training, the budget is {mib(self.budget)}"

    @property
    def enough(self) -> str:
        return f"{self.behind}; the scores fit the budget of {mib(self.budget)}"


def _ask_cpu(asked: _Question) -> Choice:
    """Choose blocks with an online softmax, which suit a CPU's caches, unless the whole call is better."""
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
    """Choose the largest slices that fit the budget if the whole call does not: a GPU prefers few, large kernels."""
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


def tile(workload: Workload, backend: Backend, budget: int) -> Blocks:
    """Return the tile size of blocks for a workload."""
    return choose(shape_of(workload), int(budget / AT_ONCE[backend]), comfort(backend))


def surely(workload: Workload, backend: Backend, needs: Needs = PLAIN) -> int:
    """Return an upper bound of an unfused path's bytes above inputs and outputs."""
    return int(SURE * (whole_bytes(workload, backend, needs) - workload.output_bytes))


def skipped_share(workload: Workload, blocks: Blocks) -> float:
    """Return the share of the score matrix in tiles that are skipped because they are fully masked."""
    mask, seq, kv_seq = of_workload(workload), workload.seq, workload.kv_seq
    computed = sum(len(rows) * len(mask.visible_keys(rows, seq, kv_seq)) for rows in blocks_of(seq, blocks.rows))
    return 1.0 - computed / (seq * kv_seq)


def shape_of(workload: Workload) -> Shape:
    """Return the sizes that block sizes depend on."""
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
        causal=workload.causal,
        window=workload.window,
        training=training,
    )


def mib(size: int) -> str:
    """Format bytes: in MiB below 10 GiB, beyond in GiB and TiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30)):
        if size >= 10 * factor:
            return f"{size / factor:,.0f} {unit}"
    return f"{size / MIB:,.0f} MiB"
