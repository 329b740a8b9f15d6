"""Attention of a sequence that is sharded over the ranks of a group.

Context parallel: a rank's rows against the keys that they see. Keys and values of other ranks are gathered in pieces of
some K/V heads: while a piece is computed, the next one arrives.

    communication stream    gather 0   gather 1      gather 2
    computation                        attend 0      attend 1      attend 2

Split keys, for few rows that every rank has (decoding): each rank computes them against its own keys, and the partial
results are merged by their logsumexps.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
from msgspec import Struct, structs

from attention import masks
from attention.core.bounded_dict import BoundedDict
from attention.core.errors import UnsupportedError, UsageError
from attention.distributed import collectives, one_launch
from attention.distributed.exchange import (
    Call,
    Exchange,
    Seen,
    intersection,
    make_exchange,
)
from attention.distributed.layout import Chunk, Kind, Layout, make_layout
from attention.distributed.merging import merged
from attention.distributed.movement import joined, needed, places_of
from attention.implementations.calls import call_through_hooks, current_backend, with_logsumexp
from attention.implementations.protocol import Implementation
from attention.masks import Mask, Pattern, causal, of_pattern, window
from attention.masks.parts import Section
from attention.quantized_kv import QuantizedArray
from attention.streaming import StreamingKV

MIN_PIECE_BYTES = 4 << 20
"""Bytes of keys and values received below which a piece is not worth launches of its own."""


class Problem(Struct, frozen=True):
    """What a call computes, apart from its arrays."""

    implementation: Any
    scale: float
    mask: Mask
    softcap: float | None
    rows: Layout
    keys: Layout
    group: Any
    return_lse: bool = False
    communicate: bool = True
    """False for timing: other ranks' keys are zeros, and nothing is sent."""

    def seen(self, planes: tuple[int, int]) -> Seen:
        """Return what decides which pairs are visible."""
        mask = self.mask
        return Seen(planes, mask.positional, mask.window, mask.pattern, mask.array is not None, mask.alibi is not None)


