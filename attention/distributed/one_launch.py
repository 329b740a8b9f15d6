"""A rank's call by one or two launches of a CUDA kernel, over its own keys and those of other ranks as they arrived.

    copy engines   other ranks' keys, some heads   the other heads
    kernel                                         some heads        the other heads

Nothing is put in the order of the sequence, and no outputs are joined: the kernel gets a table of where each tile of
keys is, and the places of its two runs of rows (zigzag). Only without gradients; with them `attend` gathers keys.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Final, cast

import mlx.core as mx
from msgspec import Struct

from attention.core.errors import KernelUnavailable, error_line
from attention.distributed import collectives
from attention.distributed.collectives import Group
from attention.distributed.exchange import Exchange, intersection, offset_in
from attention.distributed.layout import Chunk, rows_of, union
from attention.distributed.movement import sent_runs
from attention.distributed.peers import MIN_BYTES, SLOT_BYTES, RowPlan
from attention.implementations.calls import call_hooks, call_through_hooks, current_backend
from attention.implementations.fused import Poc
from attention.masks import Mask, dtype_name

TILE: Final = 128
"""Keys of a tile of the kernel."""
MIN_OVERLAPPED_BYTES: Final = 24 << 20
"""Bytes received below which a second launch costs more than waiting for all of them."""
MAX_RUNS: Final = 2
"""Runs of rows that the kernel takes."""


class Arrangement(Struct, frozen=True):
    """What a rank sends and needs, and where the keys of its call are."""

    plan: RowPlan
    keys: int
    second: int
    """First row of the second run of rows."""
    shifts: tuple[int, int]
    """Position of a row among the keys less its number, in each run."""
    sources: tuple[tuple[bool, int], ...]
    """For each tile of keys whether it is another rank's, and its first row among those or its own."""


