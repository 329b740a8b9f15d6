"""Dispatch of a call to its kernels: selection, first-use self-check, gradient, vmap, and a cache of repeated calls."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx

from attention.core.errors import KernelUnavailable
from attention.kernels.cuda import packed_choice
from attention.kernels.cuda.choice import KernelPath, candidates, program_of, stages, work_division
from attention.kernels.cuda.gradients import gradients
from attention.kernels.cuda.packed_choice import PackedPath
from attention.kernels.cuda.portable import gradient as portable_gradient
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.quantized.decode import MAX_ROWS
from attention.kernels.cuda.quantized.formats import NO_GRADIENT, PackedKV
from attention.kernels.cuda.quantized.launch import inputs as packed_inputs
from attention.kernels.cuda.runtime import launcher, selfcheck
from attention.kernels.cuda.runtime.call import DIM_STEP, ELEMENTS, CallParams, CallShape
from attention.kernels.cuda.runtime.launch import (
    INPUTS,
    OUTPUTS,
    Run,
    Stage,
    extra_inputs,
    formats_of,
    make_plan,
    parse_label,
    plan_label,
    run_of,
)
from attention.kernels.cuda.sm90 import fp8_launch, gradient
from attention.kernels.cuda.sm90 import launch as sm90_launch
from attention.kernels.cuda.sm90.launch import (
    decode_stages,
    for_like_lengths,
    forward_stages,
    in_whole_steps,
    make_key_split,
    same_kernel,
)
from attention.masks import as_4d
from attention.quantized_kv import quantized

TRACE_AFTER = 2
"""Calls of a shape before `mx.compile` traces it; a decode loop, whose key length grows, is never traced."""

Attend = Callable[..., Sequence[mx.array]]
"""A prepared call: takes q, k, v, and a mask (batch, heads, queries, keys) and slopes (heads,) if the call has them."""


def first_trusted(shape: CallShape, call: CallParams) -> KernelPath:
    """Return the first candidate path whose kernel passes its self-check on this GPU (cached or run now).

    Raises:
        KernelUnavailable: no candidate passes; the message has the reason for each.
    """
    reasons: list[str] = []
    for path in candidates(shape, call):
        program = program_of(shape, call, path)
        reason = selfcheck.check(program, functools.partial(_compare, shape, call, path))
        if reason is None:
            return path
        reasons.append(f"{program.name}: {reason}")
    raise KernelUnavailable("; ".join(reasons))


def _compare(shape: CallShape, call: CallParams, path: KernelPath) -> str | None:
    """Run the specialisation of a call on small inputs; return an error in its results, or None."""
    few = path == "decode" or (path == "general" and work_division(shape, call).kernel.packed)
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=shape.queries if few else 300, keys=523)
    tried = selfcheck.small_call(small, call)
    match path:
        case "forward":
            made = forward_stages(small, tried, kernel=sm90_launch.forward_kernel(shape, call))
        case "decode":
            made = decode_stages(
                small, tried, same_kernel(make_key_split(shape, call), make_key_split(small, tried), small.keys)
            )
        case "general":
            kernel = portable_launch.same_kernel(work_division(shape, call), small, tried)
            made = portable_launch.stages(small, tried, kernel)
    given, mask = selfcheck.inputs(small), selfcheck.random_mask(small, tried)
    if path == "general":  # in the layout that models pass: (batch, rows, heads, columns), transposed
        given = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in given]
    arrays = [*given[:3], *(broadcast_mask(x, small) for x in mask), *selfcheck.slopes(small, tried)]
    found = run_of(_inputs(call), OUTPUTS, made)(arrays)
    return selfcheck.disagreement(tried, found[0], found[1], given, mask)


def _inputs(call: CallParams) -> tuple[str, ...]:
    return *INPUTS, *extra_inputs(call)


def broadcast_mask(mask: mx.array, shape: CallShape) -> mx.array:
    """Broadcast a mask to (batch, heads, queries, keys), as launches without the launcher require; no copy."""
    return mx.broadcast_to(mask, (shape.batch, shape.heads, shape.queries, shape.keys))


def make_call(shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool) -> Run:
    """Return a call as one MLX primitive, differentiable in its output and, if requested, its logsumexp.

    Calls of few queries share one if their keys are as many whole steps: decoding does not make one for each length.
    """
    launcher.module().set_transforms(_gradients_of, _batched)
    if path == "decode":
        return _decoding_call(in_whole_steps(shape, call), call, with_logsumexp)
    return _new_call(shape, call, path, with_logsumexp)


@functools.lru_cache(maxsize=256)
def _decoding_call(shape: CallShape, call: CallParams, with_logsumexp: bool) -> Run:
    return _new_call(shape, call, "decode", with_logsumexp)


def _new_call(shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool) -> Run:
    untraced = None
    if not with_logsumexp:
        untraced = make_plan(_inputs(call), OUTPUTS[:1], _stages(shape, call, path, False))
    return _differentiable_plan(shape, call, path, with_logsumexp, untraced)


def _differentiable_plan(
    shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool, untraced: Run | None
) -> Run:
    label = plan_label("forward", shape, call, with_logsumexp)
    return make_plan(_inputs(call), OUTPUTS, _stages(shape, call, path), label, untraced)


def _stages(shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool = True) -> list[Stage]:
    return _shared(stages(shape, call, path, with_logsumexp), path)


def _shared(made: list[Stage], path: KernelPath | PackedPath) -> list[Stage]:
    """Return the launches of a path, of the split-K kernels for all lengths that share a plan."""
    return [for_like_lengths(stage) for stage in made] if path == "decode" else made


def _gradients_of(
    label: str, primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> list[mx.array]:
    """Compute the vjp of a plan (callback of launcher.cpp); an unrequested logsumexp has a cotangent of zeros."""
    kind, shape, call, with_logsumexp = parse_label(label)
    if kind == "fp8":
        raise ValueError("[flash_attention] poc-fp8 has no gradient; poc has one.")
    if kind == "packed":
        raise ValueError(f"[flash_attention] {NO_GRADIENT}.")
    if kind != "forward":
        raise ValueError("[flash_attention] There is no second derivative.")
    shape = shape.with_keys(primals[1].shape[2])  # the plan may be for other lengths too
    wanted = cotangents[: 2 if with_logsumexp else 1]
    return gradients(primals[: len(_inputs(call))], wanted, outputs[: len(OUTPUTS)], shape, call)


def _batched(label: str, inputs: list[mx.array], axes: list[int]) -> list[mx.array]:
    """Run a plan under vmap (callback of launcher.cpp): the vmapped axis is folded into the batch.

    Returns:
        The first outputs, with the vmapped axis first.
    """
    kind, shape, call, with_logsumexp = parse_label(label)
    shape = shape.with_keys(inputs[1].shape[3 if 0 <= axes[1] <= 2 else 2])  # the plan may be for other lengths too

    def plan_of(shape: CallShape) -> Run:
        match kind:
            case "forward":
                return _differentiable_plan(shape, call, first_trusted(shape, call), with_logsumexp, None)
            case "packed":
                return _packed_plan(shape, call, PackedKV.of_texts(*formats_of(label)), with_logsumexp)
            case "own gradient":
                return gradient.make_plan_of_gradient(shape, call, with_logsumexp)
            case "fp8":
                return fp8_plan(shape, call)
            case _:
                return portable_gradient.make_plan_of_gradient(shape, call, with_logsumexp)

    outputs = {"fp8": 1, "packed": 1 + with_logsumexp}.get(kind, len(OUTPUTS))
    if _differs_by_batch(shape, call) or _maps_slopes(call, axes):
        run = plan_of(shape)
        return one_by_one(lambda arrays: run(arrays)[:outputs], inputs, axes)
    count = vmapped_length(inputs, axes)
    made = plan_of(replace(shape, batch=count * shape.batch))(folded_inputs(inputs, axes, shape, call))[:outputs]
    return [x.reshape(count, shape.batch, *x.shape[1:]) for x in made]


def fp8_plan(shape: CallShape, call: CallParams) -> Run:
    """Return a call in 8 bits as one primitive: it can be vmapped, not differentiated."""
    launcher.module().set_transforms(_gradients_of, _batched)
    return fp8_launch.plan(shape, call, label=plan_label("fp8", shape, call, False))


def _differs_by_batch(shape: CallShape, call: CallParams) -> bool:
    """Return whether the pattern of a call differs by batch entry, so that no other axis can be folded into them."""
    return call.pattern is not None and call.pattern.planes(shape.batch, shape.heads)[0] > 1


def _maps_slopes(call: CallParams, axes: Sequence[int]) -> bool:
    """Return whether the slopes of a call, which have no batch axis, are vmapped."""
    return call.alibi and axes[-1] >= 0


def one_by_one(
    run: Callable[[list[mx.array]], Sequence[mx.array]], inputs: Sequence[mx.array], axes: Sequence[int]
) -> list[mx.array]:
    """Run an operation for each index of the vmapped axis; return the results stacked along a first axis."""
    made = [
        run([x if axis < 0 else mx.take(x, i, axis) for x, axis in zip(inputs, axes, strict=True)])
        for i in range(vmapped_length(inputs, axes))
    ]
    return [mx.stack(list(results)) for results in zip(*made, strict=True)]


def vmapped_length(inputs: Sequence[mx.array], axes: Sequence[int]) -> int:
    """Return the length of the vmapped axis; inputs with axis -1 are not vmapped."""
    return next(x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis >= 0)


def folded_inputs(
    inputs: Sequence[mx.array], axes: Sequence[int], shape: CallShape, call: CallParams
) -> list[mx.array]:
    """Fold the vmapped axis of a plan's inputs into the batch; a mask stays broadcast if possible, as slopes do."""
    count = vmapped_length(inputs, axes)
    folded = []
    last = len(inputs) - 1
    for i, (x, axis) in enumerate(zip(inputs, axes, strict=True)):
        moved = x[None] if axis < 0 else mx.moveaxis(x, axis, 0)
        is_mask = call.mask is not None and i == last - call.alibi
        if (call.alibi and i == last) or (is_mask and axis < 0 and x.shape[0] == 1):
            folded.append(x)
        else:
            folded.append(mx.broadcast_to(moved, (count, shape.batch, *moved.shape[2:])).flatten(0, 1))
    return folded


