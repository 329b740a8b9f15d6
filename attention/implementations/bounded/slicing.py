"""Attention in slices: MLX's SDPA on some heads and rows at a time, each with all keys visible to its rows.

               keys ->
        rows   [ slice     ]            under a causal mask later slices have more keys;
          |    [ slice          ]       keys visible to no row of a slice are skipped
          v    [ slice               ]

A slice has the complete softmax of its rows, so that nothing has to be combined: it is a few large kernels of MLX, or
one fused kernel. A GPU is faster with these than with blocks and an online softmax, which are a dozen small kernels
each. The backward pass recomputes a slice and differentiates it by MLX; dK and dV are summed over slices of rows.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
from msgspec import Struct, structs

from attention import masks
from attention.implementations.bounded.blocks import Blocks
from attention.implementations.bounded.blockwise import HeadGroup, as_slice, blocks_of, head_groups
from attention.implementations.bounded.blockwise_gradient import Arrays, Attend, Inputs, differentiable
from attention.implementations.bounded.memory import Chain, TileOrder, TileWriter
from attention.implementations.bounded.policy import KEY_MULTIPLE, ROW_MULTIPLE
from attention.implementations.mlx_sdpa import attend_whole, is_call_widened
from attention.masks import Mask
from attention.quantized_kv import KeyOrValue, QuantizedArray, arrays_of

FORWARD_NODES, BACKWARD_NODES = 2, 4
"""Depth of a slice's graph, in tiles as counted by `TileWriter`."""


class SlicedParams(Struct, frozen=True, eq=False):
    """Parameters of a call other than its arrays."""

    scale: float
    mask: Mask
    blocks: Blocks
    """Size of a slice; its keys are all that are visible to its rows."""
    order: TileOrder
    """Ordering of successive slices."""


class Slice(Struct, frozen=True):
    """One slice."""

    heads: HeadGroup
    rows: range
    keys: range

    def of_queries(self, x: mx.array) -> mx.array:
        """Return the slice's part of a query-side array."""
        return x[self.heads.place(self.rows)]

    def of_keys(self, x: mx.array) -> mx.array:
        """Return the slice's part of keys or values."""
        return self.heads.keys(x, self.keys)

    def of_mask(self, mask: Mask) -> Mask:
        """Return the slice's part of a mask, still lower-right aligned, since the keys end where the last row's do."""
        if mask.array is None:
            return mask
        whole = masks.as_4d(mask.array)
        part = masks.mask_tile(
            whole, as_slice(self.heads.batches), self.heads.heads, as_slice(self.rows), as_slice(self.keys)
        )
        return structs.replace(mask, array=part)


def forward(q: mx.array, k: KeyOrValue, v: KeyOrValue, call: SlicedParams) -> mx.array:
    """Compute attention in slices, for which quantized keys and values are dequantized; shapes as in the protocol."""
    chain = Chain()
    output = TileWriter(mx.zeros((*q.shape[:3], v.shape[3]), q.dtype), chain)
    for heads in head_groups(q, k, call.blocks):
        for each in slices_of(heads, q.shape[2], k.shape[2], call):
            query, *sides = chain.whole(q, *arrays_of(k, v))
            cuts = [each.of_keys(side) for side in sides]
            of_key = len(arrays_of(k))
            key, value = _dense(k, cuts[:of_key], q.dtype), _dense(v, cuts[of_key:], q.dtype)
            part = _attend(call, each, chain)(each.of_queries(query), key, value)
            chain.links = call.order.next([output.write(heads.place(each.rows), part, FORWARD_NODES)])
    return chain.results(output.array)[0]


def _dense(x: KeyOrValue, arrays: list[mx.array], dtype: mx.Dtype) -> mx.array:
    """Return a slice of keys or values, dequantized."""
    return x.with_arrays(arrays).dequantized(dtype) if isinstance(x, QuantizedArray) else arrays[0]


