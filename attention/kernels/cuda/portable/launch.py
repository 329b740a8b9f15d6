"""Launches of the general forward kernel: work division of a call, and its launches as plan stages."""

import functools
import math
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention.core.errors import KernelUnavailable
from attention.kernels.cpu.listing import block_list
from attention.kernels.cuda.portable.forward import FEW_ROWS, PortableForward, split_keys, tiles_for, width_of
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import (
    INPUTS,
    OUTPUTS,
    Launch,
    Stage,
    dtype_of,
    exponent_factor,
    extra_inputs,
    list_planes,
    on_device,
    prepare,
    scalars_of,
)
from attention.kernels.cuda.runtime.program import Program
from attention.masks import BlockList

MAX_NARROW_STRIDE = 2**31 - 1


@dataclass(frozen=True)
class WorkDivision:
    """Division of a call's work into blocks."""

    kernel: PortableForward
    blocks: int
    """Blocks without splitting the keys."""
    first_key: int
    """First key that any query attends to, rounded down to a tile."""
    split_keys: int
    splits: int


@functools.lru_cache(maxsize=1024)
def division(shape: CallShape, call: CallParams, narrow_steps: bool) -> WorkDivision:
    """Return the specialisation and blocks of a call; the keys are split if the blocks do not fill the GPU."""
    packed = shape.group * shape.queries <= FEW_ROWS and call.pattern is None
    rows, planes = shape.queries, shape.batch * shape.heads
    if packed:
        rows, planes = shape.group * shape.queries, shape.batch * shape.kv_heads
    widths = width_of(shape.head_dim), width_of(shape.value_dim)
    tiles = tiles_for(*widths, rows, call.mask is not None, gpu().shared_memory_limit)
    kernel = PortableForward(
        *widths,
        causal=call.causal,
        window=call.window is not None,
        softcap=call.softcap is not None,
        mask=call.mask,
        element=shape.element,
        lists=call.pattern is not None,
        alibi=call.alibi,
        packed=packed,
        split=False,
        narrow_steps=narrow_steps,
        tiles=tiles,
        architecture=gpu().architecture,
    )
    blocks = planes * kernel.blocks_of(rows)
    unseen = max(0, shape.keys - shape.queries + 1 - call.window) if call.window is not None else 0
    first_key = unseen // tiles.block_n * tiles.block_n
    key_tiles = -(-(shape.keys - first_key) // tiles.block_n)
    slots = tiles.blocks * gpu().multiprocessors
    if call.pattern is not None:  # the longest list, in entries
        key_tiles = max(1, int(np.diff(_lists(shape, call, kernel).offsets).max()))
    each = split_keys(key_tiles, blocks, slots) if packed or 2 * blocks <= slots else key_tiles
    return _divide(replace(kernel, split=each < key_tiles), blocks, first_key, key_tiles, each)


def _lists(shape: CallShape, call: CallParams, kernel: PortableForward) -> BlockList:
    assert call.pattern is not None
    return block_list(call.pattern, shape.scores, kernel.tiles.block_m, kernel.tiles.block_n)


def list_work_items(shape: CallShape, made: BlockList, splits: int) -> NDArray[np.int32]:
    """Return the work items of the blocks, longest lists first: plane, row tile, first and end entry of each split."""
    lists = (list_planes(shape, made.batches, made.heads)[:, None] * made.row_tiles + np.arange(made.row_tiles)).ravel()
    first, count = made.offsets[lists].astype(np.int64), np.diff(made.offsets)[lists].astype(np.int64)
    order = np.argsort(-count, kind="stable")
    plane, tile = np.divmod(order, made.row_tiles)
    cuts = first[order, None] + count[order, None] * np.arange(splits + 1) // splits
    columns = (np.repeat(plane, splits), np.repeat(tile, splits), cuts[:, :-1].ravel(), cuts[:, 1:].ravel())
    return np.stack(columns, axis=1).astype(np.int32)


def _divide(kernel: PortableForward, blocks: int, first_key: int, key_tiles: int, each: int) -> WorkDivision:
    return WorkDivision(kernel, blocks, first_key, each * kernel.tiles.block_n, -(-key_tiles // each))


def same_kernel(wanted: WorkDivision, shape: CallShape, call: CallParams) -> WorkDivision:
    """Return the division of a call with the kernel of another division: three splits if that one is split."""
    other = division(shape, call, wanted.kernel.narrow_steps)
    rows = shape.group * shape.queries if wanted.kernel.packed else shape.queries
    planes = shape.batch * (shape.kv_heads if wanted.kernel.packed else shape.heads)
    block_n = wanted.kernel.tiles.block_n
    first_key = other.first_key // block_n * block_n
    key_tiles = -(-(shape.keys - first_key) // block_n)
    if call.pattern is not None:
        first_key, key_tiles = 0, max(1, int(np.diff(_lists(shape, call, wanted.kernel).offsets).max()))
    each = -(-key_tiles // 3) if wanted.kernel.split else key_tiles
    return _divide(wanted.kernel, planes * wanted.kernel.blocks_of(rows), first_key, key_tiles, each)


@functools.lru_cache(maxsize=256)
def forward(shape: CallShape, call: CallParams, divided: WorkDivision, program: Program | None = None) -> Launch:
    """Return the launch for q, k, v and mask: writes output, logsumexp, stats, or output, maximum and sum per split.

    `program` is another one with the tiles of the kernel.
    """
    rows = (shape.batch, shape.heads, shape.queries)
    outputs = [((*rows, shape.value_dim), dtype_of(shape)), (rows, mx.float32), ((*rows, 2), mx.float32)]
    if divided.kernel.split:
        outputs = [((divided.splits, *rows, shape.value_dim), mx.float32), ((divided.splits, *rows, 2), mx.float32)]
    problem = [shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim, shape.value_dim]
    keys = [divided.first_key, divided.split_keys, divided.splits]
    numbers = [*problem, *scalars_of(call), call.window or 0, *keys]
    if divided.kernel.narrow_steps:
        numbers += dense_strides(shape, call, "qkv")
    constants: tuple[mx.array, ...] = ()
    if call.pattern is not None:
        made = _lists(shape, call, divided.kernel)
        constants = on_device(list_work_items(shape, made, divided.splits), made.entries, made.bits)
    return prepare(program or divided.kernel.program, divided.blocks * divided.splits, outputs, numbers, constants)


def stages(shape: CallShape, call: CallParams, divided: WorkDivision) -> list[Stage]:
    """Return the launches of a call as plan stages."""
    made = forward(shape, call, divided)
    reads, masks = (*INPUTS, *extra_inputs(call)), ("mask",) if call.mask else ()
    if not divided.kernel.split:
        return [Stage(made, reads, OUTPUTS, strided=INPUTS, masks=masks)]
    parts = ("outputs", "maxima_and_sums")
    joined = join(shape, call, divided.splits, divided.kernel)
    return [Stage(made, reads, parts, strided=INPUTS, masks=masks), Stage(joined, parts, OUTPUTS)]


@functools.lru_cache(maxsize=256)
def join(shape: CallShape, call: CallParams, splits: int, kernel: PortableForward) -> Launch:
    """Return the launch of the join pass, which combines the partial results of the splits."""
    rows = (shape.batch, shape.heads, shape.queries)
    outputs = [((*rows, shape.value_dim), dtype_of(shape)), (rows, mx.float32), ((*rows, 2), mx.float32)]
    program, count = kernel.join_program, math.prod(rows)
    numbers = [count, shape.value_dim, splits, exponent_factor(call)]
    return prepare(program, math.ceil(count * 32 / program.threads), outputs, numbers)


def dense_strides(shape: CallShape, call: CallParams, arrays: str) -> list[int]:
    """Return the strides of contiguous arrays, in the order of `arrays` (of "q", "k", "v", "o"), then of the mask.

    Raises:
        KernelUnavailable: a stride exceeds the 32-bit scalars of MLX's precompiled-kernel operation.
    """
    rows = {"q": (shape.heads, shape.queries, shape.head_dim), "k": (shape.kv_heads, shape.keys, shape.head_dim)}
    rows |= {"v": (*rows["k"][:2], shape.value_dim), "o": (*rows["q"][:2], shape.value_dim)}
    steps = [step for name in arrays for step in _strides(*rows[name])]
    if call.mask:
        steps += [*_strides(shape.heads, shape.queries, shape.keys), 1]
    if max(steps) > MAX_NARROW_STRIDE:
        raise KernelUnavailable("without the launcher, which has to be compiled, arrays this large are not taken")
    return steps


def _strides(planes: int, rows: int, columns: int) -> tuple[int, int, int]:
    return planes * rows * columns, rows * columns, columns
