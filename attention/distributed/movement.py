"""Moving the keys and values that ranks need, by collectives or by peer copies, with their gradients."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import mlx.core as mx

from attention.distributed import collectives
from attention.distributed.collectives import Group
from attention.distributed.exchange import Exchange, offset_in
from attention.distributed.layout import Chunk, rows_of, union
from attention.distributed.peers import MIN_BYTES, SLOT_BYTES, PeerCopies, RowPlan, Run


def needed(
    parts: Sequence[mx.array], exchange: Exchange, group: Group, communicate: bool
) -> tuple[list[mx.array], mx.array | None]:
    """Return what this rank needs of each part, in the order of the sequence, and a token of the collectives.

    Args:
        parts: this rank's rows of keys and values, (B, heads, rows, D) each; they are moved in this order.
        exchange: what ranks need.
        group: the ranks.
        communicate: False for timing: other ranks' rows are this rank's.
    """
    rank = group.rank()
    if not exchange.slot:
        return [_assembled(part, None, exchange, rank) for part in parts], None
    if communicate:
        peers, _ = collectives.peer_copies(group)
        if peers is not None and all(_fits_a_slot(part, exchange, rank) for part in parts):
            size = sum(part.nbytes // part.shape[2] for part in parts if part.shape[2])
            others = group.size() - 1
            collectives.count_bytes(others * rows_of(exchange.contributed[rank]) * size, exchange.received(rank) * size)
            *made, token = collectives.moved(parts, partial(_peer_moves, exchange, group, peers))
            return made, token
    own = [_contribution(part, exchange, rank) for part in parts]
    if not communicate:
        alone = [mx.broadcast_to(each[None], (group.size(), *each.shape)) for each in own]
        return [_assembled(part, others, exchange, rank) for part, others in zip(parts, alone, strict=True)], None
    whole = collectives.gathered(own, group)
    made = [_assembled(part, others, exchange, rank) for part, others in zip(parts, whole.arrays, strict=True)]
    return made, whole.token


def _fits_a_slot(part: mx.array, exchange: Exchange, rank: int) -> bool:
    """Return whether enough is moved, and a plane fits a slot, of the gradient too; the same on all ranks."""
    width = part.shape[3] * part.itemsize
    moved = part.shape[0] * part.shape[1] * exchange.slot * width
    largest = max(exchange.slot, *_returned(exchange, rank).plan.contributed)
    return largest * width <= SLOT_BYTES and moved >= MIN_BYTES


@lru_cache(maxsize=64)
def _plan(exchange: Exchange, rank: int) -> RowPlan:
    """Return the rows that a rank sends and needs."""
    runs, place = [], 0
    for source in exchange.sources(rank):
        runs.append((source.rank, source.start, place, source.stop - source.start))
        place += source.stop - source.start
    sent = sent_runs(exchange.owned[rank], exchange.contributed[rank], rank)
    return RowPlan(sent, tuple(runs), tuple(map(rows_of, exchange.contributed)), place)


def sent_runs(owned: Sequence[Chunk], contributed: Sequence[Chunk], rank: int) -> tuple[Run, ...]:
    """Return a rank's runs of rows that it contributes, one after another."""
    sent, place = [], 0
    for start, stop in places_of(owned, contributed):
        sent.append((rank, start, place, stop - start))
        place += stop - start
    return tuple(sent)