def gradients(
    q: mx.array, k: mx.array, v: mx.array, cotangent: mx.array, call: SlicedParams, earlier: Sequence[mx.array]
) -> list[mx.array]:
    """Return dQ, dK and dV in the dtypes of query, key and value; the first slice waits for `earlier`."""
    chain = Chain(earlier)
    d_query, d_key, d_value = (TileWriter(mx.zeros_like(x), chain) for x in (q, k, v))
    for heads in head_groups(q, k, call.blocks):
        sums = _sums(heads, k, v, chain)
        slices = list(slices_of(heads, q.shape[2], k.shape[2], call))
        for each in slices:
            query, key, value, upstream = chain.whole(q, k, v, cotangent)
            primals, of_output = (
                [each.of_queries(query), each.of_keys(key), each.of_keys(value)],
                each.of_queries(upstream),
            )
            _, (of_query, *of_keys) = mx.vjp(_attend(call, each, chain), primals, [of_output])
            seen = slice(None), slice(None), as_slice(each.keys)
            parts = [one.add(seen, part, BACKWARD_NODES) for one, part in zip(sums, of_keys, strict=True)]
            chain.links = call.order.next([d_query.write(heads.place(each.rows), of_query, BACKWARD_NODES), *parts])
        if slices:
            place = as_slice(heads.batches), as_slice(heads.kv_heads), slice(None)
            nodes = BACKWARD_NODES * len(slices)
            written = [one.write(place, total.array, nodes) for one, total in zip((d_key, d_value), sums, strict=True)]
            chain.links = call.order.alone(written)
    return chain.results(d_query.array, d_key.array, d_value.array)


def with_sliced_backward(whole: Attend, call: SlicedParams) -> Attend:
    """Return `whole`, a function of `Inputs`, with a backward pass in slices."""

    def pull_back(inputs: Inputs, cotangent: mx.array, output: mx.array) -> Arrays:
        q, k, v, mask, _ = inputs
        backward = structs.replace(call, mask=call.mask.with_arrays(mask))
        # The forward pass frees its memory first: a cotangent may be available before the output is computed.
        given = gradients(q, k, v, cotangent, backward, call.order.alone([output]))
        return [*given, *(mx.zeros_like(array) for array in mask)]

    return differentiable(whole, pull_back)


def _attend(call: SlicedParams, each: Slice, chain: Chain) -> Attend:
    """Return MLX's SDPA with the slice's part of the mask, which waits for the chain: MLX would convert it early."""
    mask = each.of_mask(call.mask)
    lengths = len(each.rows), len(each.keys)
    if mask.array is not None:
        mask = structs.replace(mask, array=chain.after(mask.array)[0])
    elif mask.window is not None and not mask.empty_rows(*lengths):
        positions = mask.materialize(*lengths)
        mask = Mask(array=None if positions is None else chain.after(positions)[0])
    return lambda q, k, v: attend_whole(q, k, v, call.scale, mask, is_call_widened(q, k, v, mask))


def slices_of(heads: HeadGroup, seq: int, kv_seq: int, call: SlicedParams) -> Iterator[Slice]:
    """Yield the slices of some heads, without fully masked ones."""
    for rows in row_blocks(seq, call.blocks.rows):
        keys = call.mask.visible_keys(rows, seq, kv_seq)
        if keys:
            more = min(-len(keys) % KEY_MULTIPLE, keys.start)
            yield Slice(heads, rows, range(keys.start - more, keys.stop))


def row_blocks(seq: int, size: int) -> Iterator[range]:
    """Split the rows into slices; if `size` is a multiple of ROW_MULTIPLE, a remainder gets a slice of its own."""
    for rows in blocks_of(seq, size):
        odd = len(rows) % ROW_MULTIPLE if size % ROW_MULTIPLE == 0 and len(rows) > ROW_MULTIPLE else 0
        yield range(rows.start, rows.stop - odd)
        if odd:
            yield range(rows.stop - odd, rows.stop)


def _sums(heads: HeadGroup, k: mx.array, v: mx.array, chain: Chain) -> list[TileWriter]:
    """Return float32 accumulators of dK and dV of some heads, allocated only after the previous ones are freed."""
    size = len(heads.batches), len(heads.kv_heads), k.shape[2]
    (zero,) = chain.after(mx.array(0.0))
    return [TileWriter(mx.full((*size, x.shape[3]), zero), chain) for x in (k, v)]
