"""Attention within a memory budget, forward and backward."""

from collections import OrderedDict
from functools import lru_cache
from typing import Final

import mlx.core as mx
from msgspec import structs

from attention import masks
from attention.core.route import PLAIN, Needs, Route
from attention.core.workload import ITEM_BYTES, DType, Workload
from attention.implementations import call_hooks
from attention.implementations.baseline import is_widened, named_products, whole_bytes
from attention.implementations.bounded import slicing
from attention.implementations.bounded.blocks import Blocks, seen_keys, tile_bytes
from attention.implementations.bounded.blockwise import Call, arithmetic_of, forward
from attention.implementations.bounded.blockwise_gradient import Arrays, Attend, blocks_behind, blockwise
from attention.implementations.bounded.memory import AT_ONCE, QUEUED, at_once, turns
from attention.implementations.bounded.policy import (
    NOTHING,
    Choice,
    Handed,
    choice,
    default_budget,
    shape_of,
    slices_bytes,
)
from attention.implementations.bounded.slicing import Slices
from attention.implementations.call_signature import asked_for, here
from attention.implementations.mlx_sdpa import attend_whole, fused_bytes
from attention.implementations.quantized_kv import KeyOrValue, Packed, attend_packed
from attention.implementations.transforms import with_mask_gradient
from attention.masks import Mask
from attention.measure.device import Backend, Device, probe

MOST_CHOICES: Final = 4096
"""Choices that are remembered; a decoding loop asks for a new one at each length."""
MAX_PATHS: Final = 4096
WHOLE: Final = {"fused": "MLX SDPA, fused", "whole": "MLX SDPA, unfused"}
PACKED: Final = "packed keys and values"