def attend(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> tuple[mx.array, mx.array | None]:
    """Compute the output of this rank's rows, and their logsumexp if requested.

    Args:
        q: this rank's rows (B, H, rows, D).
        k: this rank's keys (B, Hkv, keys, D).
        v: this rank's values (B, Hkv, keys, Dv).
        problem: the rest of the call.
    """
    if current_backend() == "cuda" and not one_launch.is_traced(q, k, v):
        run = _run_of(q, k, v, problem)
        if run is not None:
            made = run(q, k, v)
            return made[0], made[1] if problem.return_lse else None
    alone = problem.group.size() == 1 or problem.keys.kind == "replicated"
    if alone or problem.rows.kind == "heads":
        collectives.count_call("alone" if alone else "heads")
        return _attend_alone(q, k, v, problem)
    if problem.rows.is_sharded:
        return _attend_context(q, k, v, problem)
    return _attend_split_keys(q, k, v, problem)


class _Known(NamedTuple):
    """A call that was made before in one launch; it holds the problem, whose implementation and group its key names."""

    problem: Problem
    run: one_launch.Run


_known: BoundedDict[tuple[object, ...], _Known] = BoundedDict(64)


def _run_of(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> one_launch.Run | None:
    """Return `_find_run`'s function, from the last call of an equal problem with such arrays if there was one."""
    mask = problem.mask
    if mask.array is not None or mask.alibi is not None:
        return None
    key = (
        id(problem.implementation),
        id(problem.group),
        (mask.causal, mask.window, mask.pattern),
        (problem.scale, problem.softcap, problem.rows, problem.keys, problem.return_lse, problem.communicate),
        (q.shape, k.shape, v.shape, q.dtype),
    )
    known = _known.get(key)
    if known is None:
        run = _find_run(q, k, v, problem)
        if run is None:
            return None
        known = _known[key] = _Known(problem, run)
    return known.run


def _find_run(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> one_launch.Run | None:
    """Return the function that makes a call in one launch, or None if it takes another way."""
    seen = problem.seen((q.shape[0], q.shape[1]))
    if problem.rows.is_sharded and problem.group.size() > 1:
        return one_launch.context_run(q, k, v, problem, make_exchange(problem.rows, problem.keys, seen))
    if problem.rows.kind != "replicated" or not problem.keys.is_sharded or not problem.communicate:
        return None
    _, places, pattern = _own_share(problem.rows, problem.keys, seen, problem.group.rank())
    plain = pattern is None and problem.mask.array is None and places == ((0, int(k.shape[2])),)
    return one_launch.step_run(q, k, v, problem) if plain else None


def _attend_alone(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> tuple[mx.array, mx.array | None]:
    mask = problem.mask
    if problem.rows.kind == "heads":
        mask = _own_heads(mask, q, problem)
    return _call(q, k, v, mask, problem, problem.return_lse)


def _own_heads(mask: Mask, q: mx.array, problem: Problem) -> Mask:
    """Return the mask of this rank's heads, in the layout "heads".

    Raises:
        UnsupportedError: it is a pattern that differs by head.
    """
    count, rank = int(q.shape[1]), problem.group.rank()
    own = slice(rank * count, (rank + 1) * count)
    if mask.pattern is not None and mask.pattern.planes(int(q.shape[0]), count * problem.group.size())[1] > 1:
        raise UnsupportedError("layout: heads, and a mask that differs by head; it takes a layout of chunks")
    array = mask.array
    if array is not None and array.ndim > 2 and array.shape[-3] > 1:
        array = array[..., own, :, :]
    return structs.replace(mask, array=array, alibi=None if mask.alibi is None else mask.alibi[own])


def _call(
    q: mx.array, k: mx.array, v: mx.array, mask: Mask, problem: Problem, return_lse: bool
) -> tuple[mx.array, mx.array | None]:
    chosen: Implementation = problem.implementation
    called = with_logsumexp(chosen) if return_lse else chosen
    made = call_through_hooks(called, q, k, v, scale=problem.scale, mask=mask, softcap=problem.softcap)
    return (made[0], made[1]) if return_lse else (made, None)


# ---- context parallel ------------------------------------------------------------------------------------------------


def _attend_context(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> tuple[mx.array, mx.array | None]:
    rank = problem.group.rank()
    exchange = make_exchange(problem.rows, problem.keys, problem.seen((q.shape[0], q.shape[1])))
    collectives.count_call("context")
    pieces = head_pieces(k, v, exchange, problem.mask)
    parts = [x[:, first:last] for first, last in pieces for x in (k, v)]
    moved, token = needed(parts, exchange, problem.group, problem.communicate)
    per_key_head = q.shape[1] // k.shape[1]
    outs: list[mx.array] = []
    sums: list[mx.array | None] = []
    for (first, last), keys, values in zip(pieces, moved[::2], moved[1::2], strict=True):
        rows = q[:, first * per_key_head : last * per_key_head]
        made = [
            _attend_call(rows, keys, values, call, problem, (first * per_key_head, last * per_key_head))
            for call in exchange.calls[rank]
        ]
        if not made:  # a rank without rows
            _refuse_as_others(rows, keys, values, problem)
            nothing = mx.zeros((*rows.shape[:3], v.shape[3]), q.dtype)
            made = [(collectives.tied(nothing, rows), mx.zeros(rows.shape[:3]))]
        outs.append(joined([out for out, _ in made], 2))
        sums.append(joined([lse for _, lse in made if lse is not None], 2) if problem.return_lse else None)
    out = joined(outs, 1)
    lse = joined([each for each in sums if each is not None], 1) if problem.return_lse else None
    if token is None:
        return out, lse
    return collectives.tied(out, token), None if lse is None else collectives.tied(lse, token)


def head_pieces(k: mx.array, v: mx.array, exchange: Exchange, mask: Mask) -> list[Chunk]:
    """Return the ranges of K/V heads that are gathered one after another.

    The first piece is the smallest, because nothing is computed while it arrives.
    """
    heads = int(k.shape[1])
    received = exchange.slot * (len(exchange.owned) - 1) * k.shape[0] * (k.shape[3] + v.shape[3]) * k.itemsize
    differs = mask.pattern is not None and mask.pattern.planes(int(k.shape[0]), heads)[1] > 1
    if current_backend() != "cuda" or heads == 1 or differs or received < 2 * MIN_PIECE_BYTES:
        return [(0, heads)]
    first = max(1, heads // 8)
    return [(0, first), (first, heads)]


def _refuse_as_others(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> None:
    """Queue nothing on a rank without rows or keys, but raise what the implementation raises on the others.

    They would raise it before their part of a collective, for which this rank would wait.

    Raises:
        UnsupportedError: the implementation does not take calls of this kind.
    """
    one_of_each = (with_a_row(x[:, :, :0]) for x in (q, k, v))
    mask = problem.mask
    array = None if mask.array is None else mx.zeros((1, 1), mask.array.dtype)
    few = Mask(causal=mask.causal, window=mask.window, array=array)
    implementation = problem.implementation
    called = with_logsumexp(implementation) if problem.return_lse or not problem.rows.is_sharded else implementation
    called(*one_of_each, scale=problem.scale, mask=few, softcap=problem.softcap)


def _attend_call(
    q: mx.array, k: mx.array, v: mx.array, call: Call, problem: Problem, heads: Chunk
) -> tuple[mx.array, mx.array | None]:
    """Compute one call of a piece of heads; rows that see no key have output 0 and logsumexp -inf."""
    rows = q[:, :, slice(*call.rows)]
    if not call.key_chunks:
        shape = (*rows.shape[:3], v.shape[3])
        return mx.zeros(shape, q.dtype), mx.full(shape[:3], -mx.inf) if problem.return_lse else None
    keys = slice(*call.keys)
    mask = _mask_of(call, problem, heads, int(q.shape[1]))
    out, lse = _call(rows, k[:, :, keys], v[:, :, keys], mask, problem, problem.return_lse)
    if lse is not None and mask.alibi is not None:
        # the call has its last row at its last key; a row's biases differ by a constant, which the output does not show
        later = call.key_chunks[-1][1] - (call.row_chunks[-1][1] + problem.keys.seq - problem.rows.seq)
        lse = lse + later * mask.alibi[:, None] if later else lse
    return out, lse


def _mask_of(call: Call, problem: Problem, heads: Chunk, count: int) -> Mask:
    """Return the mask of a call of some heads."""
    whole = problem.mask
    if call.pattern is not None:
        return Mask(pattern=call.pattern, alibi=whole.alibi)
    array = None
    if whole.array is not None:
        array = _cut(whole.array, 2, call.row_chunks)
        array = _cut(array, 3, call.key_chunks)
        if array.ndim == 4 and array.shape[1] > 1:
            array = array[:, slice(*heads)]
    alibi = None if whole.alibi is None else whole.alibi[slice(*heads)]
    return Mask(causal=call.causal and call.window is None, window=call.window, array=array, alibi=alibi)


def _cut(array: mx.array, axis: int, chunks: Sequence[Chunk]) -> mx.array:
    """Return the chunks of an axis of a mask, counted from four axes; a broadcast axis stays."""
    place = axis - 4 + array.ndim
    if place < 0 or array.shape[place] == 1:
        return array
    before = (slice(None),) * place
    return joined([array[(*before, slice(start, stop))] for start, stop in chunks], place)


# ---- split keys ------------------------------------------------------------------------------------------------------


def _attend_split_keys(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> tuple[mx.array, mx.array | None]:
    """Attend, with the rows' `masks.shift` added to the logsumexps after these have been merged, not before."""
    array = problem.mask.array
    if array is None or q.dtype == mx.float32 or array.dtype == mx.bool_ or not masks.has_shift(array):
        return _attend_and_merge(q, k, v, problem)
    whole = problem.mask.dense((q.shape[0], q.shape[1], q.shape[2], problem.keys.seq))
    assert whole is not None
    shift = masks.shift(masks.as_4d(whole).max(axis=-1, keepdims=True))
    lessened = structs.replace(problem.mask, array=masks.as_4d(array) - shift)
    out, lse = _attend_and_merge(q, k, v, structs.replace(problem, mask=lessened))
    return out, None if lse is None else lse + shift[..., 0].astype(mx.float32)


def _attend_and_merge(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> tuple[mx.array, mx.array | None]:
    out, lse = _attend_own_keys(q, k, v, problem)
    if not problem.communicate:
        return out, lse
    peers, _ = collectives.peer_copies(problem.group)
    given = [q, k, v] if problem.mask.array is None else [q, k, v, problem.mask.array]
    if peers is not None and peers.takes_merge(out.shape, out.dtype) and not one_launch.is_traced(*given):
        sent = (problem.group.size() - 1) * (out.nbytes + lse.nbytes)
        collectives.count_bytes(sent, sent)
        results = peers.merge(out, lse, problem.return_lse)
        return results[0], results[1] if problem.return_lse else None
    whole = collectives.gathered([out, lse], problem.group)
    merged_out, merged_lse = merged(*whole.arrays)
    return collectives.tied(merged_out, whole.token), merged_lse


def _attend_own_keys(q: mx.array, k: mx.array, v: mx.array, problem: Problem) -> tuple[mx.array, mx.array]:
    """Count a call, and compute all rows against this rank's keys; the logsumexp of rows that see none is -inf."""
    found, places, pattern = _own_share(
        problem.rows, problem.keys, problem.seen((q.shape[0], q.shape[1])), problem.group.rank()
    )
    collectives.count_call("split keys")
    if not found:
        _refuse_as_others(q, k, v, problem)
        shape = (*q.shape[:3], v.shape[3])
        # with gradients, as on other ranks, though they are zero
        array = problem.mask.array
        given = [q, k, v] if array is None or array.dtype == mx.bool_ else [q, k, v, array]
        token = mx.concatenate([x.reshape(-1)[:1].astype(mx.float32) for x in given])
        return collectives.tied(mx.zeros(shape, q.dtype), token), collectives.tied(mx.full(shape[:3], -mx.inf), token)
    mask = Mask() if pattern is None else of_pattern(pattern)
    keys, values = (joined([x[:, :, start:stop] for start, stop in places], 2) for x in (k, v))
    if problem.mask.array is not None:  # bounds of rows that differ in them become a part of it
        shape = (q.shape[0], q.shape[1], q.shape[2], keys.shape[2])
        bounds = None if pattern is None else pattern.dense(shape)
        mask = Mask(array=masks.combine(bounds, _cut(problem.mask.array, 3, found)))
    out, lse = _call(q, keys, values, mask, problem, True)
    assert lse is not None
    return out, lse


@lru_cache(maxsize=64)
def _own_share(
    rows: Layout, keys: Layout, seen: Seen, rank: int
) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...], Pattern | None]:
    """Return the keys of a rank that rows see, their places among its own, and a pattern if rows differ in them."""
    owned, lengths = keys.chunks[rank], (rows.seq, keys.seq)
    wanted, edge = (intersection(owned, chunks(seen, lengths)) for chunks in (_visible_to_all, _visible_to_some))
    if edge == wanted or not edge:
        return wanted, tuple(places_of(owned, wanted)), None
    bounds = causal() if seen.window is None else window(seen.window)
    whole = bounds if seen.pattern is None else seen.pattern
    return edge, tuple(places_of(owned, edge)), Section(whole, lengths, ((0, lengths[0]),), edge)


def _visible_to_all(seen: Seen, lengths: tuple[int, int]) -> tuple[Chunk, ...]:
    """Return the keys that every row sees by bounds."""
    seq, kv_seq = lengths
    if seen.pattern is not None:
        return ()
    if not seen.causal:
        return ((0, kv_seq),)
    low = 0 if seen.window is None else max(0, kv_seq - seen.window)
    high = kv_seq - seq + 1
    return ((low, high),) if low < high else ()


def _visible_to_some(seen: Seen, lengths: tuple[int, int]) -> tuple[Chunk, ...]:
    """Return the keys that some row sees by bounds."""
    seq, kv_seq = lengths
    low = 0 if seen.window is None or seen.pattern is not None else max(0, kv_seq - seq - seen.window + 1)
    return ((low, kv_seq),)


def check_supported(problem: Problem) -> None:
    """Raise UnsupportedError for masks that ranks cannot compute from their parts."""
    mask = problem.mask
    if mask.alibi is None or problem.group.size() == 1 or problem.rows.kind == "heads":
        return
    if not problem.rows.is_sharded:
        raise UnsupportedError("distributed: score_mod with split keys; it takes rows in a layout of chunks")
    if not mask.positional and mask.pattern is None:
        raise UnsupportedError("distributed: score_mod without a causal mask; it takes mask='causal' or a window")


def check_dense(k: object, v: object) -> None:
    """Raise UnsupportedError for keys or values that ranks do not take, such as quantized ones."""
    for name, given in (("k", k), ("v", v)):
        if isinstance(given, QuantizedArray | StreamingKV):
            raise UnsupportedError(f"distributed: {name} is a {type(given).__name__}; with a group it takes an array")


def layout_of_equal_rows(q: mx.array, kind: Kind, ranks: int) -> Layout:
    """Return the layout of a name, if every rank has as many rows as this one.

    Raises:
        UsageError: the layout cannot have as many on each.
    """
    rows = int(q.shape[2])
    whole = rows if kind in ("heads", "replicated") else rows * ranks
    made = make_layout(whole, ranks, kind)
    if any(made.rows(rank) != rows for rank in range(ranks)):
        raise UsageError(
            f"layout: {kind} of {whole} rows does not give each of {ranks} ranks {rows}; it takes a Layout"
        )
    return made


def with_a_row(x: Any) -> Any:
    """Return an array of rows, or of a rank without rows another of its kind with one."""
    if not isinstance(x, mx.array) or x.ndim != 4 or x.shape[2]:
        return x
    return mx.zeros((*x.shape[:2], 1, x.shape[3]), x.dtype)


def check_local(name: str, array: mx.array, rows: int, what: str) -> None:
    """Raise UsageError unless an array has a rank's number of rows."""
    if array.shape[2] != rows:
        raise UsageError(f"{name}: got {array.shape[2]} {what} on this rank; its layout has {rows}")
