"""Attention within a memory budget, forward and backward."""

from collections import OrderedDict
from functools import lru_cache
from typing import Final, Literal

import mlx.core as mx
from msgspec import Struct, structs

from attention import masks
from attention.device import Backend, Device, probe
from attention.implementations.asked import asked_for, here
from attention.implementations.blocks import MIB, Blocks, Shape, choose, seen_keys, tile_bytes
from attention.implementations.blockwise import Call, blocks_of, forward
from attention.implementations.budget import comfort, default_budget
from attention.implementations.differentiable import blocks_behind, blockwise
from attention.implementations.mlx_sdpa import MlxSdpa, fused_bytes, why_unfused
from attention.implementations.packed import KeyOrValue, Packed, attend_packed
from attention.implementations.unfused import unfused_bytes
from attention.masks import Mask, of_workload
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload

FORWARD_ARRAYS: Final = 8
"""Score-sized float32 arrays alive at once in a forward tile, measured: MLX allocates some operations ahead."""
TRAINING_ARRAYS: Final = 20
"""The same in a backward tile under mx.compile, which shares less memory; without it there are about 11."""
WORTHWHILE_SKIP: Final[dict[Backend, float]] = {"cpu": 0.1, "metal": 0.75, "cuda": 0.75}
"""Share of the scores that blocks must skip to be chosen where the whole score matrix would fit.

On a GPU they have more to make up for: what MLX does in three kernels, a tile does in a dozen.
"""
SURE: Final = 1.5
"""How many times what is predicted of an unfused path must fit: its peak depends on the order that MLX finds."""
MOST_CHOICES: Final = 4096
"""Choices that are remembered; a decoding loop asks for a new one at each length."""

Way = Literal["fused", "whole", "fused, blocks behind", "whole, blocks behind", "blocks"]


class Choice(Struct, frozen=True):
    """How a call will be computed."""

    way: Way
    blocks: Blocks
    backward: Blocks
    """The tile of a training pass."""
    reason: str
    fits_forward: bool = False
    """Whether the whole score matrix would fit the budget without a gradient."""


