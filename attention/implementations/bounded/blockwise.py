"""Attention in blocks with an online softmax, forward and backward, in plain MLX operations.

A tile is some sequences x some key heads (with all query heads that share them) x rows x keys:

               keys ->
        rows   [ tile ][ tile ]......       each row of tiles keeps a running maximum m, a running sum l
          |    [ tile ][ tile ][ tile ]     and an output that is rescaled whenever m grows
          v    ....... fully masked tiles are never computed

The online softmax follows Milakov and Gimelshein (arXiv:1805.02867), the tiling FlashAttention 2 (arXiv:2307.08691).
The backward pass recomputes each tile from the statistics of its rows: the maximum and the logarithm of the sum. They
are stored separately, because next to a maximum of 1e9 the logarithm is below float32's resolution.

A `Chain` makes each tile wait for the previous one, and `TileWriter` writes each block into the output as soon as it is
computed.
"""

import math
from collections.abc import Iterator
from typing import Final, Literal

import mlx.core as mx
from msgspec import Struct

from attention import masks
from attention.implementations.baseline import in_tf32
from attention.implementations.bounded.blocks import Blocks
from attention.implementations.bounded.listed import TileMap
from attention.implementations.bounded.memory import Chain, Fence, TileWriter, no_fence
from attention.implementations.quantized_kv import packed_product
from attention.masks import Mask
from attention.measure.device import Backend
from attention.quantized_kv import KeyOrValue, QuantizedArray, arrays_of

LOG2E: Final = math.log2(math.e)
MAX_CAPPED_FACTOR: Final = 1e18
"""Largest factor of a score in tanh: beyond it tanh is saturated for every score that differs from 0."""
Arithmetic = Literal["exact", "native", "wide", "wide float32"]


class BlockwiseParams(Struct, frozen=True, eq=False):
    """Parameters of a call other than its arrays.

    `arithmetic` "exact" computes in float32, where MLX's CPU backend is faster: it emulates half precision. "native"
    multiplies matrices in the inputs' type. On CUDA "wide" multiplies matrices in float32 for inputs in half precision:
    TF32 represents these exactly, and scores stay float32. "wide float32" is for float32 inputs on CUDA, which TF32
    would round: see `exact_product`.
    """

    scale: float
    mask: Mask
    softcap: float | None
    blocks: Blocks
    arithmetic: Arithmetic
    fence: Fence = no_fence
    """Ordering of successive tiles."""
    shifted: bool = False
    """Whether to subtract `masks.shift` from the rows of an additive mask, as for inputs in half precision."""
    packed: bool = False
    """Whether quantized keys and values are read packed by every row; otherwise a tile of them is dequantized."""
    tiles: TileMap | None = None
    """The states of the tiles, if the mask is a pattern; without them every tile is computed with its part of it."""

    def visible_keys(self, heads: "HeadGroup", rows: range, lengths: tuple[int, int]) -> range:
        """Return the smallest range of keys that contains all visible to the rows by position; may be empty."""
        if self.tiles is None:
            return self.mask.visible_keys(rows, *lengths)
        blocks = self.tiles.key_blocks(heads.batches, heads.query_heads, rows)
        return range(blocks[0].start, blocks[-1].stop) if blocks else range(0)

    def key_blocks(self, heads: "HeadGroup", rows: range, lengths: tuple[int, int]) -> list[range]:
        """Return the blocks of keys visible to any of the rows."""
        if self.tiles is not None:
            return self.tiles.key_blocks(heads.batches, heads.query_heads, rows)
        seen = self.mask.visible_keys(rows, *lengths)
        return [range(seen.start + b.start, seen.start + b.stop) for b in blocks_of(len(seen), self.blocks.keys)]

    def seen_of(self, heads: "HeadGroup", rows: range, keys: range, lengths: tuple[int, int]) -> range:
        """Return the part of a block of keys that the rows see any of."""
        if self.tiles is not None:
            return keys if self.tiles.sees(heads.batches, heads.query_heads, rows, keys) else range(0)
        seen = self.mask.visible_keys(rows, *lengths)
        return range(max(seen.start, keys.start), min(seen.stop, keys.stop))

    @property
    def factor(self) -> float:
        """Factor of the product of a query and a key."""
        if self.softcap is None:
            return self.scale
        return max(-MAX_CAPPED_FACTOR, min(MAX_CAPPED_FACTOR, self.scale / self.softcap))

    @property
    def factors(self) -> tuple[float, float]:
        """The factor, split into one of the query and one of the product.

        With "wide" arithmetic the query's factor is a power of 2, which adds no bits to a half-precision number.
        """
        if not self.arithmetic.startswith("wide"):
            return self.factor, 1.0
        mantissa, exponent = math.frexp(self.factor)
        return math.ldexp(1.0, exponent), mantissa

    def exp(self, exponent: mx.array) -> mx.array:
        """Return e to the power of a difference of scores; 0 for -inf.

        MLX's exp is slow on the CPU, so a power of 2 is used there. The factor log2(e) is applied last: in the query it
        would round every score.
        """
        if self.arithmetic != "exact":
            return mx.exp(exponent)
        return mx.power(number(2.0, exponent), scaled(exponent, LOG2E))

    def operand(self, x: mx.array) -> mx.array:
        """Convert an array to the dtype of matrix products."""
        return x if self.arithmetic == "native" else x.astype(mx.float32)

    def in_sum_type(self, x: mx.array) -> mx.array:
        """Convert a query, key or value to the dtype of sums over many products.

        In float16, scores and unnormalised sums of values overflow from 65,520.
        """
        return x.astype(mx.float32) if x.dtype == mx.float16 else self.operand(x)

    def transposed(self, x: mx.array) -> mx.array:
        """Swap the last two axes, for the right side of a product."""
        x = x.swapaxes(-1, -2)
        # The reference BLAS computes dot products of rows at half the rate of sums of columns.
        return mx.contiguous(x) if self.arithmetic == "exact" else x

    def product(self, a: mx.array, b: mx.array) -> mx.array:
        """Return the matrix product of two operands."""
        return exact_product(a, b) if self.arithmetic == "wide float32" else a @ b

    def row_products(self, a: mx.array, b: mx.array) -> mx.array:
        """Return the dot products of corresponding rows, summed in the same order as by `product`."""
        if self.arithmetic == "wide float32":
            return exact_product(a[..., None, :], b[..., None])[..., 0]
        return (a * b).sum(axis=-1, keepdims=True)

    def scores(self, query: mx.array, transposed: mx.array) -> mx.array:
        """Return the product of a query and transposed keys, times the factor."""
        of_query, of_product = self.factors
        product = self.product(scaled(query, of_query), transposed)
        return product if of_product == 1.0 else scaled(product, of_product)