@lru_cache(maxsize=64)
def arrange(exchange: Exchange) -> tuple[Arrangement, ...] | None:
    """Return the arrangement of each rank, or None if the kernel does not take the calls of all of them."""
    if not exchange.slot:
        return None
    needed = []
    for calls in exchange.calls:
        if not 1 <= len(calls) <= MAX_RUNS or any(call.pattern or len(call.key_chunks) != 1 for call in calls):
            return None
        needed.append(union((start // TILE * TILE, stop) for call in calls for start, stop in call.key_chunks))
    ranks = range(len(needed))
    contributed = [
        intersection(exchange.owned[rank], union(chunk for other in ranks if other != rank for chunk in needed[other]))
        for rank in ranks
    ]
    made = [_arrangement(exchange, needed[rank], contributed, rank) for rank in ranks]
    return None if None in made else cast("tuple[Arrangement, ...]", tuple(made))


def _arrangement(
    exchange: Exchange, needed: Sequence[Chunk], contributed: Sequence[Sequence[Chunk]], rank: int
) -> Arrangement | None:
    owned = exchange.owned
    runs = sorted(
        (start, stop, other) for other in range(len(owned)) for start, stop in intersection(needed, owned[other])
    )
    sources: list[tuple[bool, int]] = []
    pulled, far = [], 0
    for start, stop, other in runs:
        if len(sources) * TILE != offset_in(needed, start):
            return None  # the run before does not consist of whole tiles
        first = offset_in(owned[rank], start) if other == rank else far
        sources += [(other != rank, first + tile) for tile in range(0, stop - start, TILE)]
        if other != rank:
            pulled.append((other, offset_in(contributed[other], start), far, stop - start))
            far += stop - start
    start, stop, other = runs[-1]
    if other == rank and (stop - start) % TILE and offset_in(owned[rank], stop - 1) + 1 != rows_of(owned[rank]):
        return None  # the last tile would hold keys that are none of the call's
    sent = sent_runs(owned[rank], contributed[rank], rank)
    calls = exchange.calls[rank]
    # the last row of a causal call is at its last key
    shifts = [offset_in(needed, call.key_chunks[0][1] - 1) + 1 - call.rows[1] for call in calls]
    return Arrangement(
        plan=RowPlan(sent, tuple(pulled), tuple(map(rows_of, contributed)), far),
        keys=rows_of(needed),
        second=calls[0].rows[1],
        shifts=(shifts[0], shifts[-1]),
        sources=tuple(sources),
    )


Run = Callable[[mx.array, mx.array, mx.array], list[mx.array]]
"""Makes a call of a rank's q, k and v: output, and logsumexp if that is wanted. Not differentiable."""


def context_run(q: mx.array, k: mx.array, v: mx.array, problem: Any, exchange: Exchange) -> Run | None:
    """Return what makes a context parallel call, or None if it takes another way; all ranks take the same.

    Args:
        q: this rank's rows (B, H, rows, D).
        k: this rank's keys (B, Hkv, keys, D).
        v: this rank's values (B, Hkv, keys, Dv).
        problem: `attend.Problem` of the call.
        exchange: what ranks need.
    """
    mask: Mask = problem.mask
    if not takes(problem.implementation):
        return None
    if mask.array is not None or mask.pattern is not None or mask.alibi is not None:
        return None
    is_real = isinstance(problem.group, Group)  # a benchmark may simulate one
    peers = collectives.peer_copies(problem.group)[0] if is_real else None
    arranged = arrange(exchange)
    if (is_real and peers is None) or arranged is None or not _fits(arranged, k, v):
        return None
    group, rank = problem.group, problem.group.rank()
    arrays = (tuple(q.shape), tuple(k.shape), tuple(v.shape), dtype_name(q.dtype))
    batch, kv_heads = int(k.shape[0]), int(k.shape[1])
    row_bytes = kv_heads * (k.shape[3] + v.shape[3]) * k.itemsize
    groups = head_groups(arranged, batch, kv_heads, row_bytes)
    bounds = mask.causal, mask.window, problem.softcap
    refusal, plan_for = _prepared(exchange, rank, groups, *arrays, problem.scale, *bounds)
    kind = (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3], arrays[3], *bounds)
    if (is_real and not _all_can(group, exchange, kind, refusal)) or plan_for is None:
        return None
    plan, own = plan_for(problem.return_lse), arranged[rank]
    sent = (group.size() - 1) * own.plan.contributed[rank] * batch * row_bytes
    received = own.plan.rows * batch * row_bytes
    planes = groups if len(groups) > 1 else (batch * kv_heads,)

    def run(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        if peers is None or not problem.communicate:
            collectives.count_call("one launch")
            made = _without_communication(plan, q, k, v, own.plan.rows)
        else:
            collectives.count_call("one launch", sent, received)
            made = peers.attend(plan, (q, k, v), planes, own.plan)
        if call_hooks:
            shapes = ((*x.shape[:2], own.keys, x.shape[3]) for x in (k, v))
            _report(problem, made[0], q, *(mx.broadcast_to(mx.zeros(1, q.dtype), shape) for shape in shapes))
        return made

    return run


def step_run(q: mx.array, k: mx.array, v: mx.array, problem: Any) -> Run | None:
    """Return what makes a decode step and its merge, or None; its rows see all of this rank's keys."""
    from attention.kernels.cuda.peers import decode_plan
    from attention.kernels.cuda.runtime.call import DIM_STEP, ELEMENTS, CallShape, normalize, refusal

    peers, _ = collectives.peer_copies(problem.group)
    if peers is None or not takes(problem.implementation) or not peers.takes_merge((*q.shape[:3], v.shape[3]), q.dtype):
        return None
    dtype = dtype_name(q.dtype)
    if refusal(dtype, q.shape[3], v.shape[3]) or q.shape[3] % DIM_STEP or not problem.scale > 0 or not k.shape[2]:
        return None
    batch, heads, rows, dim = q.shape
    shape = CallShape(batch, heads, k.shape[1], rows, k.shape[2], dim, ELEMENTS[dtype], v.shape[3])
    try:
        call = normalize(problem.scale, False, None, problem.softcap, k.shape[2])
        plan = decode_plan(shape, call, peers.inboxes, problem.return_lse)
    except (KernelUnavailable, ValueError):
        return None
    if plan is None:
        return None
    sent = (problem.group.size() - 1) * batch * heads * rows * (v.shape[3] * q.itemsize + 4)

    def run(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        collectives.count_call("split keys", sent, sent)
        made = peers.run_merge(plan, [q, k, v])
        if call_hooks:
            _report(problem, made[0], q, k, v)
        return made

    return run


def _report(problem: Any, made: mx.array, q: mx.array, k: mx.array, v: mx.array) -> None:
    """Pass a call that was made through the hooks, such as a monitor's; only the shapes of `k` and `v` are true."""
    done = _Made(problem.implementation, made)
    call_through_hooks(done, q, k, v, scale=problem.scale, mask=problem.mask, softcap=problem.softcap)


def takes(implementation: Any) -> bool:
    """Return whether the CUDA kernels compute what an implementation does."""
    return current_backend() == "cuda" and isinstance(implementation, Poc) and implementation.variant is None


class _Made:
    """An implementation whose call has been made, for hooks."""

    def __init__(self, implementation: Poc, made: mx.array) -> None:
        self.name, self.route, self._made = implementation.name, implementation.route, made

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._made


def is_traced(*arrays: mx.array) -> bool:
    """Return whether a gradient may be wanted, which this way does not have, or shapes may change."""
    finds = _finds_tracers()
    return finds is None or bool(finds(arrays))


@cache
def _finds_tracers() -> Callable[[Sequence[mx.array]], bool] | None:
    """Return the launcher's function, or None if it cannot be compiled."""
    from attention.kernels.cuda.runtime import launcher

    return None if launcher.unavailable_reason() is not None else launcher.module().is_traced


def _fits(arranged: Sequence[Arrangement], k: mx.array, v: mx.array) -> bool:
    """Return whether the largest contribution is large enough, and a plane of it fits a slot."""
    plane = max(arranged[0].plan.contributed) * (k.shape[3] + v.shape[3]) * k.itemsize
    return plane <= SLOT_BYTES and plane * k.shape[0] * k.shape[1] >= MIN_BYTES


def head_groups(arranged: Sequence[Arrangement], batch: int, heads: int, row_bytes: int) -> tuple[int, ...]:
    """Return the K/V heads of each launch: a few first, if the others arrive meanwhile for long enough.

    `row_bytes` are of a row of keys and values, of all heads.
    """
    if batch > 1 or heads < 4 or max(own.plan.rows for own in arranged) * row_bytes < MIN_OVERLAPPED_BYTES:
        return (heads,)
    return heads // 4, heads - heads // 4


@lru_cache(maxsize=64)
def _prepared(
    exchange: Exchange,
    rank: int,
    groups: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    dtype: str,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[str | None, Callable[[bool], Any] | None]:
    """Return why the kernel does not take this rank's call, or the function that returns its plan."""
    from attention.kernels.cuda import peers
    from attention.kernels.cuda.runtime.call import DIM_STEP, ELEMENTS, CallShape, normalize, refusal

    arranged = arrange(exchange)
    assert arranged is not None
    own = arranged[rank]
    problem = refusal(dtype, q[3], v[3])
    if problem or q[3] % DIM_STEP or not scale > 0:
        return problem or "only head dims that are multiples of 8, and positive scales", None
    shape = CallShape(q[0], q[1], k[1], q[2], own.keys, q[3], ELEMENTS[dtype], v[3])
    try:
        call = normalize(scale, causal, window, softcap, own.keys)
        placement = peers.Placement(
            own.second, own.shifts, tuple(row + (peers.FAR if far else 0) for far, row in own.sources)
        )
        problem = peers.refusal(shape, call) or peers.distrust(shape, call)
        if problem is None:
            peers.attend_plan(shape, call, placement, groups, False)
    except (KernelUnavailable, ValueError) as error:
        problem = error_line(error)
    return problem, None if problem else lambda lse: peers.attend_plan(shape, call, placement, groups, lse)


@lru_cache(maxsize=256)
def _all_can(group: Group, exchange: Exchange, kind: tuple[object, ...], problem: str | None) -> bool:
    """Return whether the kernel takes the calls of all ranks; they ask together, at the first of such calls."""
    mine = mx.array([problem is not None], mx.int32)
    worst = mx.distributed.all_max(mine, group=group, stream=collectives.communication_stream())
    return not worst.item()


def _without_communication(plan: Any, q: mx.array, k: mx.array, v: mx.array, rows: int) -> list[mx.array]:
    """Run a plan, for timing, on random keys and values in place of other ranks'."""
    made: list[mx.array] = plan([q, k, v, *_stand_ins(tuple(k.shape), tuple(v.shape), k.dtype, max(1, rows))])
    return made


@lru_cache(maxsize=4)
def _stand_ins(k: tuple[int, ...], v: tuple[int, ...], dtype: mx.Dtype, rows: int) -> list[mx.array]:
    made = [mx.random.normal((*x[:2], rows, x[3])).astype(dtype) for x in (k, v)]
    mx.eval(made)
    return made
