"""Launch parameters of the Hopper forward and split-K kernels, and kernel launches through MLX."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from attention.kernels.cuda.call import LOG2_E, Call, Shape, float_bits
from attention.kernels.cuda.decode import LONG, ROWS, Decode
from attention.kernels.cuda.forward import Forward, smaller, specialise
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.program import Program, machine_code
from attention.kernels.cuda.schedule import make_works, makespan


@dataclass(frozen=True)
class Launch:
    """Everything of a launch except the input arrays, computed once per shape."""

    constants: tuple[mx.array, ...]
    """Constant inputs, appended to the caller's."""
    keywords: dict[str, Any]

    def __call__(self, *inputs: mx.array) -> list[mx.array]:
        """Queue the kernel and return its outputs."""
        made: list[mx.array] = mx.fast.precompiled_cuda_kernel(inputs=[*inputs, *self.constants], **self.keywords)
        return made


def prepare(
    program: Program,
    blocks: int,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    scalars: list[int],
    constants: tuple[mx.array, ...] = (),
) -> Launch:
    """Return a launch of `blocks` blocks with outputs of these shapes and dtypes; compiles the program if needed."""
    return Launch(
        constants,
        {
            "name": program.entry,
            "compiled_source": machine_code(program),
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
            "scalars": scalars,
            "grid": (blocks * program.threads, 1, 1),
            "threadgroup": (program.threads, 1, 1),
            "shared_memory": program.shared_memory,
            "ensure_row_contiguous": True,
        },
    )


def scalars_of(call: Call) -> tuple[int, int]:
    """Return the score factor and `into_cap` of the kernels' Problem, as bits; with a softcap, it replaces the scale.

    The score factor includes log2(e), so that scores are exponents of 2, unless a mask is added to the product.
    """
    units = 1.0 if call.adds_mask else LOG2_E
    if call.softcap is None:
        return float_bits(call.scale * units), 0
    return float_bits(call.softcap * units), float_bits(call.scale / call.softcap)


def exponent_factor(call: Call) -> int:
    """Return the factor that turns a row maximum into an exponent of 2, as bits."""
    return float_bits(LOG2_E) if call.adds_mask else scalars_of(call)[0]


def dtype_of(shape: Shape) -> mx.Dtype:
    """Return the MLX dtype of the inputs."""
    return mx.bfloat16 if shape.element == "bf16" else mx.float16


@functools.lru_cache(maxsize=256)
def forward_kernel(shape: Shape, call: Call) -> Forward:
    """Return the Hopper specialisation for a call: the consumer count with the smallest estimated makespan."""
    window, softcap = call.window is not None, call.softcap is not None
    largest = specialise(shape.head_dim, call.causal, shape.element, window=window, softcap=softcap)

    def time(kernel: Forward) -> float:
        ranges = kernel.tile_ranges(shape.queries, shape.keys, call.window or 0)
        steps = makespan(gpu().multiprocessors, shape.batch * shape.heads, ranges, kernel.joining)
        return steps * kernel.step_time

    return min([largest, *smaller(largest)], key=time)


@functools.lru_cache(maxsize=256)
def forward(shape: Shape, call: Call, kernel: Forward) -> Launch:
    """Return the launch of the Hopper kernel: writes output, logsumexp, stats, and tile parts with their flags."""
    planes = shape.batch * shape.heads
    ranges = kernel.tile_ranges(shape.queries, shape.keys, call.window or 0)
    plane_bytes = 4 * shape.keys * shape.head_dim // shape.group
    table, parts = make_works(gpu().multiprocessors, planes, ranges, plane_bytes, kernel.joining)
    rows = (shape.batch, shape.heads, shape.queries)
    numbers, marks = kernel.part_shapes
    problem = [planes, shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim]
    return prepare(
        kernel.program,
        len(table),
        [
            ((*rows, shape.head_dim), dtype_of(shape)),
            (rows, mx.float32),
            ((*rows, 2), mx.float32),
            ((parts, *numbers), mx.float32),
            ((parts, *marks), mx.int64),
        ],
        [*problem, *scalars_of(call), call.window or 0, len(table[0])],
        on_device(table),
    )


def on_device(table: tuple[object, ...]) -> tuple[mx.array]:
    """Return an int32 table in device memory; arrays built from Python lists are in managed memory."""
    copy = mx.array(table, dtype=mx.int32) + 0
    mx.eval(copy)
    return (copy,)


@dataclass(frozen=True)
class Splitting:
    """Split of the keys of a call with few queries."""

    kernel: Decode
    tiles: int
    """Row tiles of all planes."""
    first_key: int
    splits: int
    split_keys: int


@functools.lru_cache(maxsize=1024)
def splitting(shape: Shape, call: Call) -> Splitting:
    """Return the split-K specialisation for a call, and its splits."""
    width = 64 * -(-shape.head_dim // 64)
    # a single query attends to all keys up to the last: the window is applied by the first key, without masking
    alone = shape.queries == 1
    window, causal = call.window is not None and not alone, call.causal and not alone
    first_seen = max(0, shape.keys - shape.queries + 1 - call.window) if call.window is not None else 0
    softcap, found = call.softcap is not None, gpu()
    kernel = Decode(width, causal, shape.element, window, softcap, found.architecture, found.shared_memory_limit)
    tiles = shape.batch * shape.kv_heads * math.ceil(shape.group * shape.queries / ROWS)
    splits, keys = kernel.splits(tiles, shape.keys - first_seen, found.multiprocessors)
    if keys >= LONG:
        kernel = kernel.alone
        splits, keys = kernel.splits(tiles, shape.keys - first_seen, found.multiprocessors)
    return Splitting(kernel, tiles, first_seen, splits, keys)


def same_kernel(plan: Splitting, shape: Shape, call: Call) -> Splitting:
    """Return the splitting of a call with the kernel of another one, in three splits."""
    other = splitting(shape, call)
    keys = shape.keys - other.first_key
    round_keys = plan.kernel.round_keys
    split_keys = round_keys * math.ceil(keys / 3 / round_keys)
    return Splitting(plan.kernel, other.tiles, other.first_key, -(-keys // split_keys), split_keys)


@functools.lru_cache(maxsize=256)
def decode(shape: Shape, call: Call, plan: Splitting) -> Launch:
    """Return the launch of the split-K kernel: writes output, logsumexp, stats, and partial results with flags."""
    rows = (shape.batch, shape.heads, shape.queries)
    parts = plan.tiles * plan.splits if plan.splits > 1 else 0
    outputs = [((*rows, shape.head_dim), dtype_of(shape)), (rows, mx.float32), ((*rows, 2), mx.float32)]
    outputs += [((parts, plan.kernel.part_floats), mx.float32), ((parts,), mx.int64)]
    problem = [shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim]
    keys = [plan.first_key, plan.split_keys, plan.splits]
    return prepare(
        plan.kernel.program,
        plan.tiles * plan.splits,
        outputs,
        [*problem, *scalars_of(call), call.window or 0, *keys],
    )