class Practical:
    """MLX's SDPA where that is lean; blocks with an online softmax where it would build large scores."""

    name = "practical"
    takes_sinks = True
    takes_packed = True

    def __init__(self, budget_bytes: int | None = None) -> None:
        """Sets the memory that a call may take above its inputs and outputs; None lets the machine decide."""
        self.budget_bytes = budget_bytes
        self._sdpa = MlxSdpa()
        self._choices: OrderedDict[tuple[Workload, Needs, Backend, int, int], Choice] = OrderedDict()

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """Says whether MLX's SDPA is lean enough, and how large the blocks are where not."""
        choice = self.choice(workload, device, needs)
        whole = choice.way.endswith("blocks behind") and workload.pass_ != "training"
        if choice.way == "fused" or (whole and choice.way.startswith("fused")):
            return Route(
                path="MLX SDPA, fused", fused=True, reason=choice.reason, predicted_bytes=fused_bytes(workload)
            )
        if choice.way == "whole" or whole:
            needed = unfused_bytes(workload, needs)
            return Route(path="MLX SDPA, unfused", fused=False, reason=choice.reason, predicted_bytes=needed)
        tile = f"blocks {choice.blocks.rows} x {seen_keys(shape_of(workload), choice.blocks)}"
        path = f"{choice.way.partition(',')[0]} + {tile}"[:22] if choice.way.endswith("behind") else tile
        return Route(path=path, fused=False, reason=choice.reason, predicted_bytes=_predicted(workload, choice.blocks))

    def __call__(
        self,
        q: mx.array,
        k: KeyOrValue,
        v: KeyOrValue,
        *,
        scale: float,
        mask: Mask,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attends; shapes as in the protocol. The mask gets no gradient; keys and values may be packed.

        `sinks` (H,) are scores that join the softmax of every row of a head, without a value.
        """
        workload, needs = asked_for(q, k, v, mask, softcap)  # type: ignore[arg-type]
        backend = here()
        choice = self._choose(workload, backend, needs, self._budget_here(), _array_bytes(mask, workload))
        if choice.way in ("fused", "whole") and sinks is None and not isinstance(k, Packed):
            return self._sdpa(q, k, v, scale=scale, mask=mask)  # type: ignore[arg-type]
        call = Call(scale, mask, softcap, choice.blocks, "exact" if backend == "cpu" else "native")
        if isinstance(k, Packed) and isinstance(v, Packed):
            if sinks is None and softcap is None and choice.fits_forward:
                return attend_packed(q, k, v, scale=scale, mask=mask)
            return forward(q, k, v, call, sinks)[0]
        given = (q, k, v) if sinks is None else (q, k, v, sinks)
        backward = structs.replace(call, blocks=choice.backward)
        if choice.way == "blocks":
            return blockwise(call, backward)(*given)

        def whole(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None = None) -> mx.array:
            return (
                self._sdpa(q, k, v, scale=scale, mask=mask)
                if sinks is None
                else with_sinks(q, k, v, scale, mask, sinks)
            )

        return blocks_behind(whole, call, backward)(*given)

    def choice(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Choice:
        """How a call would be computed on a device."""
        return self._choose(workload, device.backend, needs, self.budget(device))

    def budget(self, device: Device) -> int:
        """Bytes that a call may take above its inputs and outputs on a device."""
        return self.budget_bytes or default_budget(device.backend, device.memory_bytes)

    def _budget_here(self) -> int:
        return self.budget_bytes or default_budget(here(), _memory())

    def _choose(self, workload: Workload, backend: Backend, needs: Needs, budget: int, array_bytes: int = 0) -> Choice:
        key = (workload, needs, backend, budget, array_bytes)
        if key not in self._choices:
            if len(self._choices) >= MOST_CHOICES:
                self._choices.popitem(last=False)
            self._choices[key] = self._chosen(workload, backend, needs, budget, array_bytes)
        return self._choices[key]

    def _chosen(self, workload: Workload, backend: Backend, needs: Needs, budget: int, array_bytes: int) -> Choice:
        # A call cannot see whether a gradient will be asked of it: what it takes must hold for both passes.
        forward, training = (structs.replace(workload, pass_=pass_) for pass_ in ("forward", "training"))
        blocks, backward = (self.blocks(one, backend, budget) for one in (workload, training))
        fits_forward = surely(forward, needs) + array_bytes <= budget

        def chosen(way: Way, reason: str) -> Choice:
            return Choice(way, blocks, backward, reason, fits_forward)

        if needs.softcap:
            return chosen("blocks", "MLX's SDPA has no softcap")
        refusal = why_unfused(forward, backend, needs)
        behind = refusal or why_unfused(training, backend, needs)
        if not behind:
            return chosen("fused", "MLX has a fused kernel for this shape, backward too")
        if refusal and (skipped := skipped_share(workload, blocks)) >= WORTHWHILE_SKIP[backend]:
            return chosen("blocks", f"{refusal}; blocks skip {skipped:.0%} of the scores")
        excess = surely(training, needs) + array_bytes
        if excess <= budget:
            why = f"{behind}; the scores fit the budget of {mib(budget)}"
            return chosen("whole" if refusal else "fused", why)
        why = f"{behind}; the scores need {mib(excess)} in training, the budget is {mib(budget)}"
        if not refusal:
            return chosen("fused, blocks behind", why)
        if backend != "cpu" and fits_forward:
            return chosen("whole, blocks behind", f"{why}; without a gradient they fit")
        return chosen("blocks", why)

    def blocks(self, workload: Workload, backend: Backend, budget: int | None = None) -> Blocks:
        """The tile for a workload."""
        return choose(shape_of(workload), budget or self._budget_here(), comfort(backend))


def surely(workload: Workload, needs: Needs = PLAIN) -> int:
    """Bytes above inputs and outputs that an unfused path stays within.

    On a CPU keys and values in half precision are multiplied as float32.
    """
    widened = 2 * workload.key_value_bytes if workload.dtype != "float32" else 0
    return int(SURE * (unfused_bytes(workload, needs) - workload.output_bytes)) + widened


def _array_bytes(mask: Mask, workload: Workload) -> int:
    """What MLX's SDPA is handed beside an array mask: rows that see nothing opened, numbers in the query's type."""
    if mask.array is None:
        return 0
    opened = workload.seq * workload.kv_seq * (masks.as_4d(mask.array).shape[0] * masks.as_4d(mask.array).shape[1])
    return opened * (2 if mask.array.dtype == mx.bool_ else 12)


def with_sinks(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, sinks: mx.array) -> mx.array:
    """MLX's SDPA with attention sinks; a row that sees nothing else gives 0 by itself."""
    lengths = q.shape[2], k.shape[2]
    named = mask.causal and mask.window is None and mask.array is None and not mask.blind_rows(*lengths)
    whole = "causal" if named else mask.whole(*lengths)
    if isinstance(whole, mx.array) and whole.dtype != mx.bool_:
        whole = masks.in_type(whole, q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=whole, sinks=sinks.astype(q.dtype))


@lru_cache(maxsize=1)
def _memory() -> int:
    return probe().memory_bytes


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


def _predicted(workload: Workload, blocks: Blocks) -> int:
    """Outputs, logsumexp and a tile's working memory."""
    rows = workload.batch * workload.heads * workload.seq
    return workload.output_bytes + 4 * rows + tile_bytes(shape_of(workload), blocks)


def mib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / MIB:,.0f} MiB"
