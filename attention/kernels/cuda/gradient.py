"""The backward pass by the Hopper kernels."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import mlx.core as mx

from attention.kernels.cuda import selfcheck, trust
from attention.kernels.cuda.backward import (
    BLOCK_Q,
    LARGEST_HEAD_DIM,
    ROW_NUMBERS,
    Backward,
    finish_program,
    query_tiles,
    rows_program,
    specialise,
)
from attention.kernels.cuda.call import Call, Shape, float_bits
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.launch import Launch, dtype_of, exponent_factor, on_device, prepare, scalars_of
from attention.kernels.cuda.plan import OUTPUTS, Box, Run, Stage, make_plan, plan_label
from attention.kernels.cuda.schedule import make_schedule
from attention.kernels.cuda.stages import forward_plan

L2_BYTES_OF_ELEMENT: Final = 16
"""Of a head that is worked on: queries, cotangents and, in float32, the sums of dQ; these count three times, since all
blocks add to them. With 8 bytes a head dim of 256 was 7 % slower (causal, L = 2048), others the same."""


def refusal(shape: Shape, call: Call) -> str | None:
    """Why these kernels do not make the gradients of a call, in one line, or None if they do."""
    if gpu().architecture != "sm_90a":
        return "the backward kernel needs a Hopper GPU"
    if shape.head_dim > LARGEST_HEAD_DIM:
        return f"the backward kernel takes head dims up to {LARGEST_HEAD_DIM}, not {shape.head_dim}"
    return trust.distrust(kernel_of(shape, call).program)


@functools.cache
def kernel_of(shape: Shape, call: Call) -> Backward:
    """The specialisation for a call."""
    window, softcap = call.window is not None, call.softcap is not None
    return specialise(shape.head_dim, call.causal, shape.element, window=window, softcap=softcap)


def by_kernel(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array], shape: Shape, call: Call
) -> tuple[mx.array, ...]:
    """The gradients of q, k and v; what is given is as for `pullback.gradients`, without a mask."""
    cotangent = cotangents[0].astype(dtype_of(shape))
    of_logsumexp = cotangents[1].astype(mx.float32) if len(cotangents) > 1 else outputs[1]
    arrays = [*primals, outputs[0], cotangent, outputs[2], of_logsumexp]
    d_q, d_k, d_v = planned(shape, call, len(cotangents) > 1)(arrays)[:3]
    return d_q, d_k, d_v


@functools.lru_cache(maxsize=128)
def planned(shape: Shape, call: Call, with_logsumexp: bool) -> Run:
    """The three launches as one operation.

    The first clears the sums of dQ; the second adds to them in place; the third, which waits for dK, rounds them.
    Nobody else ever sees that array.
    """
    inputs = ("q", "k", "v", "output", "cotangent", "stats", "of_logsumexp")
    queries, keys = Box(BLOCK_Q), Box(kernel_of(shape, call).block_k)
    stages = (
        Stage(rows_launch(shape, call, with_logsumexp), inputs[3:], ("rows", "sums"), strided=("cotangent",)),
        Stage(
            backward_launch(shape, call),
            ("q", "k", "v", "cotangent", "rows", "sums"),
            ("d_k", "d_v"),
            frozenset({"sums"}),
            maps={"q": queries, "k": keys, "v": keys, "cotangent": queries},
        ),
        Stage(finish_launch(shape, call), ("sums", "d_k"), ("d_q",)),
    )
    label = plan_label("own gradient", shape, call, with_logsumexp)
    return make_plan(inputs, ("d_q", "d_k", "d_v"), stages, label)


def scratch_bytes(shape: Shape, call: Call) -> int:
    """Device memory that a backward pass takes besides its results: three numbers a query, and dQ in float32."""
    tile = ROW_NUMBERS + BLOCK_Q * kernel_of(shape, call).head_dim
    return 4 * shape.batch * shape.heads * query_tiles(shape.queries) * tile


@functools.lru_cache(maxsize=128)
def rows_launch(shape: Shape, call: Call, with_logsumexp: bool) -> Launch:
    """The launch of the first kernel: exponents and delta of each row, in padded tiles, and dQ's sums cleared."""
    kernel = kernel_of(shape, call)
    planes, tiles = shape.batch * shape.heads, query_tiles(shape.queries)
    outputs = [((planes, tiles, ROW_NUMBERS), mx.float32), ((planes, tiles, BLOCK_Q * kernel.head_dim), mx.float32)]
    problem = [tiles, shape.heads, shape.queries, shape.head_dim, exponent_factor(call)]
    return prepare(rows_program(kernel, with_logsumexp), planes * tiles, outputs, problem)


@functools.lru_cache(maxsize=128)
def backward_launch(shape: Shape, call: Call) -> Launch:
    """The launch for q, k, v, cotangent, rows and dQ's sums; it gives dK and dV."""
    kernel = kernel_of(shape, call)
    key_planes = shape.batch * shape.kv_heads
    costs = tuple(cost * shape.group for cost in kernel.tile_costs(shape.queries, shape.keys, call.window or 0))
    blocks = min(key_planes * len(costs), gpu().multiprocessors)
    plane_bytes = L2_BYTES_OF_ELEMENT * shape.queries * shape.head_dim * shape.group
    table = make_schedule(blocks, key_planes, costs, plane_bytes)
    keys = ((shape.batch, shape.kv_heads, shape.keys, shape.head_dim), dtype_of(shape))
    problem = [shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim]
    scalars = [*problem, float_bits(call.scale), *scalars_of(call), call.window or 0]
    return prepare(kernel.program, blocks, [keys, keys], scalars, on_device(table))


@functools.lru_cache(maxsize=128)
def finish_launch(shape: Shape, call: Call) -> Launch:
    """The launch of the last kernel, for dQ's sums and an output of the second; it gives dQ."""
    kernel = kernel_of(shape, call)
    program, tiles = finish_program(kernel), query_tiles(shape.queries)
    threads = shape.batch * shape.heads * tiles * BLOCK_Q * kernel.head_dim // 16
    outputs = [((shape.batch, shape.heads, shape.queries, shape.head_dim), dtype_of(shape))]
    problem = [threads, tiles, shape.queries, shape.head_dim, float_bits(call.scale)]
    return prepare(program, -(-threads // program.threads), outputs, problem)


def check(shape: Shape, call: Call) -> None:
    """Tries the kernel of a call on this GPU, once; a failure is kept, and `refusal` tells it from then on."""
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=200, keys=331)
    tried = replace(call, scale=shape.head_dim**-0.5, window=100 if call.window is not None else None)

    def compare() -> str | None:
        q, k, v, cotangent = selfcheck.inputs(small)
        outputs = forward_plan(small, tried)([q, k, v])[: len(OUTPUTS)]
        found = by_kernel((q, k, v), (cotangent,), outputs, small, tried)
        return selfcheck.gradient_disagreement(small, tried, found, [q, k, v, cotangent])

    trust.judged(kernel_of(shape, call).program, compare)
