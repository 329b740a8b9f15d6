"""Gradients by the Hopper backward kernels: three launches in sequence."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention.kernels.cpu.listing import block_list
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape, float_bits
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import (
    OUTPUTS,
    Launch,
    Run,
    Stage,
    TensorBox,
    dtype_of,
    exponent_factor,
    extra_inputs,
    list_planes,
    make_plan,
    on_device,
    plan_label,
    prepare,
    scalars_of,
)
from attention.kernels.cuda.sm90.backward import (
    BLOCK_Q,
    MAX_HEAD_DIM,
    ROW_NUMBERS,
    SIGHT_BITS,
    Backward,
    finish_program,
    query_tiles,
    rows_program,
    specialise,
)
from attention.kernels.cuda.sm90.launch import forward_plan
from attention.kernels.cuda.sm90.schedule import L2_BYTES, list_schedule, make_schedule
from attention.masks import BlockList

L2_BYTES_OF_ELEMENT: Final = 16
"""L2 bytes per query element of a head in flight: Q, dO, and the float32 accumulator of dQ counted three times, because
all blocks add to it. With 8 bytes, head dim 256 was 7 % slower (causal, L = 2048); other head dims did not change."""


def refusal(shape: CallShape, call: CallParams) -> str | None:
    """Return None if the Hopper kernels compute the gradients of a call, else a one-line reason."""
    if gpu().architecture != "sm_90a":
        return "the backward kernel needs a Hopper GPU"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"the backward kernel takes head dims up to {MAX_HEAD_DIM}, not {shape.head_dim}"
    if call.softcap is not None and call.alibi:  # the derivative of the softcap is made of the scores after it
        return "the Hopper backward kernel takes no softcap beside ALiBi"
    return selfcheck.distrust_reason(kernel_of(shape, call).program)


@functools.lru_cache(maxsize=256)
def kernel_of(shape: CallShape, call: CallParams) -> Backward:
    """Return the specialisation for a call."""
    return specialise(
        shape.head_dim,
        call.causal,
        shape.element,
        window=call.window is not None,
        softcap=call.softcap is not None,
        lists=call.pattern is not None,
        alibi=call.alibi,
    )


def by_kernel(
    primals: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    outputs: Sequence[mx.array],
    shape: CallShape,
    call: CallParams,
) -> tuple[mx.array, ...]:
    """Return the gradients of q, k and v. Arguments: see `gradients.gradients`, without a mask; with slopes last."""
    cotangent = cotangents[0].astype(dtype_of(shape))
    of_logsumexp = cotangents[1].astype(mx.float32) if len(cotangents) > 1 else outputs[1]
    arrays = [*primals[:3], outputs[0], cotangent, outputs[2], of_logsumexp, *primals[3:]]
    d_q, d_k, d_v = make_plan_of_gradient(shape, call, len(cotangents) > 1)(arrays)[:3]
    return d_q, d_k, d_v


@functools.lru_cache(maxsize=128)
def make_plan_of_gradient(shape: CallShape, call: CallParams, with_logsumexp: bool) -> Run:
    """Return the three launches as one operation.

    The first launch zeroes the float32 accumulator of dQ, or the first part of it (`Backward.clears`); the second adds
    to it in place; the third depends on dK and rounds the accumulator to dQ. It is not visible outside.
    """
    slopes = extra_inputs(call)
    inputs = ("q", "k", "v", "output", "cotangent", "stats", "of_logsumexp", *slopes)
    queries, keys = TensorBox(BLOCK_Q), TensorBox(kernel_of(shape, call).block_k)
    stages = (
        Stage(rows_launch(shape, call, with_logsumexp), inputs[3:7], ("rows", "sums"), strided=("cotangent",)),
        Stage(
            backward_launch(shape, call),
            ("q", "k", "v", "cotangent", "rows", *slopes, "sums"),
            ("d_k", "d_v"),
            frozenset({"rows", "sums"}),
            maps={"q": queries, "k": keys, "v": keys, "cotangent": queries},
        ),
        Stage(finish_launch(shape, call), ("sums", "d_k"), ("d_q",)),
    )
    label = plan_label("own gradient", shape, call, with_logsumexp)
    return make_plan(inputs, ("d_q", "d_k", "d_v"), stages, label)


def scratch_bytes(shape: CallShape, call: CallParams) -> int:
    """Return the scratch memory of a backward pass in bytes: the row statistics, and dQ in float32."""
    tile = ROW_NUMBERS + BLOCK_Q * kernel_of(shape, call).head_dim
    return 4 * shape.batch * shape.heads * query_tiles(shape.queries) * tile


@functools.lru_cache(maxsize=128)
def rows_launch(shape: CallShape, call: CallParams, with_logsumexp: bool) -> Launch:
    """Return the first launch: exponents and delta per row, in padded tiles, and the zeroed accumulator of dQ."""
    kernel = kernel_of(shape, call)
    planes, tiles = shape.batch * shape.heads, query_tiles(shape.queries)
    outputs = [((planes, tiles, ROW_NUMBERS), mx.float32), ((planes, tiles, BLOCK_Q * kernel.head_dim), mx.float32)]
    cleared = cleared_planes(shape, kernel) * shape.group * tiles
    problem = [tiles, shape.heads, shape.queries, shape.head_dim, exponent_factor(call), cleared]
    return prepare(rows_program(kernel, with_logsumexp), planes * tiles, outputs, problem)


def plane_bytes(shape: CallShape) -> int:
    """Return the size of what the query planes of a key plane keep in the L2 cache."""
    return L2_BYTES_OF_ELEMENT * shape.queries * shape.head_dim * shape.group


def cleared_planes(shape: CallShape, kernel: Backward) -> int:
    """Return how many key planes' sums of dQ the first launch clears; the main launch clears that many planes ahead.

    Two of the schedule's groups of planes: work items of the first start at once, those of the second before all of the
    first are far enough to clear.
    """
    planes = shape.batch * shape.kv_heads
    return min(planes, 2 * max(1, L2_BYTES // max(1, plane_bytes(shape)))) if kernel.clears else planes


def sighted_entries(made: BlockList) -> NDArray[np.int32]:
    """Return the lists by key tile for kernels that skip: entries (query tile, sight), see backward_tiles.cuh."""
    lists = made.transposed()
    tile, bits = lists.entries.T
    halves = made.bits.reshape(len(made.bits), made.block_q, 2, -1).any(axis=(1, 3)) @ np.array([1, 2], np.int32)
    seen = np.append(halves.astype(np.int32), np.int32(3))[bits]  # -1 is the last
    following = np.arange(1, len(seen) + 1)
    starts, ends = lists.offsets[:-1], lists.offsets[1:]
    following[ends[ends > starts] - 1] = starts[ends > starts]
    sight = np.where(bits < 0, (1 << SIGHT_BITS) - 1, bits) | seen << SIGHT_BITS | seen[following] << SIGHT_BITS + 2
    return np.stack([tile, sight.astype(np.int32)], axis=1)


@functools.lru_cache(maxsize=128)
def backward_launch(shape: CallShape, call: CallParams) -> Launch:
    """Return the main launch: reads q, k, v, cotangent, rows and sums; writes dK and dV."""
    kernel = kernel_of(shape, call)
    key_planes = shape.batch * shape.kv_heads
    if call.pattern is not None:
        made = block_list(call.pattern, shape.scores, BLOCK_Q, kernel.block_k)
        lists, steps = made.transposed(), [made.heads * (made.batches > 1), int(made.heads > 1)]
        planes = list_planes(shape, made.batches, made.heads).reshape(key_planes, shape.group)
        table = list_schedule(gpu().multiprocessors, lists.offsets, planes, made.key_tiles, plane_bytes(shape))
        entries = made.derived("sighted", sighted_entries) if kernel.skips else lists.entries
        blocks, constants = table.shape[2], on_device(table, lists.offsets, entries, made.bits)
    else:
        costs = tuple(cost * shape.group for cost in kernel.tile_costs(shape.queries, shape.keys, call.window or 0))
        blocks, steps = min(key_planes * len(costs), gpu().multiprocessors), []
        constants = on_device(make_schedule(blocks, key_planes, costs, plane_bytes(shape)))
    keys = ((shape.batch, shape.kv_heads, shape.keys, shape.head_dim), dtype_of(shape))
    problem = [shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim]
    problem += [key_planes, cleared_planes(shape, kernel)]
    scalars = [*problem, float_bits(call.scale), *scalars_of(call), call.window or 0, *steps]
    return prepare(kernel.program, blocks, [keys, keys], scalars, constants)


@functools.lru_cache(maxsize=128)
def finish_launch(shape: CallShape, call: CallParams) -> Launch:
    """Return the last launch: reads the sums and an output of the main launch; writes dQ."""
    kernel = kernel_of(shape, call)
    program, tiles = finish_program(kernel), query_tiles(shape.queries)
    threads = shape.batch * shape.heads * tiles * BLOCK_Q * kernel.head_dim // 16
    outputs = [((shape.batch, shape.heads, shape.queries, shape.head_dim), dtype_of(shape))]
    problem = [threads, tiles, shape.queries, shape.head_dim, float_bits(call.scale)]
    return prepare(program, -(-threads // program.threads), outputs, problem)


def check(shape: CallShape, call: CallParams) -> None:
    """Self-check the kernel of a call on this GPU, once; `refusal` returns a stored failure."""
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=200, keys=331)
    tried = selfcheck.small_call(small, call)

    def compare() -> str | None:
        q, k, v, cotangent = selfcheck.inputs(small)
        primals = [q, k, v, *selfcheck.slopes(small, tried)]
        outputs = forward_plan(small, tried)(primals)[: len(OUTPUTS)]
        found = by_kernel(primals, (cotangent,), outputs, small, tried)
        return selfcheck.gradient_disagreement(tried, found, [q, k, v, cotangent])

    selfcheck.check(kernel_of(shape, call).program, compare)
