"""Gradients by the general backward kernels: three launches in sequence."""

import functools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from attention.kernels.cpu.listing import block_list
from attention.kernels.cuda.portable.backward import PADDED, PortableBackward, backward_tiles_for, widths_of
from attention.kernels.cuda.portable.launch import dense_strides
from attention.kernels.cuda.runtime import launcher
from attention.kernels.cuda.runtime.call import CallParams, CallShape, float_bits
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import (
    Launch,
    Run,
    Stage,
    dtype_of,
    exponent_factor,
    extra_inputs,
    list_planes,
    on_device,
    plan_label,
    prepare,
    run_of,
    scalars_of,
)

FIRST_VECTOR_SUMS = (9, 0)
"""First compute capability with vectorised atomic adds of four floats."""


def kernel_of(shape: CallShape, call: CallParams) -> PortableBackward:
    """Return the specialisation for a call on this machine."""
    return _kernel(shape, call, launcher.known_obstacle() is not None)


@functools.lru_cache(maxsize=256)
def _kernel(shape: CallShape, call: CallParams, narrow_steps: bool) -> PortableBackward:
    widths = widths_of(shape.head_dim, shape.value_dim)
    return PortableBackward(
        *widths,
        causal=call.causal,
        window=call.window is not None,
        softcap=call.softcap is not None,
        mask=call.mask,
        element=shape.element,
        lists=call.pattern is not None,
        alibi=call.alibi,
        narrow_steps=narrow_steps,
        tiles=backward_tiles_for(*widths, gpu().shared_memory_limit),
        architecture=gpu().architecture,
        vector_sums=gpu().capability >= FIRST_VECTOR_SUMS,
    )


def gradients(
    primals: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    outputs: Sequence[mx.array],
    shape: CallShape,
    call: CallParams,
) -> list[mx.array]:
    """Return the gradients of q, k and v. Arguments: see `gradients.gradients`."""
    cotangent = cotangents[0].astype(dtype_of(shape))
    of_logsumexp = cotangents[1].astype(mx.float32) if len(cotangents) > 1 else outputs[1]
    arrays = [*primals[:3], outputs[0], cotangent, outputs[2], of_logsumexp, *primals[3:]]
    return make_plan_of_gradient(shape, call, len(cotangents) > 1)(arrays)[:3]


@functools.lru_cache(maxsize=128)
def make_plan_of_gradient(shape: CallShape, call: CallParams, with_logsumexp: bool) -> Run:
    """Return the three launches as one operation.

    The first launch zeroes the float32 accumulator of dQ; the second adds to it in place, although it is an input for
    MLX; the third depends on dK and rounds the accumulator to dQ. The accumulator is not visible outside.
    """
    masks, more = ("mask",) if call.mask else (), extra_inputs(call)
    inputs = ("q", "k", "v", "output", "cotangent", "stats", "of_logsumexp", *more)
    made = (
        Stage(rows_launch(shape, call, with_logsumexp), inputs[3:7], ("rows", "sums"), strided=("cotangent",)),
        Stage(
            backward_launch(shape, call),
            ("q", "k", "v", "cotangent", "rows", *more, "sums"),
            ("d_k", "d_v"),
            frozenset({"sums"}),
            strided=("q", "k", "v", "cotangent"),
            masks=masks,
        ),
        Stage(finish_launch(shape, call), ("sums", "d_k"), ("d_q",)),
    )
    label = plan_label("general gradient", shape, call, with_logsumexp)
    return run_of(inputs, ("d_q", "d_k", "d_v"), made, label)


def padded(shape: CallShape) -> int:
    """Return the padded queries per plane of the intermediate arrays."""
    return PADDED * math.ceil(shape.queries / PADDED)


def scratch_bytes(shape: CallShape) -> int:
    """Return the scratch memory of a backward pass in bytes: 3 floats per query, and dQ in float32."""
    return 4 * shape.batch * shape.heads * padded(shape) * (3 + widths_of(shape.head_dim, shape.value_dim)[0])


@functools.lru_cache(maxsize=128)
def rows_launch(shape: CallShape, call: CallParams, with_logsumexp: bool) -> Launch:
    """Return the first launch: exponents and delta per query, in padded tiles, and the zeroed accumulator of dQ."""
    kernel = kernel_of(shape, call)
    program = kernel.rows_program(with_logsumexp)
    planes = shape.batch * shape.heads
    rows = planes * padded(shape)
    outputs = [((rows // PADDED, 3, PADDED), mx.float32), ((rows, kernel.head_dim), mx.float32)]
    numbers = [planes, shape.heads, shape.queries, shape.value_dim, kernel.head_dim, exponent_factor(call)]
    if kernel.narrow_steps:
        numbers += dense_strides(shape, CallParams(call.scale, False, None, None), "o")
    return prepare(program, rows * 32 // program.threads, outputs, numbers)


@functools.lru_cache(maxsize=128)
def backward_launch(shape: CallShape, call: CallParams) -> Launch:
    """Return the main launch: reads q, k, v, cotangent, rows, mask and sums; writes dK and dV."""
    kernel = kernel_of(shape, call)
    keys = (shape.batch, shape.kv_heads, shape.keys)
    outputs = [((*keys, dim), dtype_of(shape)) for dim in (shape.head_dim, shape.value_dim)]
    problem = [shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim, shape.value_dim]
    numbers = [*problem, float_bits(call.scale), *scalars_of(call), call.window or 0]
    key_tiles = math.ceil(shape.keys / kernel.tiles.block_k)
    constants: tuple[mx.array, ...] = ()
    if call.pattern is not None:
        made = block_list(call.pattern, shape.scores, kernel.tiles.block_q, kernel.tiles.block_k)
        lists, planes = made.transposed(), list_planes(shape, made.batches, made.heads)
        steps = np.diff(lists.offsets).reshape(-1, key_tiles)[planes.reshape(-1, shape.group)].sum(axis=1)
        order = np.argsort(-steps.ravel(), kind="stable").astype(np.int32)  # longest first
        constants = on_device(order, lists.offsets, lists.entries, made.bits)
        numbers += [made.heads * (made.batches > 1), int(made.heads > 1)]
    if kernel.narrow_steps:
        numbers += dense_strides(shape, call, "qkvo")
    return prepare(kernel.program, shape.batch * shape.kv_heads * key_tiles, outputs, numbers, constants)


@functools.lru_cache(maxsize=128)
def finish_launch(shape: CallShape, call: CallParams) -> Launch:
    """Return the last launch: reads the sums and an output of the main launch; writes dQ."""
    kernel = kernel_of(shape, call)
    program = kernel.finish_program
    planes = shape.batch * shape.heads
    sums = planes * padded(shape) * kernel.head_dim
    outputs = [((shape.batch, shape.heads, shape.queries, shape.head_dim), dtype_of(shape))]
    numbers = [planes, shape.queries, padded(shape), shape.head_dim, kernel.head_dim, float_bits(call.scale)]
    return prepare(program, math.ceil(sums / 4 / program.threads), outputs, numbers)
