"""Launches of the 8-bit Hopper kernels: quantization, and forward attention on its results."""

import functools
import math
from typing import Final

import mlx.core as mx

from attention.kernels.cuda.runtime.call import LOG2_E, CallParams, CallShape, float_bits
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import (
    INPUTS,
    OUTPUTS,
    Launch,
    Run,
    Stage,
    TensorBox,
    dtype_of,
    make_plan,
    on_device,
    prepare,
)
from attention.kernels.cuda.runtime.program import Program
from attention.kernels.cuda.sm90.forward import WARPGROUP_ROWS
from attention.kernels.cuda.sm90.fp8 import QUANTIZED_ROWS, WIDTHS, Fp8Forward, Quantize, specialise
from attention.kernels.cuda.sm90.launch import least_makespan
from attention.kernels.cuda.sm90.schedule import make_work_items

QUANTIZED: Final = ("k8", "v8", "kv_exponents")
"""Arrays written by the quantization: e4m3 as uint8, and the exponents of their scales."""


def width_of(head_dim: int) -> int:
    """Return the kernels' head dim for an input's."""
    return next(width for width in WIDTHS if head_dim <= width)


@functools.lru_cache(maxsize=256)
def quantize(shape: CallShape) -> Launch:
    """Return the launch of the quantization of keys and values; it writes the arrays of `QUANTIZED`."""
    width = width_of(shape.head_dim)
    planes, blocks = shape.batch * shape.kv_heads, -(-shape.keys // QUANTIZED_ROWS)
    return prepare(
        Quantize(width, shape.element).program,
        2 * planes * blocks,
        [
            ((shape.batch, shape.kv_heads, shape.keys, width), mx.uint8),
            ((shape.batch, shape.kv_heads, width, blocks * QUANTIZED_ROWS), mx.uint8),
            ((planes, blocks, 2), mx.int32),
        ],
        [planes, shape.kv_heads, shape.keys, shape.head_dim],
    )


@functools.lru_cache(maxsize=256)
def forward(shape: CallShape, call: CallParams, kernel: Fp8Forward) -> Launch:
    """Return the launch of the attention kernel: writes the output, and tile parts with their flags."""
    planes = shape.batch * shape.heads
    plane_bytes = 2 * shape.keys * kernel.head_dim // shape.group
    ranges = kernel.tile_ranges(shape.queries, shape.keys, call.window or 0)
    table, parts = make_work_items(gpu().multiprocessors, planes, ranges, plane_bytes, kernel.joining)
    numbers, marks = kernel.part_shapes
    return prepare(
        kernel.program,
        len(table),
        [
            ((shape.batch, shape.heads, shape.queries, shape.head_dim), dtype_of(shape)),
            ((parts, *numbers), mx.float32),
            ((parts, *marks), mx.int64),
        ],
        [
            planes,
            shape.heads,
            shape.group,
            shape.queries,
            shape.keys,
            shape.head_dim,
            call.window or 0,
            float_bits(call.scale * LOG2_E),
            len(table[0]),
        ],
        on_device(table),
    )


def stages(shape: CallShape, call: CallParams, kernel: Fp8Forward) -> list[Stage]:
    """Return the launches of a call: quantization, then attention."""
    made = forward(shape, call, kernel)
    parts = made.keywords["output_shapes"][1][0]
    width = width_of(shape.head_dim)
    return [
        Stage(quantize(shape), INPUTS[1:], QUANTIZED, strided=INPUTS[1:]),
        Stage(
            made,
            (INPUTS[0], *QUANTIZED),
            (OUTPUTS[0], "parts", "marks"),
            maps={
                "q": TensorBox(WARPGROUP_ROWS),
                "k8": TensorBox(kernel.block_n, 128),
                "v8": TensorBox(width, 128),
            },
            omitted=frozenset() if parts else frozenset({"parts", "marks"}),
            serial=True,
        ),
    ]


def plan(shape: CallShape, call: CallParams, kernel: Fp8Forward | None = None, label: str = "") -> Run:
    """Return a call as one primitive, with a given specialisation or the one for the call."""
    return make_plan(INPUTS, OUTPUTS[:1], stages(shape, call, kernel or forward_kernel(shape, call)), label)


@functools.lru_cache(maxsize=256)
def forward_kernel(shape: CallShape, call: CallParams) -> Fp8Forward:
    """Return the specialisation of the attention kernel for a call."""
    largest = specialise(width_of(shape.head_dim), call.causal, shape.element, call.window is not None)
    return least_makespan(largest, shape, call)


def programs(shape: CallShape, call: CallParams) -> tuple[Program, Program]:
    """Return the programs of a call: quantization and attention."""
    return Quantize(width_of(shape.head_dim), shape.element).program, forward_kernel(shape, call).program


def written_bytes(shape: CallShape, call: CallParams) -> int:
    """Return the bytes of all arrays that a call writes, its output among them."""
    written = [made for stage in stages(shape, call, forward_kernel(shape, call)) for made in stage.outputs.values()]
    return sum(math.prod(size) * dtype.size for size, dtype in written)
