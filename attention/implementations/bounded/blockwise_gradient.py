"""The backward pass of the blockwise attention: each tile is recomputed from the statistics of its rows.

With P the probabilities of a tile, FlashAttention 2's equations:

    dP = dO V^T    dS = P * (dP - rowsum(dO * O) + dL)
    dV += P^T dO    dQ += scale dS K    dK += scale dS^T Q

where dL is the gradient of a row's logsumexp, needed for derivatives of this backward pass. The gradient of a sink is
that of a score whose value vector is 0: dsink = -sum(P_sink * (rowsum(dO * O) - dL)).

rowsum(dO * O) is rowsum(P * dP) but for rounding. Where a row attends to almost only one key, dP minus it cancels as in
plain attention only if it is the sum of those very dP: in float32 it is, see `_with_weighted_sums`.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Final, cast

import mlx.core as mx
from msgspec import Struct, structs

from attention.implementations.bounded.blockwise import (
    BlockwiseParams,
    HeadGroup,
    as_slice,
    blocks_of,
    forward,
    head_groups,
    number,
    row_shift,
    row_statistics,
    scaled,
    tile_scores,
)
from attention.implementations.bounded.memory import Chain, TileWriter
from attention.implementations.transforms import vmap_rule


class SavedForBackward(Struct, frozen=True):
    """Inputs of the backward pass, all (B, H or Hkv, length, width)."""

    q: mx.array
    k: mx.array
    v: mx.array
    output: mx.array
    statistics: mx.array
    """Row statistics as returned by the forward pass."""
    cotangent: mx.array
    statistics_cotangent: mx.array | None = None
    """The gradient of the statistics, or None for zeros."""
    weighted_sums: mx.array | None = None
    """rowsum(P * dP), (B, H, Lq, 1) in float32; None to use rowsum(dO * O)."""

    @property
    def lengths(self) -> tuple[int, int]:
        """Query rows and keys."""
        return self.q.shape[2], self.k.shape[2]


class GradientSums(Struct):
    """Accumulators of the gradients."""

    d_query: TileWriter
    d_key: TileWriter
    d_value: TileWriter


class RowBlock(Struct, frozen=True):
    """Operands of one block of rows, shared by its tiles."""

    rows: range
    query: mx.array
    cotangent: mx.array
    statistics: mx.array
    delta: mx.array
    """rowsum(dO * O) - dL, float32."""
    of_logsumexp: mx.array | None
    """dL, or None for zeros."""
    shift: mx.array | None
    """Result of `row_shift`."""


class KeyBlock(Struct, frozen=True):
    """Operands of one block of keys, shared by its tiles."""

    keys: range
    key: mx.array
    key_t: mx.array
    value_t: mx.array


def gradients(saved: SavedForBackward, call: BlockwiseParams) -> list[mx.array]:
    """Return dQ, dK and dV in the dtypes of query, key and value.

    Each tile is computed once for all three if the float32 sums of dQ fit, or if a tile contains all keys and dQ needs
    no sum. Otherwise there are two passes over the tiles: one for dK and dV, one for dQ.
    """
    chain = Chain()
    if saved.q.dtype == mx.float32 and call.blocks.keys < saved.k.shape[2]:
        saved = _with_weighted_sums(saved, call, chain)
    sums = GradientSums(*(TileWriter(mx.zeros_like(x), chain) for x in (saved.q, saved.k, saved.v)))
    at_once = call.blocks.sums_queries or call.blocks.keys >= saved.k.shape[2]
    for heads in head_groups(saved.q, saved.k, call.blocks):
        shares: dict[int, mx.array] | None = {} if at_once else None
        for keys in blocks_of(saved.k.shape[2], call.blocks.keys):
            _key_block(saved, call, heads, keys, sums, shares, chain)
        if not at_once:
            _query_pass(saved, call, heads, sums, chain)
    return chain.results(sums.d_query.array, sums.d_key.array, sums.d_value.array)


def _with_weighted_sums(saved: SavedForBackward, call: BlockwiseParams, chain: Chain) -> SavedForBackward:
    """Return the inputs with rowsum(P * dP) of the rows whose keys are in several blocks: `_tile` sums those of one."""
    sums = TileWriter(mx.zeros((*saved.q.shape[:3], 1)), chain)
    for heads in head_groups(saved.q, saved.k, call.blocks):
        for rows in blocks_of(saved.q.shape[2], call.blocks.rows):
            seen = call.visible_keys(heads, rows, saved.lengths)
            if not seen or seen.start // call.blocks.keys == (seen.stop - 1) // call.blocks.keys:
                continue
            total: list[mx.array] = []
            for keys in (tiles := call.key_blocks(heads, rows, saved.lengths)):
                row_side = _make_row_block(saved, call, heads, rows, chain)
                key_side = _make_key_block(saved, call, heads, keys, chain)
                weights, d_weights, _ = _weights_of_tile(call, heads, row_side, key_side, saved.lengths)
                total = _accumulated(total, [(weights * d_weights).sum(axis=-1, keepdims=True)])
                chain.links = call.fence(total)
            chain.links = [sums.write(heads.place(rows), heads.split(total[0], len(rows)), len(tiles))]
    (made,) = chain.results(sums.array)
    return structs.replace(saved, weighted_sums=made)


def sink_gradient(saved: SavedForBackward, sinks: mx.array, call: BlockwiseParams) -> mx.array:
    """Return the gradient of the sinks, (H,) in their dtype, summed over blocks of rows."""
    total = mx.zeros((saved.q.shape[1],))
    chain = Chain()
    for rows in blocks_of(saved.q.shape[2], call.blocks.rows):
        chain.links = [total]
        statistics, delta = _of_rows(saved, call, chain, itemgetter((slice(None), slice(None), as_slice(rows))))[2:4]
        everything = HeadGroup(range(saved.q.shape[0]), range(saved.k.shape[1]), saved.q.shape[1] // saved.k.shape[1])
        shift = row_shift(call, everything, rows, saved.lengths)
        score = sinks.astype(mx.float32)[None, :, None, None]
        weights = _weights(score if shift is None else score - shift, statistics, call)
        total = total - (weights * delta).sum(axis=(0, 2, 3))
    return chain.results(total)[0].astype(sinks.dtype)


def _key_block(
    saved: SavedForBackward,
    call: BlockwiseParams,
    heads: HeadGroup,
    keys: range,
    sums: GradientSums,
    shares: dict[int, mx.array] | None,
    chain: Chain,
) -> None:
    """Process one block of keys with all rows: write dK and dV of these keys and, unless `shares` is None, add to dQ.

    `shares` maps the first row of a block to its partial dQ, which is written after the last keys visible to the block.
    """
    of_keys: list[mx.array] = []
    whole: KeyBlock | None = None
    tiles = 0
    for rows in blocks_of(saved.q.shape[2], call.blocks.rows):
        seen = call.seen_of(heads, rows, keys, saved.lengths)
        if not seen:
            continue
        visible = call.visible_keys(heads, rows, saved.lengths)
        tiles += 1
        row_side = _make_row_block(saved, call, heads, rows, chain)
        if len(seen) < len(keys):
            key_side = _make_key_block(saved, call, heads, seen, chain)
        else:
            key_side = whole = whole or _make_key_block(saved, call, heads, keys, chain)
        weights, d_scores = _tile(saved, call, heads, row_side, key_side)
        made = [
            call.product(x.swapaxes(-1, -2), of_rows)
            for x, of_rows in ((d_scores, row_side.query), (weights, row_side.cotangent))
        ]
        of_keys = _accumulated(of_keys, [_padded_share(share.astype(mx.float32), seen, keys) for share in made])
        chain.links = call.fence(of_keys)
        if shares is not None:
            share = call.product(d_scores, key_side.key).astype(mx.float32)
            share = shares.pop(rows.start) + share if rows.start in shares else share
            if visible.stop <= keys.stop:
                chain.links += call.fence([_write_d_query(sums, share, call, heads, rows, 1)])
            else:
                shares[rows.start] = share
                chain.links.append(share)
    if of_keys:
        place = (as_slice(heads.batches), as_slice(heads.kv_heads), as_slice(keys))
        d_key = sums.d_key.write(place, scaled(of_keys[0], call.scale), tiles)
        chain.links = [d_key, sums.d_value.write(place, of_keys[1], tiles), *(shares or {}).values()]


def _query_pass(
    saved: SavedForBackward, call: BlockwiseParams, heads: HeadGroup, sums: GradientSums, chain: Chain
) -> None:
    """Compute dQ alone, one block of rows after the other."""
    for rows in blocks_of(saved.q.shape[2], call.blocks.rows):
        total: list[mx.array] = []
        tiles = 0
        for keys in call.key_blocks(heads, rows, saved.lengths):
            row_side = _make_row_block(saved, call, heads, rows, chain)
            key_side = _make_key_block(saved, call, heads, keys, chain)
            _, d_scores = _tile(saved, call, heads, row_side, key_side)
            total = _accumulated(total, [call.product(d_scores, key_side.key).astype(mx.float32)])
            chain.links = call.fence(total)
            tiles += 1
        if total:
            chain.links = [_write_d_query(sums, total[0], call, heads, rows, tiles)]


def _write_d_query(
    sums: GradientSums, total: mx.array, call: BlockwiseParams, heads: HeadGroup, rows: range, tiles: int
) -> mx.array:
    return sums.d_query.write(heads.place(rows), heads.split(scaled(total, call.scale), len(rows)), tiles)


def _make_row_block(
    saved: SavedForBackward, call: BlockwiseParams, heads: HeadGroup, rows: range, chain: Chain
) -> RowBlock:
    """Slice the operands of a block of rows, ordered after the chain."""
    query, cotangent, statistics, delta, of_logsumexp = _of_rows(saved, call, chain, lambda x: heads.rows(x, rows))
    shift = row_shift(call, heads, rows, saved.lengths)
    return RowBlock(rows, call.operand(query), call.operand(cotangent), statistics, delta, of_logsumexp, shift)


def _of_rows(
    saved: SavedForBackward, call: BlockwiseParams, chain: Chain, of: Callable[[mx.array], mx.array]
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]:
    """Return query, cotangent, statistics, delta and dL of some rows, which `of` slices."""
    given = [] if saved.statistics_cotangent is None else [saved.statistics_cotangent]
    summed = saved.weighted_sums
    wholes = chain.whole(saved.q, saved.cotangent, saved.output if summed is None else summed, saved.statistics, *given)
    query, cotangent, delta, statistics, *more = (of(x) for x in wholes)
    if summed is None:
        delta = call.row_products(cotangent.astype(mx.float32), delta.astype(mx.float32))
    # Weights depend only on maximum + logarithm: the gradient of either is that of the logsumexp.
    of_logsumexp = more[0][..., 1:] if more else None
    return query, cotangent, statistics, delta if of_logsumexp is None else delta - of_logsumexp, of_logsumexp


def _make_key_block(
    saved: SavedForBackward, call: BlockwiseParams, heads: HeadGroup, keys: range, chain: Chain
) -> KeyBlock:
    """Slice the operands of a block of keys, ordered after the chain."""
    key, value = (heads.keys(x, keys) for x in chain.whole(saved.k, saved.v))
    transposed = call.transposed(call.in_sum_type(key)), call.transposed(call.operand(value))
    return KeyBlock(keys, call.operand(key), *transposed)


def _tile(
    saved: SavedForBackward, call: BlockwiseParams, heads: HeadGroup, row: RowBlock, side: KeyBlock
) -> tuple[mx.array, mx.array]:
    """Compute P and dS of one tile, in the dtype of matrix products."""
    weights, d_weights, capped = _weights_of_tile(call, heads, row, side, saved.lengths)
    delta = row.delta
    if call.visible_keys(heads, row.rows, saved.lengths) == side.keys:
        # The tile has all keys of these rows: rowsum(P * dP) is rowsum(dO * O) without the rounding of the output.
        delta = (weights * d_weights).sum(axis=-1, keepdims=True)
        delta = delta if row.of_logsumexp is None else delta - row.of_logsumexp
    d_scores = weights * (d_weights - delta)
    if capped is not None:
        capped = capped.astype(mx.float32)
        d_scores = d_scores * (number(1.0, capped) - mx.square(capped))
    return weights.astype(row.query.dtype), d_scores.astype(row.query.dtype)


def _weights_of_tile(
    call: BlockwiseParams, heads: HeadGroup, row: RowBlock, side: KeyBlock, lengths: tuple[int, int]
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Compute P and dP of one tile in float32 and, with a softcap, the tanh of its scores."""
    product = call.scores(call.in_sum_type(row.query), side.key_t)
    scores, capped = tile_scores(product, call, heads, row.rows, side.keys, lengths, row.shift)
    weights = _weights(scores.astype(mx.float32), row.statistics, call)
    return weights, call.product(row.cotangent, side.value_t).astype(mx.float32), capped