def arithmetic_of(dtype: mx.Dtype, backend: Backend) -> Arithmetic:
    """Return the arithmetic of blocks for inputs of a dtype."""
    if backend != "cuda":
        return "exact" if backend == "cpu" else "native"
    return "wide float32" if in_tf32(masks.dtype_name(dtype), backend) else "wide"


class HeadGroup(Struct, frozen=True):
    """The sequences and key heads of a run of tiles."""

    batches: range
    kv_heads: range
    group: int

    def keys(self, x: mx.array, keys: range) -> mx.array:
        """Slice keys or values: (batches, kv_heads, len(keys), width)."""
        return x[as_slice(self.batches), as_slice(self.kv_heads), as_slice(keys)]

    def place(self, rows: range) -> tuple[slice, slice, slice]:
        """Return the slices of a block of rows in a query-side array."""
        return as_slice(self.batches), self.heads, as_slice(rows)

    def rows(self, x: mx.array, rows: range) -> mx.array:
        """Slice a query-side array; heads that share a key head are stacked into one long matrix."""
        x = x[as_slice(self.batches), self.heads, as_slice(rows)]
        return x.reshape(len(self.batches), len(self.kv_heads), self.group * len(rows), x.shape[-1])

    def sinks(self, sinks: mx.array, rows: int, shift: mx.array | None) -> mx.array:
        """Return the sinks minus the rows' shift, with heads stacked as by `rows`.

        Shape (1 or batches, kv_heads, group x rows, 1), in float32.
        """
        mine = sinks[self.heads].astype(mx.float32)[None, :, None, None]
        mine = mine if shift is None else mine - shift
        whole = mx.broadcast_to(mine, (mine.shape[0], mine.shape[1], rows, 1))
        return whole.reshape(mine.shape[0], len(self.kv_heads), -1, 1)

    def split(self, x: mx.array, rows: int) -> mx.array:
        """Undo the stacking of `rows`: (batches, heads, rows, width)."""
        return x.reshape(len(self.batches), len(self.kv_heads) * self.group, rows, x.shape[-1])

    @property
    def query_heads(self) -> range:
        """The query heads."""
        return range(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def heads(self) -> slice:
        """The query heads, as a slice."""
        return as_slice(self.query_heads)


class OnlineSoftmax(Struct):
    """The running softmax of one block of rows, in float32."""

    row_max: mx.array
    row_sum: mx.array
    output: mx.array | None
    """None if only the statistics are computed."""

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays that the next tile waits for."""
        return [self.row_sum] if self.output is None else [self.output, self.row_sum]


def forward(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, call: BlockwiseParams, sinks: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Compute attention in blocks.

    Args:
        q: query (B, H, Lq, D).
        k: key (B, Hkv, Lk, D), possibly quantized.
        v: value (B, Hkv, Lk, Dv), possibly quantized.
        call: parameters of the call.
        sinks: (H,), an extra logit per head in the softmax of every row, without a value.

    Returns:
        The output (B, H, Lq, Dv) in the query's type; and the statistics of each row, (B, H, Lq, 2) in float32: the
        maximum of its scores, less the row's shift, and the logarithm of the sum of its weights; +inf and 0 for fully
        masked rows.
    """
    chain = Chain()
    output = TileWriter(mx.zeros((*q.shape[:3], v.shape[3]), q.dtype), chain)
    statistics = _statistics(q, chain)
    for heads in head_groups(q, k, call.blocks):
        for rows in blocks_of(q.shape[2], call.blocks.rows):
            state = _row_block(q, k, v, call, heads, rows, sinks, chain)
            if state is None:
                continue  # fully masked rows
            tiles = len(call.key_blocks(heads, rows, (q.shape[2], k.shape[2])))
            parts = [heads.split(part, len(rows)) for part in (_normalized_output(state), _row_statistics(state))]
            written = [
                whole.write(heads.place(rows), part, tiles)
                for whole, part in zip((output, statistics), parts, strict=True)
            ]
            chain.links = call.fence(written)
    out, kept = chain.results(output.array, statistics.array)
    return out, kept


def row_statistics(q: mx.array, k: mx.array, call: BlockwiseParams, sinks: mx.array | None = None) -> mx.array:
    """Return the row statistics of `forward` without computing the output."""
    chain = Chain()
    statistics = _statistics(q, chain)
    for heads in head_groups(q, k, call.blocks):
        for rows in blocks_of(q.shape[2], call.blocks.rows):
            state = _row_block(q, k, None, call, heads, rows, sinks, chain)
            if state is not None:
                tiles = len(call.key_blocks(heads, rows, (q.shape[2], k.shape[2])))
                part = heads.split(_row_statistics(state), len(rows))
                chain.links = call.fence([statistics.write(heads.place(rows), part, tiles)])
    return chain.results(statistics.array)[0]


def _statistics(q: mx.array, chain: Chain) -> TileWriter:
    """Return the statistics of fully masked rows, to be overwritten."""
    return TileWriter(mx.broadcast_to(mx.array([mx.inf, 0.0]), (*q.shape[:3], 2)), chain)


def head_groups(q: mx.array, k: KeyOrValue, blocks: Blocks) -> Iterator[HeadGroup]:
    """Yield the sequences and heads of each run of tiles."""
    group = q.shape[1] // k.shape[1]
    for batches in blocks_of(q.shape[0], blocks.batches):
        for kv_heads in blocks_of(k.shape[1], blocks.kv_heads):
            yield HeadGroup(batches, kv_heads, group)


def blocks_of(length: int, size: int) -> Iterator[range]:
    """Split range(length) into ranges of `size`; the last one may be shorter."""
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _row_block(
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue | None,
    call: BlockwiseParams,
    heads: HeadGroup,
    rows: range,
    sinks: mx.array | None,
    chain: Chain,
) -> OnlineSoftmax | None:
    state: OnlineSoftmax | None = None
    lengths = q.shape[2], k.shape[2]
    shift = row_shift(call, heads, rows, lengths)
    for keys in call.key_blocks(heads, rows, lengths):
        whole, *sides = chain.whole(q, *arrays_of(k, v))
        query, cuts = heads.rows(whole, rows), [heads.keys(side, keys) for side in sides]
        of_key = len(arrays_of(k))
        key = _operand_of_tile(k, cuts[:of_key], query, call)
        value = None if v is None else _operand_of_tile(v, cuts[of_key:], query, call)
        product = _product(call.in_sum_type(query), key, call)
        scores, _ = tile_scores(product, call, heads, rows, keys, lengths, shift)
        if state is None and sinks is not None:
            state = _state_of_sinks(heads.sinks(sinks, len(rows), shift), scores, None if v is None else v.shape[3])
        state = _accumulate(state, scores, call.in_sum_type(value) if isinstance(value, mx.array) else value, call)
        chain.links = call.fence(state.arrays)
    return state


def _product(query: mx.array, key: KeyOrValue, call: BlockwiseParams) -> mx.array:
    if isinstance(key, QuantizedArray):
        return packed_product(scaled(query, call.factor), key, True)
    return call.scores(query, call.transposed(call.in_sum_type(key)))


def _operand_of_tile(x: KeyOrValue, arrays: list[mx.array], query: mx.array, call: BlockwiseParams) -> KeyOrValue:
    """Reassemble a slice of keys or values; dequantize it unless the call reads it packed."""
    if not isinstance(x, QuantizedArray):
        return arrays[0]
    tile = x.with_arrays(arrays)
    if call.packed:
        return tile
    in_half = call.arithmetic == "native" and query.dtype != mx.float16
    return tile.dequantized(query.dtype if in_half else mx.float32)


def _state_of_sinks(sinks: mx.array, scores: mx.array, width: int | None) -> OnlineSoftmax:
    """Return the initial softmax state, which contains only the attention sinks."""
    top = mx.broadcast_to(sinks, (*scores.shape[:-1], 1))
    output = None if width is None else mx.zeros((*scores.shape[:-1], width))
    return OnlineSoftmax(top, mx.ones_like(top), output)


def _normalized_output(state: OnlineSoftmax) -> mx.array:
    """Return the output of a block of rows."""
    assert state.output is not None
    return state.output / _without_zeros(state.row_sum)


def _row_statistics(state: OnlineSoftmax) -> mx.array:
    """Return the statistics of a block of rows."""
    top = mx.where(state.row_sum == number(0.0, state.row_sum), number(mx.inf, state.row_max), state.row_max)
    return mx.concatenate([top, mx.log(_without_zeros(state.row_sum))], axis=-1)


def _without_zeros(total: mx.array) -> mx.array:
    """Replace zero sums of weights, those of fully masked rows, by 1."""
    return mx.where(total == number(0.0, total), number(1.0, total), total)


def _accumulate(
    state: OnlineSoftmax | None, scores: mx.array, value: KeyOrValue | None, call: BlockwiseParams
) -> OnlineSoftmax:
    """Add one block of keys to the running softmax."""
    scores = scores.astype(mx.float32)
    top = mx.stop_gradient(scores.max(axis=-1, keepdims=True))  # of which the result does not depend
    if state is not None:
        top = mx.maximum(top, state.row_max)
    # A row without a visible key so far has maximum -inf: any finite initial value could exceed all of its scores.
    finite = mx.where(top == number(-mx.inf, top), number(0.0, top), top)
    weights = call.exp(scores - finite)
    total = weights.sum(axis=-1, keepdims=True)
    output = None if value is None else _weighted_sum(weights, value, call)
    if state is None:
        return OnlineSoftmax(top, total, output)
    shrink = call.exp(state.row_max - finite)
    if state.output is not None and output is not None:
        output = state.output * shrink + output
    return OnlineSoftmax(top, state.row_sum * shrink + total, output)


def _weighted_sum(weights: mx.array, value: KeyOrValue, call: BlockwiseParams) -> mx.array:
    """Return the weighted sum of values, in float32."""
    if isinstance(value, QuantizedArray):
        return packed_product(weights, value, False)
    return call.product(weights.astype(value.dtype), value).astype(mx.float32)


def exact_product(a: mx.array, b: mx.array) -> mx.array:
    """Return the product of two float32 matrices in float32, not in TF32 as by MLX's own product.

    On CUDA MLX rounds float32 to TF32 in products of two matrices, but not in those of a matrix and a vector. So each
    row of `a` is a vector, and the columns of `b` are the matrix's rows: slower, but not off by 1e-3.
    """
    return (mx.contiguous(b.swapaxes(-1, -2))[..., None, :, :] @ a[..., None])[..., 0]


def tile_scores(
    product: mx.array,
    call: BlockwiseParams,
    heads: HeadGroup,
    rows: range,
    keys: range,
    lengths: tuple[int, int],
    shift: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """Return the masked scores of one tile minus `row_shift`, and with a softcap the tanh, for the gradient.

    `product` is the product of query and keys, times `call.factor`.
    """
    capped = None if call.softcap is None else mx.tanh(product)
    scores = product if capped is None or call.softcap is None else scaled(capped, call.softcap)
    if call.mask.alibi is not None:
        scores = _biased(scores, call.mask.alibi, heads, rows, keys, lengths)
    return _masked(scores, call, heads, rows, keys, lengths, shift), capped


def _biased(
    scores: mx.array, slopes: mx.array, heads: HeadGroup, rows: range, keys: range, lengths: tuple[int, int]
) -> mx.array:
    """Return the scores with the bias of ALiBi, in float32."""
    bias = masks.alibi_bias(slopes[heads.heads], rows, keys, *lengths)
    shape = (len(heads.batches), len(heads.query_heads), len(rows), len(keys))
    return (scores.astype(mx.float32).reshape(shape) + bias).reshape(scores.shape)


def row_shift(call: BlockwiseParams, heads: HeadGroup, rows: range, lengths: tuple[int, int]) -> mx.array | None:
    """Return `masks.shift` of some rows over all keys visible to them, or None.

    Shape (batches or 1, heads or 1, rows or 1, 1), in the mask's dtype.
    """
    array = call.mask.array
    if array is None or not call.shifted or not masks.has_shift(array):
        return None
    tiles = [_mask_tile(call, heads, rows, keys, lengths) for keys in call.key_blocks(heads, rows, lengths)]
    tops = [tile.max(axis=-1, keepdims=True) for tile in tiles if tile is not None]
    if len(tops) > 1:
        shape = mx.broadcast_arrays(*tops)[0].shape
        tops = [mx.concatenate([mx.broadcast_to(top, shape) for top in tops], axis=-1).max(axis=-1, keepdims=True)]
    return masks.shift(tops[0]) if tops else None


def row_shifts(q: mx.array, k: KeyOrValue, call: BlockwiseParams) -> mx.array | None:
    """Return `row_shift` of all rows (B, H, Lq) in float32, which the statistics of `forward` lack; None for zeros."""
    if call.mask.array is None or not call.shifted or not masks.has_shift(call.mask.array):
        return None
    lengths, group = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]

    def of_rows(heads: HeadGroup, rows: range) -> mx.array:
        shape = (len(heads.batches), len(heads.query_heads), len(rows), 1)
        shift = row_shift(call, heads, rows, lengths)
        return mx.zeros(shape) if shift is None else mx.broadcast_to(shift.astype(mx.float32), shape)

    def of_heads(batches: range, kv_heads: range) -> mx.array:
        heads = HeadGroup(batches, kv_heads, group)
        return mx.concatenate([of_rows(heads, rows) for rows in blocks_of(q.shape[2], call.blocks.rows)], axis=2)

    of_batches = [
        mx.concatenate([of_heads(batches, heads) for heads in blocks_of(k.shape[1], call.blocks.kv_heads)], axis=1)
        for batches in blocks_of(q.shape[0], call.blocks.batches)
    ]
    return mx.concatenate(of_batches, axis=0)[..., 0]


def _masked(
    scores: mx.array,
    call: BlockwiseParams,
    heads: HeadGroup,
    rows: range,
    keys: range,
    lengths: tuple[int, int],
    shift: mx.array | None,
) -> mx.array:
    tile = _mask_tile(call, heads, rows, keys, lengths)
    if tile is None:
        return scores
    if shift is not None:
        tile = tile - shift
    shape = (len(heads.batches), len(heads.kv_heads) * heads.group, len(rows), len(keys))
    return masks.apply(scores.reshape(shape), tile).reshape(scores.shape)


def _mask_tile(
    call: BlockwiseParams, heads: HeadGroup, rows: range, keys: range, lengths: tuple[int, int]
) -> mx.array | None:
    """All parts of the mask for one tile, broadcastable to (batches, heads, rows, keys)."""
    if call.mask.pattern is None:
        tile = call.mask.tile(rows, keys, *lengths)
    elif call.tiles is None:
        tile = call.mask.pattern.part(lengths, heads.batches, heads.query_heads, rows, keys)
    else:
        tile = call.tiles.tile(heads.batches, heads.query_heads, rows, keys)
    if call.mask.array is None:
        return tile
    given = masks.mask_tile(
        masks.as_4d(call.mask.array), as_slice(heads.batches), heads.heads, as_slice(rows), as_slice(keys)
    )
    return masks.combine(tile, given)


def number(value: float, like: mx.array) -> mx.array:
    """Return a number in the dtype of `like`, as an array with one axis.

    mx.compile merges equal arrays without axes, and everything computed from them, in time quadratic in their uses.
    """
    return mx.array([value], like.dtype)


def scaled(x: mx.array, factor: float) -> mx.array:
    """Return an array times a number, in the array's dtype."""
    return x * number(factor, x)


def as_slice(run: range) -> slice:
    """Return a range as a slice."""
    return slice(run.start, run.stop)
