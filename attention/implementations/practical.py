"""Attention within a memory budget, forward and backward."""

from collections.abc import Callable, Sequence
from typing import Final, Literal, cast

import mlx.core as mx
from msgspec import Struct, structs

from attention.device import Backend, Device
from attention.implementations.asked import asked_for, here
from attention.implementations.blocks import DEFAULT_BUDGET_BYTES, MIB, Blocks, Shape, choose, seen_keys, tile_bytes
from attention.implementations.blockwise import Call, blocks_of, forward
from attention.implementations.blockwise_gradient import Saved, gradients
from attention.implementations.mlx_sdpa import MlxSdpa, fused_bytes, why_unfused
from attention.implementations.unfused import unfused_bytes
from attention.masks import Mask, of_workload
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload

FORWARD_ARRAYS: Final = 8
"""Score-sized float32 arrays alive at once in a forward tile, measured: MLX allocates some operations ahead."""
TRAINING_ARRAYS: Final = 20
"""The same in a backward tile under mx.compile, which shares less memory; without it there are about 11."""
CPU_COMFORT_BYTES: Final = 32 * MIB
WORTHWHILE_SKIP: Final = 0.1
"""Share of the scores that blocks must skip to be chosen where the whole score matrix would fit."""

Way = Literal["fused", "whole", "fused, blocks behind", "blocks"]


class Choice(Struct, frozen=True):
    """How a call will be computed."""

    way: Way
    blocks: Blocks
    reason: str


class Practical:
    """MLX's SDPA where that is lean; blocks with an online softmax where it would build large scores."""

    name = "practical"

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        """Sets the memory that a call may take above its inputs and outputs."""
        self.budget_bytes = budget_bytes
        self._sdpa = MlxSdpa()
        self._choices: dict[tuple[Workload, Needs, Backend], Choice] = {}

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """Says whether MLX's SDPA is lean enough, and how large the blocks are where not."""
        choice = self._choose(workload, device.backend, needs)
        backward = workload.pass_ == "training"
        if choice.way == "fused" or (choice.way == "fused, blocks behind" and not backward):
            return Route(
                path="MLX SDPA, fused", fused=True, reason=choice.reason, predicted_bytes=fused_bytes(workload)
            )
        if choice.way == "whole":
            needed = unfused_bytes(workload, needs)
            return Route(path="MLX SDPA, unfused", fused=False, reason=choice.reason, predicted_bytes=needed)
        tile = f"blocks {choice.blocks.rows} x {seen_keys(_shape(workload), choice.blocks)}"
        path = f"fused + {tile}"[:22] if choice.way == "fused, blocks behind" else tile
        return Route(path=path, fused=False, reason=choice.reason, predicted_bytes=_predicted(workload, choice.blocks))

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Attends; shapes as in the protocol. The mask gets no gradient."""
        workload, needs = asked_for(q, k, v, mask, softcap)
        backend = here()
        choice = self._choose(workload, backend, needs)
        if choice.way in ("fused", "whole"):
            return self._sdpa(q, k, v, scale=scale, mask=mask)
        call = Call(scale, mask, softcap, choice.blocks, "exact" if backend == "cpu" else "native")
        backward = structs.replace(call, blocks=self.blocks(structs.replace(workload, pass_="training"), backend))
        if choice.way == "blocks":
            return _blockwise(call, backward)(q, k, v)
        return _blocks_behind(self._sdpa, call, backward)(q, k, v)

    def _choose(self, workload: Workload, backend: Backend, needs: Needs) -> Choice:
        key = (workload, needs, backend)
        if key not in self._choices:
            self._choices[key] = self._chosen(workload, backend, needs)
        return self._choices[key]

    def _chosen(self, workload: Workload, backend: Backend, needs: Needs) -> Choice:
        blocks = self.blocks(workload, backend)
        if needs.softcap:
            return Choice("blocks", blocks, "MLX's SDPA has no softcap")
        # A call cannot see whether a gradient will be asked of it: what it takes must hold for both passes.
        backward = structs.replace(workload, pass_="training")
        refusal = why_unfused(structs.replace(workload, pass_="forward"), backend, needs)
        behind = refusal or why_unfused(backward, backend, needs)
        if not behind:
            return Choice("fused", blocks, "MLX has a fused kernel for this shape, backward too")
        excess = unfused_bytes(backward, needs) - backward.output_bytes
        if excess <= self.budget_bytes:
            skipped = skipped_share(workload, blocks)
            if not refusal:
                return Choice("fused", blocks, "MLX has a fused kernel, and its backward pass fits the budget")
            if skipped < WORTHWHILE_SKIP:
                return Choice("whole", blocks, f"{refusal}; the scores fit the budget of {_mib(self.budget_bytes)}")
            return Choice("blocks", blocks, f"{refusal}; blocks skip {skipped:.0%} of the scores")
        text = f"the scores need {_mib(excess)} in training, the budget is {_mib(self.budget_bytes)}"
        way: Way = "blocks" if refusal else "fused, blocks behind"
        return Choice(way, blocks, f"{behind}; {text}")

    def blocks(self, workload: Workload, backend: Backend) -> Blocks:
        """The tile for a workload."""
        return choose(_shape(workload), self.budget_bytes, CPU_COMFORT_BYTES if backend == "cpu" else None)


def skipped_share(workload: Workload, blocks: Blocks) -> float:
    """The share of the score matrix that lies in no tile because the mask rules it out."""
    mask, seq, kv_seq = of_workload(workload), workload.seq, workload.kv_seq
    computed = sum(len(rows) * len(mask.visible_keys(rows, seq, kv_seq)) for rows in blocks_of(seq, blocks.rows))
    return 1.0 - computed / (seq * kv_seq)


def _shape(workload: Workload) -> Shape:
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


def _predicted(workload: Workload, blocks: Blocks) -> int:
    """Outputs and logsumexp, and the larger of a tile's working memory and the copy in which blocks are joined."""
    rows = workload.batch * workload.heads * workload.seq
    return workload.output_bytes + 8 * rows + max(tile_bytes(_shape(workload), blocks), workload.output_bytes)


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
Triple = tuple[mx.array, mx.array, mx.array]


def _blockwise(call: Call, backward: Call) -> Attend:
    """The blockwise attention with its own gradient."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        return forward(q, k, v, call)

    def pull_back(primals: Triple, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Triple:
        d_q, d_k, d_v = gradients(Saved(*primals, outputs[0], outputs[1], cotangents[0]), backward)
        return d_q, d_k, d_v

    attend.vjp(pull_back)
    return lambda q, k, v: cast("tuple[mx.array, mx.array]", attend(q, k, v))[0]


def _blocks_behind(sdpa: MlxSdpa, call: Call, backward: Call) -> Attend:
    """MLX's fused forward pass; its unfused backward pass replaced by blocks, which recompute the logsumexp."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return sdpa(q, k, v, scale=call.scale, mask=call.mask)

    def pull_back(primals: Triple, cotangent: mx.array, output: mx.array) -> Triple:
        _, logsumexp = forward(*primals, call)
        d_q, d_k, d_v = gradients(Saved(*primals, output, logsumexp, cotangent), backward)
        return d_q, d_k, d_v

    attend.vjp(pull_back)
    return cast("Attend", attend)