def _weights(scores: mx.array, statistics: mx.array, call: BlockwiseParams) -> mx.array:
    """Return the probabilities of scores: 0 in fully masked rows, whose maximum is +inf.

    A score recomputed in a tile of another shape may exceed the maximum: by 64 at 1e9. If both arguments of the minimum
    are equal, the gradient goes to the second one.
    """
    return call.exp(mx.minimum(number(0.0, scores), scores - statistics[..., :1]) - statistics[..., 1:])


def _padded_share(share: mx.array, seen: range, keys: range) -> mx.array:
    """Zero-pad a share of dK or dV, which covers the visible keys, to all keys of the block."""
    before, after = seen.start - keys.start, keys.stop - seen.stop
    return mx.pad(share, [(0, 0), (0, 0), (before, after), (0, 0)]) if before or after else share


def _accumulated(sums: list[mx.array], shares: list[mx.array]) -> list[mx.array]:
    return [a + b for a, b in zip(sums, shares, strict=True)] if sums else shares


Attend = Callable[..., mx.array]
Arrays = list[mx.array]
Inputs = tuple[mx.array, mx.array, mx.array, Arrays, Arrays]
"""q, k, v, the mask's arrays, the sinks."""
MASK_ARGUMENT: Final = 3


def blockwise(call: BlockwiseParams, backward: BlockwiseParams) -> Callable[..., tuple[mx.array, mx.array]]:
    """Return a function of `Inputs` to output and row statistics, computed blockwise, forward and backward."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays) -> tuple[mx.array, mx.array]:
        return forward(q, k, v, _with_array(call, mask), *sinks)

    def pull_back(inputs: Inputs, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Arrays:
        if call.blocks != backward.blocks and call.arithmetic.startswith("wide"):
            outputs = [outputs[0], _statistics_of(inputs, backward)]
        return _blockwise_vjp(inputs, cotangents, outputs, backward)

    attend.vjp(pull_back)
    attend.vmap(vmap_rule(attend, MASK_ARGUMENT))
    return cast("Callable[..., tuple[mx.array, mx.array]]", attend)


def _statistics_of(inputs: Inputs, backward: BlockwiseParams) -> mx.array:
    """Recompute the row statistics in the tiles of the backward pass.

    cuBLAS sums a score in another order in a tile of another shape, and scores of 1e5 then differ by 0.01. With the
    statistics of other tiles a row's weights would not sum to 1, and dS would not cancel in a row with one visible key.
    """
    q, k, _, mask, sinks = inputs
    return row_statistics(q, k, _with_array(backward, mask), *sinks)


def logsumexp_of(statistics: mx.array, shifts: mx.array | None) -> mx.array:
    """Return the logsumexp of rows (B, H, Lq) from their statistics and `row_shifts`; -inf for fully masked rows."""
    top, logarithm = statistics[..., 0], statistics[..., 1]
    whole = top + logarithm if shifts is None else top + logarithm + shifts
    # an infinite score has the maximum of a fully masked row, but a NaN for a logarithm
    empty = mx.logical_and(top == number(mx.inf, top), logarithm == number(0.0, logarithm))
    return mx.where(empty, number(-mx.inf, top), whole)


def with_blockwise_backward(whole: Attend, backward: BlockwiseParams) -> Attend:
    """Return `whole` with a blockwise backward pass, which recomputes the row statistics."""

    def pull_back(inputs: Inputs, cotangent: mx.array, output: mx.array) -> Arrays:
        return _blockwise_vjp(inputs, [cotangent], [output, _statistics_of(inputs, backward)], backward)

    return differentiable(whole, pull_back)


def differentiable(whole: Attend, pull_back: Callable[[Inputs, mx.array, mx.array], Arrays]) -> Attend:
    """Return `whole`, a function of `Inputs`, with the gradients of `pull_back`, one for each array."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays) -> mx.array:
        return whole(q, k, v, mask, sinks)

    attend.vjp(pull_back)
    attend.vmap(vmap_rule(attend, MASK_ARGUMENT))
    return cast("Attend", attend)


def _blockwise_vjp(
    inputs: Inputs, cotangents: Sequence[mx.array], outputs: Sequence[mx.array], call: BlockwiseParams
) -> Arrays:
    q, k, v, mask, sinks = inputs

    def saved(
        q: mx.array, k: mx.array, v: mx.array, _: Arrays, outputs: Arrays, cotangents: Arrays
    ) -> SavedForBackward:
        return SavedForBackward(q, k, v, *outputs, *cotangents)

    @mx.custom_function
    def gradients_of(*arrays: Any) -> Arrays:
        return gradients(saved(*arrays), _with_array(call, arrays[MASK_ARGUMENT]))

    gradients_of.vmap(vmap_rule(gradients_of, MASK_ARGUMENT))
    given = q, k, v, mask, list(outputs), list(cotangents)
    of_sinks = [sink_gradient(saved(*given), sink, _with_array(call, mask)) for sink in sinks]
    return [*cast("Arrays", gradients_of(*given)), *(mx.zeros_like(array) for array in mask), *of_sinks]


def _with_array(call: BlockwiseParams, array: Arrays) -> BlockwiseParams:
    return structs.replace(call, mask=call.mask.with_arrays(array))
