"""Attention within a memory budget, forward and backward."""

from functools import lru_cache
from typing import Final

import mlx.core as mx
from msgspec import structs

from attention import masks
from attention.core.bounded_dict import BoundedDict
from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import ITEM_BYTES, DType, Workload
from attention.implementations.baseline import computes_in_float32, unfused_call_bytes, with_tf32
from attention.implementations.bounded import slicing
from attention.implementations.bounded.blocks import Blocks, tile_bytes, visible_keys
from attention.implementations.bounded.blockwise import BlockwiseParams, arithmetic_of, forward, row_shifts
from attention.implementations.bounded.blockwise_gradient import (
    Arrays,
    Attend,
    blockwise,
    logsumexp_of,
    with_blockwise_backward,
)
from attention.implementations.bounded.listed import tile_map
from attention.implementations.bounded.memory import RESIDENT_TILES, UNORDERED, no_fence, tile_order
from attention.implementations.bounded.policy import (
    NO_MASK_COPIES,
    MaskCopies,
    Method,
    Strategy,
    choose_strategy,
    default_budget,
    listed_strategy,
    problem_size,
    quantized_strategy,
    slices_bytes,
)
from attention.implementations.bounded.slicing import SlicedParams
from attention.implementations.calls import call_signature, current_backend, needs_with_mask, record_path
from attention.implementations.mlx_sdpa import attend_whole, fused_bytes
from attention.implementations.quantized_kv import PACKED_PATH, attend_packed, packed_bytes, reads_packed
from attention.implementations.transforms import with_mask_gradient
from attention.masks import Mask, Pattern, of_workload
from attention.measure.device import Backend, Device, probe
from attention.quantized_kv import KeyOrValue, QuantizedArray

MAX_PATHS: Final = 4096
SDPA_PATHS: Final = {Method.FUSED: "MLX SDPA, fused", Method.WHOLE: "MLX SDPA, unfused"}
DEQUANTIZED_PATH: Final = "dequantized in blocks"
DEQUANTIZED_SLICES_PATH: Final = "dequantized in slices"
LISTED_PATH: Final = "blocks of a list"