@lru_cache(maxsize=64)
def _peer_moves(
    exchange: Exchange, group: Group, peers: PeerCopies, in_sequence: bool
) -> Callable[[list[mx.array]], list[mx.array]]:
    """Return a function from parts to what is needed of each, and a token, differentiable."""
    rank, plan = group.rank(), _plan(exchange, group.rank())

    @mx.custom_function
    def move(parts: list[mx.array]) -> list[mx.array]:
        made: list[mx.array] = []
        for part in parts:
            made.append(peers.gather(collectives.after(part, made), plan))
        return [*made, cast("mx.array", mx.depends(mx.zeros(1), made))]

    def pull_back(primals: Any, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[mx.array]:
        (parts,) = primals if len(primals) == 1 and isinstance(primals[0], list) else (list(primals),)
        returned = _returned(exchange, rank)
        made: list[mx.array] = []
        for part, cotangent in zip(parts, cotangents[:-1], strict=True):
            others = peers.gather(collectives.after(cotangent, made or outputs), returned.plan)
            made.append(_sum_of(part, cotangent, others, returned))
            row = part.shape[0] * part.shape[1] * part.shape[3] * part.itemsize
            collectives.count_bytes(returned.plan.contributed[rank] * row, returned.received * row)
        return collectives.submitted(collectives.all_or_none(made), in_sequence)

    move.vjp(pull_back)
    return cast("Callable[[list[mx.array]], list[mx.array]]", move)


class Returned(NamedTuple):
    """How the gradients of gathered rows come back to the ranks that the rows are of."""

    plan: RowPlan
    """Each rank contributes the gradients of all other ranks' rows."""
    own: tuple[Run, ...]
    """Rows of this rank's gradients of its own rows: rank, first, place among its rows, count."""
    others: tuple[tuple[Run, ...], ...]
    """The same of each other rank's gradients, rows of what `plan` moves."""
    received: int
    """Rows that `plan` moves to this rank."""


@lru_cache(maxsize=64)
def _returned(exchange: Exchange, rank: int) -> Returned:
    ranks = range(len(exchange.owned))
    sent: list[Run] = []
    own: list[Run] = []
    of_others: list[tuple[Run, ...]] = []
    pulled: list[Run] = []
    contributed, received = [], 0
    for other in ranks:
        place = sending = 0
        adding: list[Run] = []
        for source in exchange.sources(other):
            count = source.stop - source.start
            held = exchange.contributed[rank]
            if other == rank and source.rank == rank:
                own.append((rank, place, source.start, count))
            elif other == rank:
                sent.append((rank, place, sending, count))
            elif source.rank == rank:
                pulled.append((other, sending, received, count))
                for first, start, length in _own_rows(exchange.owned[rank], held, source.start, count):
                    adding.append((other, received + first, start, length))
                received += count
            if source.rank != other:
                sending += count
            place += count
        contributed.append(sending)
        if other != rank:
            of_others.append(tuple(adding))
    plan = RowPlan(tuple(sent), tuple(pulled), tuple(contributed), max(1, received))  # never an empty array
    return Returned(plan, tuple(own), tuple(of_others), received)


def _own_rows(
    owned: Sequence[Chunk], contributed: Sequence[Chunk], first: int, count: int
) -> Iterable[tuple[int, int, int]]:
    """Yield where rows [first, first + count) of a contribution are among a rank's own: number, own row, length."""
    before = 0
    for start, stop in places_of(owned, contributed):
        low, high = max(first, before), min(first + count, before + stop - start)
        if low < high:
            yield low - first, start + low - before, high - low
        before += stop - start


def _sum_of(part: mx.array, own: mx.array, others: mx.array, returned: Returned) -> mx.array:
    """Return the gradient of a rank's rows: its own and the other ranks', in half precision of two ranks only."""
    wide = part.dtype if len(returned.others) == 1 else mx.float32
    total = _spread(own, returned.own, part).astype(wide)
    for runs in returned.others:
        if runs:
            total = total + _spread(others, runs, part).astype(wide)
    # a rank whose rows no other needs takes part too
    return cast("mx.array", mx.depends(total.astype(part.dtype), others))


def _spread(rows: mx.array, runs: Sequence[Run], part: mx.array) -> mx.array:
    """Return runs of rows at their places among a rank's, with zeros elsewhere; the shape is that of `part`."""
    pieces, end = [], 0
    for _, first, place, count in sorted(runs, key=lambda run: run[2]):
        if place > end:
            pieces.append(mx.zeros((*part.shape[:2], place - end, part.shape[3]), part.dtype))
        pieces.append(rows[:, :, first : first + count])
        end = place + count
    if end < part.shape[2] or not pieces:
        pieces.append(mx.zeros((*part.shape[:2], part.shape[2] - end, part.shape[3]), part.dtype))
    return joined(pieces, 2)


def _contribution(own: mx.array, exchange: Exchange, rank: int) -> mx.array:
    """Return what other ranks need of this rank's keys or values (B, heads, keys, D), padded to the slot."""
    chunks = exchange.contributed[rank]
    parts = [own[:, :, start:stop] for start, stop in places_of(exchange.owned[rank], chunks)]
    missing = exchange.slot - rows_of(chunks)
    if missing:
        parts = parts or [own[:, :, :0]]  # with a gradient, as on other ranks, though it is empty
        parts.append(mx.zeros((*own.shape[:2], missing, own.shape[3]), own.dtype))
    return joined(parts, 2)


def places_of(held: Sequence[Chunk], wanted: Sequence[Chunk]) -> list[Chunk]:
    """Return the ranges of places of wanted positions among held ones, adjacent ones as one."""
    firsts = [(offset_in(held, start), stop - start) for start, stop in wanted]
    return list(union((first, first + length) for first, length in firsts))


def _assembled(own: mx.array, others: mx.array | None, exchange: Exchange, rank: int) -> mx.array:
    """Return the keys or values that this rank needs, in the order of the sequence: (B, heads, needed, D)."""
    parts = []
    for source in exchange.sources(rank):
        whole = own if source.rank == rank else _of(others, source.rank)
        parts.append(whole[:, :, source.start : source.stop])
    return joined(parts, 2) if parts else own[:, :, :0]


def _of(others: mx.array | None, rank: int) -> mx.array:
    assert others is not None
    return others[rank]


def joined(parts: Sequence[Any], axis: int) -> mx.array:
    """Return arrays one after another along an axis."""
    made: mx.array = parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)
    return made
