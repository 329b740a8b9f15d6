"""Plans of kernels that work with other GPUs of the host: attention over own and their keys, and merges.

The launcher's `Peers` runs them (`runtime/launcher_peers.hpp`).
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Final

import mlx.core as mx

from attention.kernels.cuda.attend import first_trusted
from attention.kernels.cuda.choice import sm90_refusal
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import (
    INPUTS,
    OUTPUTS,
    Run,
    Stage,
    TensorBox,
    dtype_of,
    make_plan,
    prepare,
)
from attention.kernels.cuda.runtime.program import Program
from attention.kernels.cuda.sm90.decode import MAX_ROWS
from attention.kernels.cuda.sm90.forward import WARPGROUP_ROWS, Forward
from attention.kernels.cuda.sm90.launch import (
    PARTS,
    decode_stages,
    forward_kernel,
    launch_of_work_items,
    make_key_split,
    unwritten,
)
from attention.kernels.cuda.sm90.schedule import make_work_items

MAX_HEAD_DIM: Final = 128
TILE: Final = 128
"""Keys per tile; runs of keys begin at multiples of it."""
FAR: Final = 1 << 30
"""In `Placement.tiles`: of other ranks' keys; as in sm90/pipeline.cuh."""
FAR_INPUTS: Final = ("far_k", "far_v")
PARTIAL: Final = ("partial", "sums")
"""Output and logsumexp of a rank's own keys."""
MERGE_THREADS: Final = 128


@dataclass(frozen=True)
class Placement:
    """Where the rows and keys of a rank's call are."""

    second: int
    """First row of the second run of rows; the number of rows if there is one run."""
    shifts: tuple[int, int]
    """Position of a row among the call's keys less its number, in each run."""
    tiles: tuple[int, ...]
    """For each tile of the keys its first row in the rank's own keys, or, plus FAR, in those of other ranks."""

    def position(self, row: int) -> int:
        """Return the position of a row among the keys."""
        return row + self.shifts[row >= self.second]


def refusal(shape: CallShape, call: CallParams) -> str | None:
    """Return why no kernel takes keys in two arrays for such a call, or None."""
    if call.pattern is not None or call.alibi:
        return "only causal masks and windows"
    if shape.head_dim > MAX_HEAD_DIM or shape.group * shape.queries <= MAX_ROWS:
        return f"only head dims up to {MAX_HEAD_DIM}, and many rows"
    if gpu().architecture != "sm_90a":
        return "only Hopper GPUs"
    return sm90_refusal(shape, call)


def attend_plan(
    shape: CallShape, call: CallParams, placement: Placement, groups: tuple[int, ...], with_logsumexp: bool
) -> Run:
    """Return attention over own keys and those of other ranks as a plan for `Peers.attend`: output, and logsumexp.

    Args:
        shape: of the call; its keys are the rank's own and the other ranks'.
        call: parameters of the call.
        placement: where the rows and keys are.
        groups: key heads of each launch; one for all heads of a batch of several.
        with_logsumexp: whether the logsumexp is wanted too.

    Raises:
        KernelUnavailable: the kernel cannot be compiled.
    """
    return _plan(shape, call, placement, groups, _kernel(shape, call), with_logsumexp)


@functools.lru_cache(maxsize=64)
def _plan(
    shape: CallShape,
    call: CallParams,
    placement: Placement,
    groups: tuple[int, ...],
    kernel: Forward,
    with_logsumexp: bool,
) -> Run:
    stages, first = [], 0
    for heads in groups:
        stages.append(_stage(shape, call, placement, kernel, first, heads, with_logsumexp))
        first += heads
    return make_plan((*INPUTS, *FAR_INPUTS), OUTPUTS[: 1 + with_logsumexp], stages)


def _kernel(shape: CallShape, call: CallParams) -> Forward:
    """Return the specialisation for a call: that of a call on one GPU, for keys in two arrays."""
    return replace(forward_kernel(shape, call), gathered=True)


def _stage(
    whole: CallShape,
    call: CallParams,
    placement: Placement,
    kernel: Forward,
    first: int,
    heads: int,
    with_logsumexp: bool = True,
) -> Stage:
    """Return the launch of some key heads."""
    shape = replace(whole, heads=heads * whole.group, kv_heads=heads)
    planes = shape.batch * shape.heads
    ranges = kernel.tile_ranges(shape.queries, shape.keys, call.window or 0, placement.position)
    plane_bytes = 4 * shape.keys * shape.head_dim // shape.group
    table, parts = make_work_items(gpu().multiprocessors, planes, ranges, plane_bytes, kernel.joining)
    places = (placement.second, *placement.shifts)
    made = launch_of_work_items(shape, call, kernel, table, parts, tables=(placement.tiles,), scalars=places)
    own_parts = [f"{name} of heads from {first}" for name in PARTS]
    omitted = {own_parts[PARTS.index(name)] if name in PARTS else name for name in unwritten(made, with_logsumexp)}
    queries, all_rows = (0, first * shape.group), (whole.batch, whole.heads, whole.queries)
    return Stage(
        made,
        (*INPUTS, *FAR_INPUTS),
        (*OUTPUTS, *own_parts),
        maps={"q": TensorBox(WARPGROUP_ROWS)} | dict.fromkeys((*INPUTS[1:], *FAR_INPUTS), TensorBox(kernel.block_n)),
        omitted=frozenset(omitted | {"stats"}),
        serial=True,
        first=dict.fromkeys(("q", *OUTPUTS), queries) | dict.fromkeys((*INPUTS[1:], *FAR_INPUTS), (0, first)),
        whole={"output": (*all_rows, whole.head_dim), "logsumexp": all_rows},
    )