class Practical:
    """MLX's SDPA if it fits the memory budget; slices or blocks of attention if its scores would not."""

    name = "practical"
    takes_sinks = True
    takes_patterns = takes_alibi = True
    takes_quantized = True

    def __init__(self, budget_bytes: int | None = None) -> None:
        """Set the memory budget above inputs and outputs, in bytes; None derives it from the machine."""
        self.budget_bytes = budget_bytes
        self._strategies = BoundedDict[tuple[Workload, Needs, Backend, int], Strategy]()
        self._whole_calls = BoundedDict[object, tuple[str, bool]]()

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route: MLX's SDPA if it fits the budget, otherwise slices or blocks and their size."""
        needs = needs_with_mask(workload, needs)
        choice = self.strategy(workload, device, needs)
        if workload.quantized:
            return _quantized_route(choice, workload, device, needs)
        by_mlx = workload.pass_ != "training" or not (choice.backward.is_cut or needs.sinks)
        if by_mlx and not choice.forward.is_cut:
            fused = choice.forward is Method.FUSED
            needed = (fused_bytes if fused else unfused_call_bytes)(workload, device.backend, needs)
            return Route(
                path=_whole_path(choice.forward, workload.dtype, device.backend),
                fused=fused,
                reason=choice.reason,
                predicted_bytes=needed,
            )
        method, parts, needed = _parts(choice, workload, device, needs)
        path = f"{choice.forward.value} + {method.value} {parts.rows}"
        if choice.forward is Method.WHOLE:
            path = with_tf32(path, workload.dtype, device.backend)
        if choice.forward.is_cut:
            path = LISTED_PATH if needs.pattern else _cut_path(method, parts, workload, device.backend)
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
        """Compute attention; shapes as in `Implementation.__call__`. Keys and values may be quantized.

        `sinks` (H,) are extra logits, one per head, in the softmax of every row, without a value.
        """
        if isinstance(k, QuantizedArray) or isinstance(v, QuantizedArray):
            return self._attend_quantized(q, k, v, scale, mask, softcap, sinks)[0]
        if mask.array is None or mask.array.dtype == mx.bool_:
            return self._attend(q, k, v, scale, mask, softcap, sinks)
        return with_mask_gradient(
            lambda q, k, v, mask, *sinks: self._attend(q, k, v, scale, mask, softcap, next(iter(sinks), None)),
            *(q, k, v),
            scale=scale,
            mask=mask,
            softcap=softcap,
            sinks=sinks,
            budget_bytes=self._budget_here(),
        )

    def with_logsumexp(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> tuple[mx.array, mx.array]:
        """Compute attention in blocks, and the logsumexp of its rows, as in `ReturnsLogsumexp`."""
        if isinstance(k, QuantizedArray) or isinstance(v, QuantizedArray):
            out, logsumexp = self._attend_quantized(q, k, v, scale, mask, softcap, None, logsumexp=True)
            return out, logsumexp
        workload, needs = call_signature(q, k, v, mask, softcap)
        needs = structs.replace(needs, logsumexp=True)
        backend = current_backend()
        choice = self._strategy(workload, backend, needs, self._budget_here(), mask.pattern)
        record_path(_forward_path(choice, workload, needs, backend))

        def attend(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> tuple[mx.array, mx.array]:
            calls = self._calls(choice, backend, scale, mask, softcap, q.dtype, (q, k))
            out, statistics = blockwise(*calls)(q, k, v, mask.arrays, [])
            return out, logsumexp_of(statistics, row_shifts(q, k, calls[0]))

        budget = self._budget_here()
        return with_mask_gradient(attend, q, k, v, scale=scale, mask=mask, softcap=softcap, budget_bytes=budget)

    def _attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        mask: Mask,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        shape = None if mask.array is None else (mask.array.shape, mask.array.dtype)
        key = (
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            mask.causal,
            mask.window,
            shape,
            current_backend(),
            self.budget_bytes,
        )
        bounds = mask.pattern is None and mask.alibi is None
        simple = bounds and sinks is None and softcap is None
        if simple and (known := self._whole_calls.get(key)) is not None:
            path, widened = known
            record_path(path)
            return attend_whole(q, k, v, scale, mask, widened)
        workload, needs = call_signature(q, k, v, mask, softcap)
        needs = needs if sinks is None else structs.replace(needs, sinks=True)
        backend = current_backend()
        choice = self._strategy(workload, backend, needs, self._budget_here(), mask.pattern)
        if simple and not choice.backward.is_cut:
            path = _whole_path(choice.forward, workload.dtype, backend)
            widened = _computes_in_float32(choice, q.dtype, backend)
            self._whole_calls[key] = path, widened
            record_path(path)
            return attend_whole(q, k, v, scale, mask, widened)
        record_path(_forward_path(choice, workload, needs, backend))
        if simple and choice.slices is not None:
            made = self._in_slices(choice, backend, scale, mask, q.dtype)
        else:
            made = self._in_blocks(choice, backend, scale, mask, softcap, q.dtype, (q, k))
        return made(q, k, v, mask.arrays, [] if sinks is None else [sinks])

    def _attend_quantized(
        self,
        q: mx.array,
        k: KeyOrValue,
        v: KeyOrValue,
        scale: float,
        mask: Mask,
        softcap: float | None,
        sinks: mx.array | None,
        logsumexp: bool = False,
    ) -> Arrays:
        """Return the output, and the logsumexp if it is requested; gradients are those of MLX's operations."""
        assert isinstance(k, QuantizedArray) and isinstance(v, QuantizedArray)
        workload, needs = call_signature(q, k, v, mask, softcap)
        needs = structs.replace(needs, sinks=sinks is not None, logsumexp=logsumexp)
        backend = current_backend()
        choice = self._strategy(workload, backend, needs, self._budget_here(), mask.pattern)
        record_path(_quantized_path(choice, workload, backend))
        if choice.forward is Method.WHOLE:
            widened = computes_in_float32(workload.dtype, backend)
            return [attend_packed(q, k, v, scale=scale, mask=mask, widened=widened, shifted=q.dtype != mx.float32)]
        if choice.slices is not None:
            return [slicing.forward(q, k, v, SlicedParams(scale, mask, choice.slices, tile_order(backend)))]
        call, _ = self._calls(choice, backend, scale, mask, softcap, q.dtype, (q, k))
        out, statistics = forward(q, k, v, structs.replace(call, packed=reads_packed(workload, backend)), sinks)
        return [out, logsumexp_of(statistics, row_shifts(q, k, call))] if logsumexp else [out]

    def _in_slices(self, choice: Strategy, backend: Backend, scale: float, mask: Mask, dtype: mx.Dtype) -> Attend:
        follow = tile_order(backend) if choice.waits else UNORDERED

        def whole(q: mx.array, k: mx.array, v: mx.array, array: Arrays, _: Arrays) -> mx.array:
            if choice.forward.is_cut and choice.slices is not None:
                return slicing.forward(q, k, v, SlicedParams(scale, mask.with_arrays(array), choice.slices, follow))
            return attend_whole(q, k, v, scale, mask.with_arrays(array), _computes_in_float32(choice, q.dtype, backend))

        if choice.backward_slices is None:
            return with_blockwise_backward(whole, self._calls(choice, backend, scale, mask, None, dtype, None)[1])
        return slicing.with_sliced_backward(whole, SlicedParams(scale, mask, choice.backward_slices, follow))

    def _calls(
        self,
        choice: Strategy,
        backend: Backend,
        scale: float,
        mask: Mask,
        softcap: float | None,
        dtype: mx.Dtype,
        sides: tuple[mx.array, KeyOrValue] | None,
    ) -> tuple[BlockwiseParams, BlockwiseParams]:
        """Return the parameters of the forward and the backward pass in blocks.

        `sides`: query and key, for the tiles of a pattern.
        """
        follow = no_fence if backend == "cpu" else tile_order(backend).next
        shifted = dtype != mx.float32
        arithmetic = arithmetic_of(dtype, backend)
        call = BlockwiseParams(scale, mask, softcap, choice.blocks, arithmetic, follow, shifted)
        backward = structs.replace(call, blocks=choice.backward_blocks)
        if mask.pattern is None or sides is None:
            return call, backward
        q, k = sides
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        made = (structs.replace(one, tiles=tile_map(mask.pattern, shape, one.blocks)) for one in (call, backward))
        return next(made), next(made)

    def _in_blocks(
        self,
        choice: Strategy,
        backend: Backend,
        scale: float,
        mask: Mask,
        softcap: float | None,
        dtype: mx.Dtype,
        sides: tuple[mx.array, KeyOrValue],
    ) -> Attend:
        call, backward = self._calls(choice, backend, scale, mask, softcap, dtype, sides)
        if choice.forward.is_cut:
            both = blockwise(call, backward)
            return lambda *inputs: both(*inputs)[0]

        def whole(q: mx.array, k: mx.array, v: mx.array, array: Arrays, sinks: Arrays) -> mx.array:
            return attend_whole(
                q, k, v, scale, mask.with_arrays(array), _computes_in_float32(choice, q.dtype, backend), *sinks
            )

        return with_blockwise_backward(whole, backward)

    def strategy(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Strategy:
        """Return the strategy of a call on a device."""
        known = workload.mask_spec.pattern is None  # else it is a program's own mask
        pattern = of_workload(workload).pattern if known else None
        return self._strategy(workload, device.backend, needs_with_mask(workload, needs), self.budget(device), pattern)

    def budget(self, device: Device) -> int:
        """Return the memory budget of a call above inputs and outputs on a device, in bytes."""
        return self.budget_bytes or default_budget(device.backend, device.memory_bytes)

    def _budget_here(self) -> int:
        return self.budget_bytes or default_budget(current_backend(), _memory())

    def _strategy(
        self, workload: Workload, backend: Backend, needs: Needs, budget: int, pattern: Pattern | None
    ) -> Strategy:
        """Return the strategy, cached; routes and calls with the same key get the same one.

        A route that has only the needs of a call with a pattern gets the strategy for a pattern that shows everything.
        """
        if workload.quantized:
            copies = _mask_copies(needs, workload.dtype, backend)
            return quantized_strategy(workload, backend, needs, budget, pattern, copies)
        if pattern is not None:
            return listed_strategy(workload, backend, needs, budget, pattern)
        key = (workload, needs, backend, budget)
        if key not in self._strategies:
            self._strategies[key] = choose_strategy(
                workload, backend, needs, budget, _mask_copies(needs, workload.dtype, backend)
            )
        return self._strategies[key]


def _computes_in_float32(choice: Strategy, dtype: mx.Dtype, backend: Backend) -> bool:
    """Return whether the part that is computed as a whole is computed in float32."""
    return choice.forward is Method.WHOLE and computes_in_float32(masks.dtype_name(dtype), backend)


def _mask_copies(needs: Needs, dtype: DType, backend: Backend) -> MaskCopies:
    """Return the copies of an array mask; values in another dtype than the scores' are clipped in float32 first."""
    if not needs.array_mask:
        return NO_MASK_COPIES
    scores: DType = "float32" if computes_in_float32(dtype, backend) else dtype
    own = needs.mask_dtype or dtype
    item_bytes = 1 if own == "bool" else ITEM_BYTES[scores]
    return MaskCopies(needs.mask_batches, needs.mask_heads, 2 * item_bytes if own in ("bool", scores) else 12)


@lru_cache(maxsize=1)
def _memory() -> int:
    return probe().memory_bytes


@lru_cache(maxsize=MAX_PATHS)
def _forward_path(choice: Strategy, workload: Workload, needs: Needs, backend: Backend) -> str:
    """Return the path of a forward pass that is not a plain call of MLX's SDPA."""
    if needs.pattern:
        return LISTED_PATH
    if not choice.forward.is_cut:
        return _whole_path(choice.forward, workload.dtype, backend)
    by_slices = not (needs.sinks or needs.softcap or needs.alibi or needs.logsumexp)
    sliced = by_slices and choice.slices is not None
    method, parts = (Method.SLICES, choice.slices) if sliced and choice.slices else (Method.BLOCKS, choice.blocks)
    return _cut_path(method, parts, workload, backend)


def _quantized_route(choice: Strategy, workload: Workload, device: Device, needs: Needs) -> Route:
    """Return the route of a call with quantized keys and values."""
    if choice.forward is Method.WHOLE:
        needed = packed_bytes(workload, needs, computes_in_float32(workload.dtype, device.backend))
    else:
        needed = _parts(choice, workload, device, needs)[2]
    path = _quantized_path(choice, workload, device.backend)
    return Route(path=path, fused=False, reason=choice.reason, predicted_bytes=needed)


def _quantized_path(choice: Strategy, workload: Workload, backend: Backend) -> str:
    if choice.slices is not None:
        return DEQUANTIZED_SLICES_PATH
    return PACKED_PATH if reads_packed(workload, backend) else DEQUANTIZED_PATH


def _whole_path(method: Method, dtype: DType, backend: Backend) -> str:
    """Return the path of MLX's SDPA on all rows and heads; its fused kernels do not use TF32."""
    path = SDPA_PATHS[method]
    return path if method is Method.FUSED else with_tf32(path, dtype, backend)


def _cut_path(method: Method, parts: Blocks, workload: Workload, backend: Backend) -> str:
    path = f"{method.value} {parts.rows} x {visible_keys(problem_size(workload, backend), parts)}"
    return with_tf32(path, workload.dtype, backend) if method is Method.SLICES else path


def _parts(choice: Strategy, workload: Workload, device: Device, needs: Needs) -> tuple[Method, Blocks, int]:
    """Return the method of a call that is cut, the size of a part, and the predicted bytes, outputs included."""
    slices = choice.backward_slices if workload.pass_ == "training" else choice.slices
    if slices is not None and not needs.sinks:
        size = slices_bytes(workload, slices, device.backend, needs)
        together = unfused_call_bytes(workload, device.backend, needs) - workload.output_bytes
        return Method.SLICES, slices, workload.output_bytes + (size if choice.waits else min(size, together))
    rows = workload.batch * workload.heads * workload.seq
    tiles = int(RESIDENT_TILES[device.backend] * tile_bytes(problem_size(workload, device.backend), choice.blocks))
    return Method.BLOCKS, choice.blocks, workload.output_bytes + 4 * rows + tiles
