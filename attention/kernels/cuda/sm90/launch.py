"""Launches of the Hopper kernels."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Protocol, TypeVar

import mlx.core as mx

from attention.kernels.cpu.listing import block_list
from attention.kernels.cuda.runtime import launch
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import (
    INPUTS,
    OUTPUTS,
    Launch,
    Run,
    Stage,
    TensorBox,
    dtype_of,
    extra_inputs,
    list_planes,
    make_plan,
    on_device,
    prepare,
    scalars_of,
)
from attention.kernels.cuda.runtime.program import Element, Program
from attention.kernels.cuda.sm90.decode import LONG_KEYS, ROWS, STEP, Decode
from attention.kernels.cuda.sm90.forward import (
    WARPGROUP_ROWS,
    Forward,
    ForwardKernel,
    fewer_consumers,
    specialise,
    specialise_lists,
)
from attention.kernels.cuda.sm90.schedule import list_work_items, make_work_items, makespan
from attention.masks import Pattern

MOST: Final = 0.9
"""Share of tiles in a list from which on larger tiles are faster."""


@functools.lru_cache(maxsize=256)
def forward_kernel(shape: CallShape, call: CallParams) -> Forward:
    """Return the Hopper specialisation for a call: the consumer count with the smallest estimated makespan."""
    window, softcap = call.window is not None, call.softcap is not None
    if call.pattern is not None:
        tiles = shape.batch * shape.heads * -(-shape.queries // (2 * WARPGROUP_ROWS))
        few = tiles < gpu().multiprocessors
        most = not few and lists_most(shape, call, call.pattern)
        return specialise_lists(shape.head_dim, shape.element, softcap, few=few, alibi=call.alibi, most=most)
    largest = specialise(shape.head_dim, call.causal, shape.element, window=window, softcap=softcap, alibi=call.alibi)
    return least_makespan(largest, shape, call)


def lists_most(shape: CallShape, call: CallParams, pattern: Pattern) -> bool:
    """Return whether a pattern sees nearly all tiles, in a call for which there are kernels with larger ones."""
    if shape.head_dim > 128 or call.softcap is not None or call.alibi:
        return False
    usual = specialise_lists(shape.head_dim, shape.element)
    made = block_list(pattern, shape.scores, usual.block_m, usual.block_n)
    return len(made.entries) >= MOST * made.key_tiles * (len(made.offsets) - 1)


def least_makespan(largest: ForwardKernel, shape: CallShape, call: CallParams) -> ForwardKernel:
    """Return the variant of a kernel with as many consumers or fewer that ends first by the estimate."""

    def time(kernel: ForwardKernel) -> float:
        ranges = kernel.tile_ranges(shape.queries, shape.keys, call.window or 0)
        steps = makespan(gpu().multiprocessors, shape.batch * shape.heads, ranges, kernel.joining)
        return steps * kernel.step_time

    return min([largest, *fewer_consumers(largest)], key=time)


@functools.lru_cache(maxsize=256)
def forward(shape: CallShape, call: CallParams, kernel: Forward) -> Launch:
    """Return the launch of the Hopper kernel for a call."""
    planes = shape.batch * shape.heads
    plane_bytes = 4 * shape.keys * shape.head_dim // shape.group
    if call.pattern is not None:
        made = block_list(call.pattern, shape.scores, kernel.block_m, kernel.block_n)
        listed, parts = list_work_items(
            gpu().multiprocessors,
            made.offsets,
            list_planes(shape, made.batches, made.heads),
            made.row_tiles,
            plane_bytes,
            kernel.joining,
        )
        return launch_of_work_items(shape, call, kernel, listed, parts, tables=(made.entries, made.bits))
    ranges = kernel.tile_ranges(shape.queries, shape.keys, call.window or 0)
    table, parts = make_work_items(gpu().multiprocessors, planes, ranges, plane_bytes, kernel.joining)
    return launch_of_work_items(shape, call, kernel, table, parts)


def launch_of_work_items(
    shape: CallShape,
    call: CallParams,
    kernel: Forward,
    items: Any,
    parts: int,
    tables: Sequence[Any] = (),
    scalars: Sequence[int] = (),
) -> Launch:
    """Return the launch of the Hopper kernel: writes output, logsumexp, stats, and tile parts with their flags.

    Args:
        shape: shapes of the call.
        call: parameters of the call.
        kernel: the specialisation.
        items: their table, blocks x rounds.
        parts: tile parts in it.
        tables: further int32 tables that the specialisation takes.
        scalars: further scalars that it takes.
    """
    rows = (shape.batch, shape.heads, shape.queries)
    numbers, marks = kernel.part_shapes
    problem = [shape.batch * shape.heads, shape.heads, shape.group, shape.queries, shape.keys, shape.head_dim]
    return prepare(
        kernel.program,
        len(items),
        [
            ((*rows, shape.head_dim), dtype_of(shape)),
            (rows, mx.float32),
            ((*rows, 2), mx.float32),
            ((parts, *numbers), mx.float32),
            ((parts, *marks), mx.int64),
        ],
        [*problem, *scalars_of(call), call.window or 0, len(items[0]), *scalars],
        on_device(items, *tables),
    )


class SplitKernel(Protocol):
    """A specialisation of a split-K kernel."""

    @property
    def program(self) -> Program:
        """The source of the kernel."""
        ...

    @property
    def round_keys(self) -> int:
        """Keys per round of all warps of a block; a split is a multiple of it."""
        ...

    @property
    def part_floats(self) -> int:
        """Floats of the partial result of a split."""
        ...


Kernel = TypeVar("Kernel", bound=SplitKernel)


@dataclass(frozen=True)
class KeySplit(Generic[Kernel]):
    """Split of the keys of a call with few queries."""

    kernel: Kernel
    tiles: int
    """Row tiles of all planes."""
    first_key: int
    splits: int
    split_keys: int


@functools.cache
def _decode(
    width: int, causal: bool, element: Element, window: bool, softcap: bool, architecture: str, shared: int, alibi: bool
) -> Decode:
    """Return a specialisation, the same one for all lengths: its source and what follows from it are made once."""
    return Decode(width, causal, element, window, softcap, architecture, shared, alibi=alibi)


def in_whole_steps(shape: CallShape, call: CallParams) -> CallShape:
    """Return the shape with its keys rounded up to whole steps of the split-K kernels, which divides them alike.

    With a window, on whose first key the division depends, the shape itself.
    """
    rest = shape.keys % STEP
    return shape.with_keys(shape.keys - rest + STEP) if rest and call.window is None else shape


def make_key_split(shape: CallShape, call: CallParams) -> KeySplit[Decode]:
    """Return the split-K specialisation for a call, and its splits."""
    return _key_split(in_whole_steps(shape, call), call)


@functools.lru_cache(maxsize=1024)
def _key_split(shape: CallShape, call: CallParams) -> KeySplit[Decode]:
    width = 64 * -(-shape.head_dim // 64)
    # a single query attends to all keys up to the last: the window is applied by the first key, without masking
    alone = shape.queries == 1
    window, causal = call.window is not None and not alone, call.causal and not alone
    first_seen = max(0, shape.keys - shape.queries + 1 - call.window) if call.window is not None else 0
    softcap, found = call.softcap is not None, gpu()
    kernel = _decode(
        width,
        causal,
        shape.element,
        window,
        softcap,
        found.architecture,
        found.shared_memory_limit,
        call.alibi,
    )
    tiles = shape.batch * shape.kv_heads * math.ceil(shape.group * shape.queries / ROWS)
    splits, keys = kernel.splits(tiles, shape.keys - first_seen, found.multiprocessors)
    if keys >= LONG_KEYS:
        kernel = kernel.alone
        splits, keys = kernel.splits(tiles, shape.keys - first_seen, found.multiprocessors)
    return KeySplit(kernel, tiles, first_seen, splits, keys)


def same_kernel(plan: KeySplit[Kernel], other: KeySplit[Kernel], keys: int) -> KeySplit[Kernel]:
    """Return the splitting of another call, with `keys` keys, by the kernel of a plan: in three splits."""
    read, round_keys = keys - other.first_key, plan.kernel.round_keys
    split_keys = round_keys * math.ceil(read / 3 / round_keys)
    return KeySplit(plan.kernel, other.tiles, other.first_key, -(-read // split_keys), split_keys)


@functools.lru_cache(maxsize=256)
def decode(shape: CallShape, call: CallParams, plan: KeySplit[Any]) -> Launch:
    """Return the launch of the split-K kernel: writes output, logsumexp, stats, and parts with their counts."""
    rows = (shape.batch, shape.heads, shape.queries)
    parts = plan.tiles * plan.splits if plan.splits > 1 else 0
    outputs = [((*rows, shape.head_dim), dtype_of(shape)), (rows, mx.float32), ((*rows, 2), mx.float32)]
    words = 2 * plan.tiles if parts else 0
    outputs.append(((parts * plan.kernel.part_floats + words,), mx.float32))
    problem = [shape.kv_heads, shape.group, shape.queries, shape.keys, shape.head_dim]
    keys = [plan.first_key, plan.split_keys, plan.splits]
    return prepare(
        plan.kernel.program,
        plan.tiles * plan.splits,
        outputs,
        [*problem, *scalars_of(call), call.window or 0, *keys],
    )


KEYS: Final = 3
"""Index of the number of keys among the scalars of `decode`."""


def for_like_lengths(stage: Stage) -> Stage:
    """Return the launch of a split-K kernel for all lengths of keys whose `in_whole_steps` is that of its shape."""
    return replace(stage, lengths={KEYS: ("k", 2)})


PARTS: Final = ("parts", "marks")
OUTPUT_NAMES: Final = (*OUTPUTS, *PARTS)
"""Arrays written by the forward kernel; parts exist only if the keys of some queries are split over several blocks."""
MAX_SCRATCH: Final = 2 << 20
"""Bytes of parts up to which they are scratch of the launcher, which keeps eight of a stream."""
SPLIT_OUTPUTS: Final = (*OUTPUTS, PARTS[0])
"""Arrays written by a split-K kernel: one fewer, since an allocation takes the host a microsecond."""


def forward_stages(
    shape: CallShape, call: CallParams, with_logsumexp: bool = True, kernel: Forward | None = None
) -> list[Stage]:
    """Return the launch of the Hopper kernel, in a given specialisation or the one for the call."""
    kernel = kernel or forward_kernel(shape, call)
    made = forward(shape, call, kernel)
    keys = TensorBox(kernel.block_n)
    return [
        Stage(
            made,
            (*INPUTS, *extra_inputs(call)),
            OUTPUT_NAMES,
            maps={"q": TensorBox(WARPGROUP_ROWS), "k": keys, "v": keys},
            omitted=unwritten(made, with_logsumexp),
            serial=True,
        )
    ]


@functools.lru_cache(maxsize=256)
def forward_plan(shape: CallShape, call: CallParams) -> Run:
    """Return the Hopper forward kernel as a plan without gradient: output, logsumexp and stats."""
    return make_plan((*INPUTS, *extra_inputs(call)), OUTPUTS, forward_stages(shape, call))


def decode_stages(
    shape: CallShape, call: CallParams, plan: KeySplit[Decode], with_logsumexp: bool = True
) -> list[Stage]:
    """Return the launch of the split-K kernel with a given splitting."""
    made = decode(shape, call, plan)
    reads = (*INPUTS, *extra_inputs(call))
    return [
        Stage(
            made,
            reads,
            SPLIT_OUTPUTS,
            strided=INPUTS,
            omitted=unwritten(made, with_logsumexp),
            serial=True,
            scratch=scratch_of(made),
        )
    ]


def scratch_of(made: launch.Launch) -> frozenset[str]:
    """Return the arrays of a split-K launch that may be the launcher's scratch: small parts."""
    parts = math.prod(made.keywords["output_shapes"][SPLIT_OUTPUTS.index(PARTS[0])])
    return frozenset({PARTS[0]} if 0 < 4 * parts <= MAX_SCRATCH else ())


def unwritten(made: launch.Launch, with_logsumexp: bool = True) -> frozenset[str]:
    """Return the arrays of `OUTPUT_NAMES` that are not written."""
    unwanted = set() if with_logsumexp else {"logsumexp", "stats"}
    parts = made.keywords["output_shapes"][OUTPUT_NAMES.index(PARTS[0])]
    return frozenset(unwanted if parts[0] else unwanted | set(PARTS))