def distrust(shape: CallShape, call: CallParams) -> str | None:
    """Check the kernel of a call unless that was done on this GPU; return an error, or None."""
    kernel = _kernel(shape, call)
    return selfcheck.check(kernel.program, functools.partial(_compare, shape, call, kernel))


def _compare(shape: CallShape, call: CallParams, kernel: Forward) -> str | None:
    """Run the kernel on small inputs, of which the middle of the keys is another rank's."""
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=300, keys=523)
    tried = selfcheck.small_call(small, call)
    given = selfcheck.inputs(small)[:3]
    placement = Placement(small.queries, (small.keys - small.queries,) * 2, (0, FAR, FAR + TILE, TILE, 2 * TILE))
    stages = [_stage(small, tried, placement, kernel, first, 1) for first in range(2)]
    run = make_plan((*INPUTS, *FAR_INPUTS), OUTPUTS[:2], stages)
    own = [mx.concatenate([x[:, :, :TILE], x[:, :, 3 * TILE :]], axis=2) for x in given[1:]]
    found = run([given[0], *own, *(x[:, :, TILE : 3 * TILE] for x in given[1:])])
    return selfcheck.disagreement(tried, found[0], found[1], given)


@dataclass(frozen=True)
class Inboxes:
    """Where ranks leave partial results for each other."""

    rank: int
    addresses: tuple[int, ...]
    """Of each rank's inbox, as this process sees it."""
    capacity: int
    """Words of each half of an inbox for one rank."""


@functools.lru_cache(maxsize=64)
def merge_plan(shape: tuple[int, ...], dtype: mx.Dtype, inboxes: Inboxes, with_logsumexp: bool) -> Run:
    """Return the merge of partial outputs and logsumexps as a plan for `Peers.merge`.

    Args:
        shape: of the output, (B, H, rows, columns); the columns are even.
        dtype: bfloat16 or float16.
        inboxes: where partial results are left.
        with_logsumexp: whether the merged logsumexp is wanted too.

    Raises:
        KernelUnavailable: the kernel cannot be compiled.
    """
    stage = _merge_stage(shape, dtype, inboxes, with_logsumexp)
    return make_plan(PARTIAL, OUTPUTS[: 1 + with_logsumexp], [stage])


@functools.lru_cache(maxsize=64)
def decode_plan(shape: CallShape, call: CallParams, inboxes: Inboxes, with_logsumexp: bool) -> Run | None:
    """Return a call of few rows with this rank's keys, and the merge, as one plan for `Peers.merge` of q, k and v.

    None if the split-K kernel does not take the call.

    Raises:
        KernelUnavailable: a kernel cannot be compiled.
    """
    if call.mask is not None or call.pattern is not None or call.alibi or first_trusted(shape, call) != "decode":
        return None
    [own] = decode_stages(shape, call, make_key_split(shape, call))
    renamed = replace(own, writes=(*PARTIAL, *own.writes[len(PARTIAL) :]), omitted=own.omitted | {"stats"})
    merge = _merge_stage((*shape.scores[:3], shape.value_dim), dtype_of(shape), inboxes, with_logsumexp)
    return make_plan(INPUTS, OUTPUTS[: 1 + with_logsumexp], [renamed, merge])


def merge_program(ranks: int, dtype: mx.Dtype, architecture: str = "sm_90a") -> Program:
    """Return the program of the kernel that merges partial results."""
    return Program(
        name="merge_ranks",
        architecture=architecture,
        constants=(("RANKS", ranks), ("THREADS", MERGE_THREADS), ("BFLOAT16", int(dtype == mx.bfloat16))),
        texts=("runtime/common.cuh", "runtime/merge.cu"),
        threads=MERGE_THREADS,
        shared_memory=0,
    )


def _merge_stage(shape: tuple[int, ...], dtype: mx.Dtype, inboxes: Inboxes, with_logsumexp: bool) -> Stage:
    *rows, columns = shape
    words = math.prod(shape) // 2
    addresses = mx.array(inboxes.addresses, mx.uint64) + 0
    mx.eval(addresses)
    made = prepare(
        merge_program(len(inboxes.addresses), dtype, gpu().architecture),
        -(-words // MERGE_THREADS),
        [(shape, dtype), (tuple(rows), mx.float32)],
        [words, columns // 2, inboxes.rank, inboxes.capacity],
        (addresses,),
    )
    omitted = frozenset(() if with_logsumexp else ("logsumexp",))
    return Stage(made, PARTIAL, OUTPUTS[:2], omitted=omitted, passed=(0,))