class Practical:
    """MLX's SDPA where that is lean; slices or blocks of attention where it would build large scores."""

    name = "practical"
    takes_sinks = True
    takes_packed = True

    def __init__(self, budget_bytes: int | None = None) -> None:
        """Sets the memory that a call may take above its inputs and outputs; None lets the machine decide."""
        self.budget_bytes = budget_bytes
        self._choices: OrderedDict[tuple[Workload, Needs, Backend, int], Choice] = OrderedDict()
        self._plain: dict[object, tuple[str, bool]] = {}

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """Says whether MLX's SDPA is lean enough, and how large the slices or blocks are where not."""
        choice = self.choice(workload, device, needs)
        whole, _, behind = choice.way.partition(", ")
        if not choice.cuts_forward and (not (behind or needs.sinks) or workload.pass_ != "training"):
            fused = whole == "fused"
            needed = (fused_bytes if fused else whole_bytes)(workload, device.backend, needs)
            return Route(
                path=_whole_path(whole, workload.dtype, device.backend),
                fused=fused,
                reason=choice.reason,
                predicted_bytes=needed,
            )
        kind, parts, needed = _parts(choice, workload, device, needs)
        path = f"{whole} + {kind} {parts.rows}"
        if choice.cuts_forward:
            path = _cut_path(kind, parts, workload, device.backend)
        return Route(path=path, fused=False, reason=choice.reason, predicted_bytes=needed)

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
        """Attends; shapes as in the protocol. Keys and values may be packed.

        `sinks` (H,) are scores that join the softmax of every row of a head, without a value.
        """
        if mask.array is None or mask.array.dtype == mx.bool_ or isinstance(k, Packed) or isinstance(v, Packed):
            return self._attend(q, k, v, scale, mask, softcap, sinks)
        return with_mask_gradient(
            lambda mask: self._attend(q, k, v, scale, mask, softcap, sinks),
            *(q, k, v),
            scale=scale,
            mask=mask,
            softcap=softcap,
            sinks=sinks,
            budget_bytes=self._budget_here(),
        )

    def _attend(
        self,
        q: mx.array,
        k: KeyOrValue,
        v: KeyOrValue,
        scale: float,
        mask: Mask,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        shape = None if mask.array is None else (mask.array.shape, mask.array.dtype)
        key = (q.shape, k.shape, v.shape, q.dtype, mask.causal, mask.window, shape, here(), self.budget_bytes)
        simple = sinks is None and softcap is None and not isinstance(k, Packed)
        if simple and (known := self._plain.get(key)) is not None:
            path, widened = known
            call_hooks.ran(path)
            return attend_whole(q, k, v, scale, mask, widened)  # type: ignore[arg-type]
        workload, needs = asked_for(q, k, v, mask, softcap)  # type: ignore[arg-type]
        needs = needs if sinks is None else structs.replace(needs, sinks=True)
        backend = here()
        choice = self._choose(workload, backend, needs, self._budget_here())
        if simple and choice.way in ("fused", "whole"):
            if len(self._plain) >= MOST_CHOICES:
                self._plain.clear()
            path = _whole_path(choice.way, workload.dtype, backend)
            widened = _widened(choice, q.dtype, backend)
            self._plain[key] = path, widened
            call_hooks.ran(path)
            return attend_whole(q, k, v, scale, mask, widened)  # type: ignore[arg-type]
        call_hooks.ran(_forward_path(choice, workload, needs, backend, isinstance(k, Packed)))
        if isinstance(k, Packed) and isinstance(v, Packed):
            call, _ = self._calls(choice, backend, scale, mask, softcap, q.dtype)
            if sinks is None and softcap is None and choice.fits_forward:
                return attend_packed(q, k, v, scale=scale, mask=mask)
            return forward(q, k, v, call, sinks)[0]
        if simple and choice.slices is not None:
            made = self._in_slices(choice, backend, scale, mask, q.dtype)
        else:
            made = self._in_blocks(choice, backend, scale, mask, softcap, q.dtype)
        array = [] if mask.array is None else [masks.as_4d(mask.array)]
        return made(q, k, v, array, [] if sinks is None else [sinks])

    def _in_slices(self, choice: Choice, backend: Backend, scale: float, mask: Mask, dtype: mx.Dtype) -> Attend:
        follow = turns(backend) if choice.waits else QUEUED

        def whole(q: mx.array, k: mx.array, v: mx.array, array: Arrays, _: Arrays) -> mx.array:
            if choice.cuts_forward and choice.slices is not None:
                return slicing.forward(q, k, v, Slices(scale, mask.having(array), choice.slices, follow))
            return attend_whole(q, k, v, scale, mask.having(array), _widened(choice, q.dtype, backend))

        if choice.backward_slices is None:
            return blocks_behind(whole, *self._calls(choice, backend, scale, mask, None, dtype))
        return slicing.sliced_behind(whole, Slices(scale, mask, choice.backward_slices, follow))

    def _calls(
        self, choice: Choice, backend: Backend, scale: float, mask: Mask, softcap: float | None, dtype: mx.Dtype
    ) -> tuple[Call, Call]:
        """Of blocks, forward and backward."""
        follow = at_once if backend == "cpu" else turns(backend).next
        shifted = dtype != mx.float32
        call = Call(scale, mask, softcap, choice.blocks, arithmetic_of(dtype, backend), follow, shifted)
        return call, structs.replace(call, blocks=choice.backward)

    def _in_blocks(
        self, choice: Choice, backend: Backend, scale: float, mask: Mask, softcap: float | None, dtype: mx.Dtype
    ) -> Attend:
        call, backward = self._calls(choice, backend, scale, mask, softcap, dtype)
        if choice.cuts_forward:
            return blockwise(call, backward)

        def whole(q: mx.array, k: mx.array, v: mx.array, array: Arrays, sinks: Arrays) -> mx.array:
            return attend_whole(q, k, v, scale, mask.having(array), _widened(choice, q.dtype, backend), *sinks)

        return blocks_behind(whole, call, backward)

    def choice(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Choice:
        """How a call would be computed on a device."""
        return self._choose(workload, device.backend, needs, self.budget(device))

    def budget(self, device: Device) -> int:
        """Bytes that a call may take above its inputs and outputs on a device."""
        return self.budget_bytes or default_budget(device.backend, device.memory_bytes)

    def _budget_here(self) -> int:
        return self.budget_bytes or default_budget(here(), _memory())

    def _choose(self, workload: Workload, backend: Backend, needs: Needs, budget: int) -> Choice:
        """Choose for a route and for a call alike, from what both know."""
        key = (workload, needs, backend, budget)
        if key not in self._choices:
            if len(self._choices) >= MOST_CHOICES:
                self._choices.popitem(last=False)
            self._choices[key] = choice(workload, backend, needs, budget, _handed(needs, workload.dtype, backend))
        return self._choices[key]


def _widened(choice: Choice, dtype: mx.Dtype, backend: Backend) -> bool:
    """Whether what is left whole is computed in float32."""
    return choice.way.startswith("whole") and is_widened(masks.dtype_name(dtype), backend)


def _handed(needs: Needs, dtype: DType, backend: Backend) -> Handed:
    """An opened copy of an array mask; numbers in another type than the scores' are clipped in float32 first."""
    if not needs.array_mask:
        return NOTHING
    scores: DType = "float32" if is_widened(dtype, backend) else dtype
    own = needs.mask_dtype or dtype
    item_bytes = 1 if own == "bool" else ITEM_BYTES[scores]
    return Handed(needs.mask_batches, needs.mask_heads, 2 * item_bytes if own in ("bool", scores) else 12)


@lru_cache(maxsize=1)
def _memory() -> int:
    return probe().memory_bytes


@lru_cache(maxsize=MAX_PATHS)
def _forward_path(choice: Choice, workload: Workload, needs: Needs, backend: Backend, packed: bool) -> str:
    """What a forward pass does that is not handed to MLX's SDPA as a whole."""
    if packed:
        return PACKED
    if not choice.cuts_forward:
        return _whole_path(choice.way.partition(", ")[0], workload.dtype, backend)
    sliced = choice.slices is not None and not (needs.sinks or needs.softcap)
    kind, parts = ("slices", choice.slices) if sliced and choice.slices else ("blocks", choice.blocks)
    return _cut_path(kind, parts, workload, backend)


def _whole_path(whole: str, dtype: DType, backend: Backend) -> str:
    """MLX's SDPA on all rows and heads; its fused kernels keep float32."""
    return WHOLE[whole] if whole == "fused" else named_products(WHOLE[whole], dtype, backend)


def _cut_path(kind: str, parts: Blocks, workload: Workload, backend: Backend) -> str:
    path = f"{kind} {parts.rows} x {seen_keys(shape_of(workload), parts)}"
    return named_products(path, workload.dtype, backend) if kind == "slices" else path


def _parts(choice: Choice, workload: Workload, device: Device, needs: Needs) -> tuple[str, Blocks, int]:
    """What the parts of a call are called, their size, and the bytes that are predicted of them, outputs included."""
    slices = choice.backward_slices if workload.pass_ == "training" else choice.slices
    if slices is not None and not needs.sinks:
        size = slices_bytes(workload, slices, device.backend, needs)
        together = whole_bytes(workload, device.backend, needs) - workload.output_bytes
        return "slices", slices, workload.output_bytes + (size if choice.waits else min(size, together))
    rows = workload.batch * workload.heads * workload.seq
    tiles = int(AT_ONCE[device.backend] * tile_bytes(shape_of(workload), choice.blocks))
    return "blocks", choice.blocks, workload.output_bytes + 4 * rows + tiles
