"""Launches of the split-K kernel for quantized keys and values, and inputs of all kernels that read them."""

import functools
import math
from dataclasses import replace
from typing import Final

from attention.kernels.cuda.quantized.decode import MAX_ROWS, QUERY_ROWS, TILE, QuantizedDecode
from attention.kernels.cuda.quantized.formats import PackedKV
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import OUTPUTS, Stage
from attention.kernels.cuda.sm90.decode import LONG_KEYS
from attention.kernels.cuda.sm90.launch import (
    SPLIT_OUTPUTS,
    KeySplit,
    decode,
    in_whole_steps,
    scratch_of,
    unwritten,
)

READS: Final = ("q", "k", "k_scales", "k_biases", "v", "v_scales", "v_biases")
MIN_STAGES: Final = 3
"""Buffers of a warp: two are filled while one is read."""
SCALED_GROUP: Final = 64
"""Group size of values from which weights are scaled, not values: SCALED_WEIGHTS of decode.cu."""


def inputs(packed: PackedKV) -> tuple[str, ...]:
    """Return the names of the arrays of a call, in order: q, and the parts of keys and values."""
    return tuple(name for name in READS if name not in packed.missing)


def refusal(shape: CallShape, call: CallParams) -> str | None:
    """Return why the split-K kernel does not take a call with quantized keys and values, or None."""
    kernel = "the split-K kernel for quantized keys and values"
    if call.mask is not None or call.pattern is not None or call.alibi:
        return f"{kernel} takes no array mask, pattern or ALiBi"
    if shape.value_dim != shape.head_dim:
        return f"{kernel} takes values as wide as the keys, {shape.head_dim}, not {shape.value_dim}"
    if shape.group * shape.queries > MAX_ROWS:
        return (
            f"{kernel} takes up to {MAX_ROWS} rows (queries times the heads that share a key head), not "
            f"{shape.group * shape.queries}"
        )
    return None


def make_key_split(shape: CallShape, call: CallParams, packed: PackedKV) -> KeySplit[QuantizedDecode]:
    """Return the split-K specialisation for a call, and its splits."""
    return _key_split(in_whole_steps(shape, call), call, packed)


@functools.lru_cache(maxsize=1024)
def _key_split(shape: CallShape, call: CallParams, packed: PackedKV) -> KeySplit[QuantizedDecode]:
    width = next(width for width in (64, 128, 256) if shape.head_dim <= width)
    # a single query attends to all keys up to the last: of a window the kernel masks only what precedes it in its tile
    alone = shape.queries == 1
    first_seen = max(0, shape.keys - shape.queries + 1 - call.window) if call.window is not None else 0
    first_key = first_seen // TILE * TILE
    found, rows = gpu(), shape.group * shape.queries
    query_tiles = 1 if rows <= QUERY_ROWS or width > 128 else 2
    kernel = fill(
        QuantizedDecode(
            width,
            query_tiles=query_tiles,
            causal=call.causal and not alone,
            element=shape.element,
            window=call.window is not None and not alone,
            softcap=call.softcap is not None,
            architecture=found.architecture,
            packed=packed,
            whole=shape.head_dim == width,
            shared_memory_limit=found.shared_memory_limit,
        ),
        alone,
    )
    tiles = shape.batch * shape.kv_heads * math.ceil(rows / kernel.rows)
    splits, keys = kernel.splits(tiles, shape.keys - first_key, found.multiprocessors)
    if keys >= LONG_KEYS and kernel.resident_blocks > 1 and not _is_small(packed):
        kernel = alone_on_multiprocessor(kernel)
        splits, keys = kernel.splits(tiles, shape.keys - first_key, found.multiprocessors)
    return KeySplit(kernel, tiles, first_key, splits, keys)


def _is_small(packed: PackedKV) -> bool:
    """Return whether keys and values are so small that two blocks read them faster than one with larger buffers."""
    return all(form.bits <= 4 and (form.group_size >= SCALED_GROUP or not form.has_biases) for form, _ in packed.parts)


def fill(kernel: QuantizedDecode, alone: bool) -> QuantizedDecode:
    """Return the variant of a kernel with the most warps and keys in a buffer for which there is room.

    Two blocks per multiprocessor hide the start and the end of each other.

    Args:
        kernel: a specialisation.
        alone: whether there is one query, so that all rows see the same keys.
    """
    if kernel.head_dim > 128 or kernel.query_tiles > 1:
        return _fitted(replace(kernel, warps=8))
    five_bits = any(form.bits == 5 for form, _ in kernel.packed.parts)
    if not alone or five_bits or kernel.architecture != "sm_90a":
        return _fitted(replace(kernel, warps=12))
    return _with_most_tiles(replace(kernel, warps=8, resident_blocks=2))


def alone_on_multiprocessor(kernel: QuantizedDecode) -> QuantizedDecode:
    """Return the variant for many keys per split, with one block per multiprocessor and larger buffers."""
    made = _with_most_tiles(replace(kernel, warps=8, resident_blocks=1))
    value = kernel.packed.format.value
    busy = value.bits <= 4 and value.group_size < SCALED_GROUP  # instructions are short, so more warps hide latencies
    return replace(made, warps=12) if busy else made


def _fitted(kernel: QuantizedDecode) -> QuantizedDecode:
    """Return the variant with as many warps or fewer whose buffers fit in shared memory."""
    while kernel.warps > 1 and kernel.shared_memory > kernel.shared_memory_limit:
        kernel = replace(kernel, warps=kernel.warps // 2)
    return kernel


def _with_most_tiles(kernel: QuantizedDecode) -> QuantizedDecode:
    variants = [replace(kernel, tiles=tiles) for tiles in (4, 2, 1)]
    return next((made for made in variants if made.stages >= MIN_STAGES), variants[-1])


def stages(
    shape: CallShape,
    call: CallParams,
    packed: PackedKV,
    with_logsumexp: bool = True,
    plan: KeySplit[QuantizedDecode] | None = None,
) -> list[Stage]:
    """Return the launch of the split-K kernel, with a given splitting or the one for the call."""
    plan = plan or make_key_split(shape, call, packed)
    made = decode(shape, call, plan)
    return [
        Stage(
            made,
            READS,
            SPLIT_OUTPUTS,
            strided=READS,
            alignments=packed.alignments(shape.head_dim),
            omitted=packed.missing | {OUTPUTS[2]} | unwritten(made, with_logsumexp),
            serial=True,
            scratch=scratch_of(made),
        )
    ]