@functools.lru_cache(maxsize=256)
def repeated_call(
    q: tuple[int, ...],
    k: tuple[int, ...],
    value_dim: int,
    dtype: str,
    call: CallParams,
    with_logsumexp: bool,
) -> Attend:
    """Select, check and cache the kernels for a shape: the shapes of q and k, and the width of v.

    Raises:
        KernelUnavailable: no kernel supports the call, or none passed its self-check.
    """
    launcher.unavailable_reason()  # compiles the launcher if needed
    dims = [DIM_STEP * -(-dim // DIM_STEP) for dim in (q[3], value_dim)]
    shape = CallShape(q[0], q[1], k[1], q[2], k[2], dims[0], ELEMENTS[dtype], dims[1])
    path = first_trusted(shape, call)
    if launcher.unavailable_reason() is None:
        made: Attend = make_call(shape, call, path, with_logsumexp)
    else:
        made = RepeatedCall(shape, call, path, with_logsumexp)
    masked = _with_mask(made, shape, launcher.unavailable_reason() is not None) if call.mask else made
    return masked if dims == [q[3], value_dim] else _padded(masked, dims, value_dim)


def _packed_plan(shape: CallShape, call: CallParams, packed: PackedKV, with_logsumexp: bool) -> Run:
    """Return a call with quantized keys and values as one MLX primitive, which has no gradient.

    Raises:
        KernelUnavailable: no kernel passes its self-check.
    """
    path = _first_trusted_packed(shape, call, packed)
    if path == "decode":
        return _packed_decoding_plan(in_whole_steps(shape, call), call, packed, with_logsumexp)
    return _new_packed_plan(shape, call, packed, path, with_logsumexp)


@functools.lru_cache(maxsize=256)
def _packed_decoding_plan(shape: CallShape, call: CallParams, packed: PackedKV, with_logsumexp: bool) -> Run:
    return _new_packed_plan(shape, call, packed, "decode", with_logsumexp)


def _new_packed_plan(
    shape: CallShape, call: CallParams, packed: PackedKV, path: PackedPath, with_logsumexp: bool
) -> Run:
    outputs = OUTPUTS[: 2 if with_logsumexp else 1]
    label = plan_label("packed", shape, call, with_logsumexp, packed.texts)
    made = _shared(packed_choice.stages(shape, call, packed, path, with_logsumexp), path)
    return make_plan((*packed_inputs(packed), *extra_inputs(call)), outputs, made, label)


def _first_trusted_packed(shape: CallShape, call: CallParams, packed: PackedKV) -> PackedPath:
    """Return the first candidate path for quantized keys and values whose kernels pass their self-checks on this GPU.

    Raises:
        KernelUnavailable: no candidate passes; the message has the reason for each.
    """
    reasons: list[str] = []
    for path in packed_choice.candidates(shape, call):
        reason = distrust_of_packed(shape, call, packed, path)
        if reason is None:
            return path
        reasons.append(reason)
    raise KernelUnavailable("; ".join(reasons))


def distrust_of_packed(shape: CallShape, call: CallParams, packed: PackedKV, path: PackedPath = "decode") -> str | None:
    """Check the kernels of a path for quantized keys and values unless that was done; return an error, or None."""
    if path == "workspace":
        try:
            for part in packed_choice.workspace_parts(shape):
                first_trusted(part, call)
        except KernelUnavailable as unavailable:
            return str(unavailable)
    program = packed_choice.program_of(shape, call, packed, path)
    reason = selfcheck.check(program, functools.partial(_compare_packed, shape, call, packed, path))
    return f"{program.name}: {reason}" if reason else None


@functools.lru_cache(maxsize=256)
def repeated_packed_call(
    q: tuple[int, ...],
    k: tuple[int, ...],
    value_dim: int,
    dtype: str,
    call: CallParams,
    packed: PackedKV,
    with_logsumexp: bool,
) -> Run:
    """Select, check and cache the kernel for shapes of q and k, and quantized keys and values.

    Returns:
        A plan of q, the parts of keys and values, a mask (4 axes) and slopes: returns the output and, if requested, the
        logsumexp.

    Raises:
        KernelUnavailable: no kernel passes its self-check, or the launcher cannot be compiled.
    """
    launcher.module().set_transforms(_gradients_of, _batched)
    shape = CallShape(q[0], q[1], k[1], q[2], k[2], q[3], ELEMENTS[dtype], value_dim)
    return _packed_plan(shape, call, packed, with_logsumexp)


def _compare_packed(shape: CallShape, call: CallParams, packed: PackedKV, path: PackedPath) -> str | None:
    """Run the kernel of a path for quantized keys and values on small inputs; return an error, or None."""
    queries = shape.queries if shape.group * shape.queries <= MAX_ROWS else 300
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=queries, keys=523)
    tried = selfcheck.small_call(small, call)
    (q, k, v), mask = selfcheck.inputs(small)[:3], selfcheck.random_mask(small, tried)
    parts = [
        quantized(x if scale == "uint8" else x.astype(getattr(mx, scale)), form)
        for x, (form, scale) in zip((k, v), packed.parts, strict=True)
    ]
    made = packed_choice.check_stages(shape, call, packed, path, small, tried)
    run = run_of((*packed_inputs(packed), *extra_inputs(call)), OUTPUTS[:2], made)
    slopes = selfcheck.slopes(small, tried)
    found = run([q, *(array for part in parts for array in part.arrays), *mask, *slopes])
    # the split-K kernel rounds keys to float16, the others to the queries' dtype
    rounded = [part.dequantized(mx.float32 if path == "decode" else q.dtype).astype(mx.float32) for part in parts]
    return selfcheck.disagreement(tried, found[0], found[1], [q, *rounded], mask)


def _with_mask(made: Attend, shape: CallShape, whole: bool) -> Attend:
    return lambda q, k, v, mask, *slopes: made(q, k, v, broadcast_mask(mask, shape) if whole else as_4d(mask), *slopes)


def _padded(made: Attend, dims: Sequence[int], value_dim: int) -> Attend:
    """Zero-pad the head dims of a call to the kernel's dims; zeros do not change the products."""

    def wide(x: mx.array, dim: int) -> mx.array:
        return x if x.shape[3] == dim else mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, dim - x.shape[3])])

    def call(q: mx.array, k: mx.array, v: mx.array, *more: mx.array) -> Sequence[mx.array]:
        output, *others = made(wide(q, dims[0]), wide(k, dims[0]), wide(v, dims[1]), *more)
        return output[..., :value_dim], *others

    return call


