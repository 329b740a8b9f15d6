"""The backward pass: by our kernels where they take the call, through MLX's own path where not."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from attention.kernels.cuda import launch, launcher, selfcheck, trust
from attention.kernels.cuda.backward import (
    LARGEST_HEAD_DIM,
    MAP_BYTES,
    ROWS,
    Backward,
    finish_program,
    rows_program,
    specialise,
)
from attention.kernels.cuda.call import Call, Shape, float_bits
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.launch import Launch, dtype_of, prepare, scalars_of
from attention.kernels.cuda.plain import through_mlx
from attention.kernels.cuda.plan import Run, Stage, make_plan
from attention.kernels.cuda.schedule import make_schedule


L2_BYTES_OF_ELEMENT = 8
"""Of a head that is worked on: queries, cotangents, and the sums of dQ in float32."""


def refusal(shape: Shape, call: Call) -> str | None:
    """Why gradients go through MLX's own path, in one line, or None if our kernels make them."""
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


def gradients(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array], shape: Shape, call: Call
) -> tuple[mx.array, ...]:
    """The gradients of q, k and v.

    Args:
        primals: q, k, v.
        cotangents: of the output, and of the logsumexp if that was asked for.
        outputs: what the forward pass made: output and logsumexp.
        shape: of the arrays.
        call: what was computed.
    """
    if not _taken(shape, call):
        return tuple(through_mlx(list(primals), list(cotangents), call))
    return by_kernel(primals, cotangents, outputs, shape, call)


@functools.lru_cache(maxsize=256)
def _taken(shape: Shape, call: Call) -> bool:
    if refusal(shape, call) is None:
        check(shape, call)
    return refusal(shape, call) is None


def by_kernel(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array], shape: Shape, call: Call
) -> tuple[mx.array, ...]:
    """The same by our kernels.

    The first clears dQ, in float32; the second adds to it in place, though MLX counts it among its inputs; the third,
    which waits for dK, rounds it. Nobody else ever sees that array.
    """
    cotangent = cotangents[0].astype(dtype_of(shape))
    of_logsumexp = cotangents[1].astype(mx.float32) if len(cotangents) > 1 else outputs[1]
    if launcher.missing() is None:
        arrays = [*primals, outputs[0], cotangent, outputs[1], of_logsumexp]
        d_q, d_k, d_v = planned(shape, call, len(cotangents) > 1)(arrays)[:3]
        return d_q, d_k, d_v
    rows, sums = rows_launch(shape, call, len(cotangents) > 1)(outputs[0], cotangent, outputs[1], of_logsumexp)
    d_k, d_v, _ = backward_launch(shape, call)(*primals, cotangent, rows, sums)
    (d_q,) = finish_launch(shape, call)(sums, d_k)
    return d_q, d_k, d_v


@functools.lru_cache(maxsize=128)
def planned(shape: Shape, call: Call, with_logsumexp: bool) -> Run:
    """The three launches as one operation."""
    inputs = ("q", "k", "v", "output", "cotangent", "logsumexp", "of_logsumexp")
    stages = (
        Stage(rows_launch(shape, call, with_logsumexp), inputs[3:], ("rows", "sums")),
        Stage(
            backward_launch(shape, call),
            ("q", "k", "v", "cotangent", "rows", "sums"),
            ("d_k", "d_v", "maps"),
            frozenset({"sums"}),
        ),
        Stage(finish_launch(shape, call), ("sums", "d_k"), ("d_q",)),
    )
    return make_plan(inputs, ("d_q", "d_k", "d_v"), stages)


@functools.lru_cache(maxsize=128)
def rows_launch(shape: Shape, call: Call, with_logsumexp: bool) -> Launch:
    """The launch of the first kernel: logsumexp and delta of each row, in padded tiles, and dQ's sums cleared."""
    kernel = kernel_of(shape, call)
    planes, tiles = shape.batch * shape.heads, kernel.query_tiles(shape.queries)
    units = tiles * kernel.block_q // ROWS
    outputs = [((planes, units, 2, ROWS), mx.float32), ((planes, tiles, kernel.block_q * kernel.head_dim), mx.float32)]
    problem = [units, shape.queries, shape.head_dim]
    return prepare(rows_program(kernel, with_logsumexp), planes * units, outputs, problem)


@functools.lru_cache(maxsize=128)
def backward_launch(shape: Shape, call: Call) -> Launch:
    """The launch for q, k, v, cotangent, rows and dQ / scale; it gives dK, dV, and scratch."""
    kernel = kernel_of(shape, call)
    planes, key_planes = shape.batch * shape.heads, shape.batch * shape.kv_heads
    costs = tuple(cost * shape.group for cost in kernel.tile_costs(shape.queries, shape.keys, call.window or 0))
    blocks = min(key_planes * len(costs), gpu().multiprocessors)
    plane_bytes = L2_BYTES_OF_ELEMENT * shape.queries * shape.head_dim * shape.group
    table = mx.array(make_schedule(blocks, key_planes, costs, plane_bytes), dtype=mx.int32)
    mx.eval(table)
    keys = ((shape.batch, shape.kv_heads, shape.keys, shape.head_dim), dtype_of(shape))
    problem = [planes, shape.group, shape.queries, shape.keys, shape.head_dim]
    return prepare(
        kernel.program,
        blocks,
        [keys, keys, ((blocks * MAP_BYTES,), mx.uint8)],
        [*problem, float_bits(call.scale), *scalars_of(call), call.window or 0],
        (table,),
    )


@functools.lru_cache(maxsize=128)
def finish_launch(shape: Shape, call: Call) -> Launch:
    """The launch of the last kernel, for dQ's sums and an output of the second; it gives dQ."""
    kernel = kernel_of(shape, call)
    program, tiles = finish_program(kernel), kernel.query_tiles(shape.queries)
    threads = shape.batch * shape.heads * tiles * kernel.block_q * kernel.head_dim // 16
    outputs = [((shape.batch, shape.heads, shape.queries, shape.head_dim), dtype_of(shape))]
    problem = [threads, tiles, shape.queries, shape.head_dim, float_bits(call.scale)]
    return prepare(program, -(-threads // program.threads), outputs, problem)


def check(shape: Shape, call: Call) -> None:
    """Tries the kernel of a call on this GPU, once; a failure is kept, and `refusal` tells it from then on."""
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=200, keys=331)
    tried = replace(call, scale=shape.head_dim**-0.5, window=100 if call.window is not None else None)

    def compare() -> str | None:
        q, k, v, cotangent = selfcheck.inputs(small)
        outputs = launch.forward(small, tried)(q, k, v)[:2]
        found = by_kernel((q, k, v), (cotangent,), outputs, small, tried)
        return selfcheck.gradient_disagreement(small, tried, found, [q, k, v, cotangent])

    trust.judged(kernel_of(shape, call).program, compare)
