"""The backward pass of the blockwise attention: each tile is recomputed from the logsumexp of its rows.

With P the probabilities of a tile, FlashAttention 2's equations:

    dP = dO V^T    dS = P * (dP - rowsum(dO * O))
    dV += P^T dO    dQ += scale dS K    dK += scale dS^T Q
"""

import mlx.core as mx
from msgspec import Struct

from attention.implementations.blockwise import (
    Call,
    Heads,
    after,
    blocks_of,
    join,
    key_blocks,
    over_heads,
    tile_scores,
)


class Saved(Struct, frozen=True):
    """What the backward pass reads, all as (B, H or Hkv, length, width)."""

    q: mx.array
    k: mx.array
    v: mx.array
    output: mx.array
    logsumexp: mx.array
    cotangent: mx.array


class RowSide(Struct, frozen=True):
    """One block of rows: what every tile of it needs."""

    rows: range
    query: mx.array
    cotangent: mx.array
    logsumexp: mx.array
    delta: mx.array
    """rowsum(dO * O), float32."""


class KeySide(Struct, frozen=True):
    """One block of keys: what every tile of it needs."""

    keys: range
    key: mx.array
    key_t: mx.array
    value_t: mx.array


def gradients(saved: Saved, call: Call) -> list[mx.array]:
    """Returns dQ, dK and dV in the types of query, key and value.

    Where a tile holds all keys, one look at each tile gives all three. Where keys are cut, dQ and dK with dV are
    summed in two passes of their own: otherwise a float32 sum of the whole dQ would have to be kept.
    """
    chain: list[mx.array] = []

    def one(heads: Heads) -> list[mx.array]:
        if call.blocks.keys >= saved.k.shape[2]:
            return _key_block(saved, call, heads, range(saved.k.shape[2]), chain)
        parts = [_key_block(saved, call, heads, keys, chain) for keys in blocks_of(saved.k.shape[2], call.blocks.keys)]
        d_key, d_value = (join(list(column), 2) for column in zip(*parts, strict=True))
        return [_query_pass(saved, call, heads, chain), d_key, d_value]

    return over_heads(saved.q, saved.k, call.blocks, one)


def _key_block(saved: Saved, call: Call, heads: Heads, keys: range, chain: list[mx.array]) -> list[mx.array]:
    """One block of keys against all rows: dK and dV of these keys; before them dQ, if these are all keys."""
    whole = len(keys) == saved.k.shape[2]
    sums: list[mx.array] = []
    d_query = []
    for rows in blocks_of(saved.q.shape[2], call.blocks.rows):
        seen = _overlap(call.mask.visible_keys(rows, saved.q.shape[2], saved.k.shape[2]), keys)
        if not seen:
            d_query += [heads.split(mx.zeros_like(heads.rows(saved.q, rows)), len(rows))] if whole else []
            continue
        row_side, key_side = _sides(saved, call, heads, rows, seen, chain)
        weights, d_scores = _tile(saved, call, heads, row_side, key_side)
        shares = (d_scores.swapaxes(-1, -2) @ row_side.query, weights.swapaxes(-1, -2) @ row_side.cotangent)
        sums = _added(sums, [_placed(share.astype(mx.float32), seen, keys) for share in shares])
        d_query += [_d_query(d_scores @ key_side.key, saved, call, heads, rows)] if whole else []
        chain[:] = [*sums, *d_query[-1:]]
    made = [join(d_query, 2)] if whole else []
    if not sums:
        return [*made, *(mx.zeros_like(heads.keys(x, keys)) for x in (saved.k, saved.v))]
    return [*made, (sums[0] * call.scale).astype(saved.k.dtype), sums[1].astype(saved.v.dtype)]


def _query_pass(saved: Saved, call: Call, heads: Heads, chain: list[mx.array]) -> mx.array:
    """dQ alone, block of rows by block of rows."""
    parts = []
    for rows in blocks_of(saved.q.shape[2], call.blocks.rows):
        total: list[mx.array] = [mx.zeros(heads.rows(saved.q, rows).shape)]
        for keys in key_blocks(call, rows, saved.q.shape[2], saved.k.shape[2]):
            row_side, key_side = _sides(saved, call, heads, rows, keys, chain)
            _, d_scores = _tile(saved, call, heads, row_side, key_side)
            total = _added(total, [(d_scores @ key_side.key).astype(mx.float32)])
            chain[:] = total
        parts.append(_d_query(total[0], saved, call, heads, rows))
    return join(parts, 2)


def _sides(
    saved: Saved, call: Call, heads: Heads, rows: range, keys: range, chain: list[mx.array]
) -> tuple[RowSide, KeySide]:
    """Cuts what one tile needs, after all that is in the chain."""
    row_arrays = (saved.q, saved.cotangent, saved.output, saved.logsumexp)
    cuts = [*(heads.rows(x, rows) for x in row_arrays), *(heads.keys(x, keys) for x in (saved.k, saved.v))]
    query, cotangent, output, logsumexp, key, value = after(chain, *cuts)
    delta = (cotangent.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
    return (
        RowSide(rows, call.operand(query), call.operand(cotangent), logsumexp, delta),
        KeySide(keys, call.operand(key), call.transposed(key), call.transposed(value)),
    )


def _tile(saved: Saved, call: Call, heads: Heads, row: RowSide, side: KeySide) -> tuple[mx.array, mx.array]:
    """P and dS of one tile, in the type that matrices are multiplied in."""
    lengths = (saved.q.shape[2], saved.k.shape[2])
    scores, capped = tile_scores(row.query, side.key_t, call, heads, row.rows, side.keys, lengths)
    weights = call.power(scores.astype(mx.float32) - row.logsumexp)
    d_scores = weights * ((row.cotangent @ side.value_t).astype(mx.float32) - row.delta)
    if capped is not None:
        d_scores = d_scores * (1.0 - mx.square(capped.astype(mx.float32)))
    return weights.astype(row.query.dtype), d_scores.astype(row.query.dtype)


def _d_query(product: mx.array, saved: Saved, call: Call, heads: Heads, rows: range) -> mx.array:
    return heads.split((product * call.scale).astype(saved.q.dtype), len(rows))


def _placed(share: mx.array, seen: range, keys: range) -> mx.array:
    """A share of dK or dV, which covers the keys that were seen, filled with zeros to all keys of the block."""
    before, behind = seen.start - keys.start, keys.stop - seen.stop
    return mx.pad(share, [(0, 0), (0, 0), (before, behind), (0, 0)]) if before or behind else share


def _added(sums: list[mx.array], shares: list[mx.array]) -> list[mx.array]:
    return [a + b for a, b in zip(sums, shares, strict=True)] if sums else shares


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