class RepeatedCall:
    """Calls of one shape without the launcher; from the third on under `mx.compile`."""

    def __init__(self, shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool) -> None:
        self._calls = 0
        self._function = _differentiable(shape, call, path, with_logsumexp)

    def __call__(self, *arrays: mx.array) -> Sequence[mx.array]:
        """Queue the call; return output, logsumexp and stats."""
        if self._calls <= TRACE_AFTER:
            self._calls += 1
            if self._calls > TRACE_AFTER:
                self._function = cast("Attend", mx.compile(self._function))
        return self._function(*arrays)


def _differentiable(shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool) -> Attend:
    """Return a call as a custom function with vjp and vmap; its logsumexp is always written, for the backward pass."""
    run = run_of(_inputs(call), OUTPUTS, stages(shape, call, path))
    mask = len(INPUTS) if call.mask else None

    @mx.custom_function
    def function(*arrays: mx.array) -> tuple[mx.array, ...]:
        return tuple(run(list(arrays))[: len(OUTPUTS)])

    def pull_back(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        wanted = list(cotangents) if with_logsumexp else list(cotangents[:1])
        return tuple(gradients(primals, wanted, outputs, shape, call))

    def batched(inputs: Sequence[mx.array], axes: Sequence[int]) -> tuple[list[mx.array], list[int]]:
        if _differs_by_batch(shape, call) or _maps_slopes(call, axes):
            whole = [broadcast_mask(x, shape) if i == mask and axes[i] < 0 else x for i, x in enumerate(inputs)]
            stacked = one_by_one(lambda arrays: cast("Attend", function)(*arrays), whole, axes)
            return stacked, [0] * len(stacked)
        count = vmapped_length(inputs, axes)
        wide = replace(shape, batch=count * shape.batch)
        wide_function = _differentiable(wide, call, first_trusted(wide, call), with_logsumexp)
        made = wide_function(
            *(
                broadcast_mask(x, wide) if i == mask else x
                for i, x in enumerate(folded_inputs(inputs, axes, shape, call))
            )
        )
        return [x.reshape(count, shape.batch, *x.shape[1:]) for x in made], [0] * len(made)

    function.vjp(pull_back)
    function.vmap(batched)
    return cast("Attend", function)
