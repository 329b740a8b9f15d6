"""Launches of the forward kernels for quantized keys and values: by a workspace, or dequantized in shared memory."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.portable.launch import WorkDivision
from attention.kernels.cuda.quantized.formats import PackedKV
from attention.kernels.cuda.quantized.forward import PIECES, THREADS, Dequantize, QuantizedGeneral
from attention.kernels.cuda.quantized.launch import READS
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import INPUTS, OUTPUTS, Launch, Stage, dtype_of, extra_inputs, prepare
from attention.kernels.cuda.sm90.launch import PARTS

MAX_WORKSPACE: Final = 32 << 20
"""Bytes of the keys and values that are dequantized at a time, if they are those of more than one head."""
MAX_HEAD: Final = 64 << 20
"""Bytes of the keys and values of a head, up to which they are dequantized to a workspace."""
WORKSPACE: Final = {"k": "dense keys", "v": "dense values"}
SHARED: Final = (*INPUTS, *OUTPUTS, *PARTS, "mask", "slopes")
"""Arrays that the launches of all groups of heads read or write; they have others of their own."""


# ---- general kernel: dequantizes to shared memory ----------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def division(shape: CallShape, call: CallParams) -> WorkDivision:
    """Return the work division of the general kernel for a call, that of the dense one."""
    return portable_launch.division(shape, call, narrow_steps=False)


def general_stages(shape: CallShape, call: CallParams, packed: PackedKV, divided: WorkDivision) -> list[Stage]:
    """Return the launches of the general kernel in a given division; it always writes the logsumexp."""
    dense, *joining = portable_launch.stages(shape, call, divided)
    program = QuantizedGeneral(divided.kernel, packed).program
    made = portable_launch.forward(shape, call, divided, program)
    reads = (*READS, *extra_inputs(call))
    alignments = packed.alignments(shape.head_dim, shape.value_dim)
    own = Stage(
        made, reads, dense.writes, strided=READS, alignments=alignments, masks=dense.masks, omitted=packed.missing
    )
    return [own, *joining]


# ---- workspace: some heads at a time are dequantized, for the dense kernels ----------------------------------------


@dataclass(frozen=True)
class Heads:
    """Key heads that are dequantized together: those of some whole batch entries, or some of one."""

    batch: int
    batches: int
    head: int
    heads: int


def head_bytes(shape: CallShape) -> int:
    """Return the bytes of the dequantized keys and values of a head."""
    return 2 * shape.keys * (shape.head_dim + shape.value_dim)


def divided_heads(shape: CallShape, limit: int = MAX_WORKSPACE) -> list[Heads]:
    """Return the key heads of a call in groups, each with up to `limit` bytes of keys and values, or of one head."""
    at_once = max(1, limit // head_bytes(shape))
    batches = at_once // shape.kv_heads
    if batches:
        steps = range(0, shape.batch, batches)
        return [Heads(first, min(batches, shape.batch - first), 0, shape.kv_heads) for first in steps]
    count = math.ceil(shape.kv_heads / at_once)
    cuts = [shape.kv_heads * i // count for i in range(count + 1)]
    return [
        Heads(batch, 1, first, end - first) for batch in range(shape.batch) for first, end in itertools.pairwise(cuts)
    ]


def shape_of(shape: CallShape, own: Heads) -> CallShape:
    """Return the shape of a call of these heads alone."""
    return replace(shape, batch=own.batches, heads=own.heads * shape.group, kv_heads=own.heads)


def dequantize_program(shape: CallShape, packed: PackedKV) -> Dequantize:
    """Return the specialisation of dequantize.cu for a call."""
    return Dequantize(shape.element, packed, gpu().architecture)


@functools.lru_cache(maxsize=256)
def dequantize(shape: CallShape, packed: PackedKV) -> Launch:
    """Return the launch that writes keys and values to a workspace."""
    rows = shape.batch * shape.kv_heads * shape.keys
    blocks = [-(-rows * width // (16 * PIECES * THREADS)) for width in (shape.head_dim, shape.value_dim)]
    keys = (shape.batch, shape.kv_heads, shape.keys)
    return prepare(
        dequantize_program(shape, packed).program,
        sum(blocks),
        [((*keys, width), dtype_of(shape)) for width in (shape.head_dim, shape.value_dim)],
        [rows, shape.kv_heads, shape.keys, shape.head_dim, shape.value_dim, blocks[0]],
    )


def workspace_stages(
    shape: CallShape,
    packed: PackedKV,
    dense: Callable[[CallShape], list[Stage]],
    groups: list[Heads],
) -> list[Stage]:
    """Return the launches for groups of heads in turn: dequantization, and those of a dense kernel for a shape."""
    largest = max(groups, key=lambda own: own.batches * own.heads)
    keys_and_values = dequantize(shape_of(shape, largest), packed).keywords["output_shapes"]
    whole = dict(zip(WORKSPACE.values(), keys_and_values, strict=True))
    rows = (shape.batch, shape.heads, shape.queries)
    whole |= zip(OUTPUTS, ((*rows, shape.value_dim), rows, (*rows, 2)), strict=True)
    attending = [dense(shape_of(shape, own)) for own in groups]
    for stages in attending:
        for name, (size, _) in (item for stage in stages for item in stage.outputs.items()):
            if name in PARTS:  # kernels mark their parts with the serial number of the launch
                whole[name] = max(whole.get(name, ()), size, key=math.prod)
    alignments = packed.alignments(shape.head_dim, shape.value_dim)
    made = []
    for i, (own, stages) in enumerate(zip(groups, attending, strict=True)):
        keys, queries = (own.batch, own.head), (own.batch, own.head * shape.group)
        made.append(
            Stage(
                dequantize(shape_of(shape, own), packed),
                READS[1:],
                tuple(WORKSPACE.values()),
                strided=READS[1:],
                alignments=alignments,
                omitted=packed.missing,
                first=dict.fromkeys(READS[1:], keys),
                whole=whole,
            )
        )
        made += [_of_heads(stage, i, queries, whole) for stage in stages]
    return made


def _of_heads(stage: Stage, group: int, queries: tuple[int, int], whole: dict[str, tuple[int, ...]]) -> Stage:
    """Return a launch of a dense kernel for a group of heads, which reads the workspace instead of keys and values.

    As it counts as writing the workspace, the next group is dequantized after it.
    """

    def name_of(name: str) -> str:
        return WORKSPACE.get(name, name if name in SHARED else f"{name} {group}")

    return replace(
        stage,
        reads=tuple(name_of(name) for name in stage.reads),
        writes=tuple(name_of(name) for name in stage.writes),
        updates=frozenset(name_of(name) for name in {*stage.updates, *WORKSPACE} & set(stage.reads)),
        maps={name_of(name): box for name, box in stage.maps.items()},
        strided=tuple(name_of(name) for name in stage.strided),
        omitted=frozenset(name_of(name) for name in stage.omitted),
        first=dict.fromkeys(("q", "mask", "slopes", *OUTPUTS), queries),
        whole=whole,
        scratch=frozenset(),
    )
