"""Attention in slices: MLX's SDPA on some heads and rows at a time, each with all the keys that its rows see.

               keys ->
        rows   [ slice     ]            under a causal mask later slices see more keys,
          |    [ slice          ]       and what no row of a slice sees is never computed
          v    [ slice               ]

The softmax of a row is whole, so that nothing has to be put together: a slice is a few large kernels, MLX's own, and
fused where it has one. What a GPU loses in blocks with an online softmax, a dozen small kernels each, it keeps here.
Backward a slice is computed again, and differentiated by MLX; dK and dV are summed over slices of rows.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx
from msgspec import Struct, structs

from attention import masks
from attention.implementations.blocks import Blocks
from attention.implementations.blockwise import Heads, after, blocks_of, cut, head_groups
from attention.implementations.differentiable import Attend
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.implementations.waiting import Passed, at_once
from attention.implementations.written import Written
from attention.masks import Mask

FORWARD_NODES, BACKWARD_NODES = 2, 4
"""How long a slice's way through the graph is, in tiles as `Written` counts them."""


class Slices(Struct, frozen=True, eq=False):
    """Everything about a call but its arrays."""

    scale: float
    mask: Mask
    blocks: Blocks
    """Sizes of a slice; keys are all that its rows see."""
    passed: Passed
    """How slices follow each other."""


class Slice(Struct, frozen=True):
    """One of them."""

    heads: Heads
    rows: range
    keys: range

    def of_queries(self, x: mx.array) -> mx.array:
        """Its part of a query-side array."""
        return x[self.heads.place(self.rows)]

    def of_keys(self, x: mx.array) -> mx.array:
        """Its part of keys or values."""
        return self.heads.keys(x, self.keys)

    def of_mask(self, mask: Mask) -> Mask:
        """Its part of a mask: what is lower-right aligned stays so, since the keys end where the last row's do."""
        if mask.array is None:
            return mask
        whole = masks.as_4d(mask.array)
        part = masks.part(whole, cut(self.heads.batches), self.heads.heads, cut(self.rows), cut(self.keys))
        return structs.replace(mask, array=part)


def forward(q: mx.array, k: mx.array, v: mx.array, call: Slices) -> mx.array:
    """Attends; shapes as in the implementations' protocol."""
    output = Written(mx.zeros((*q.shape[:3], v.shape[3]), q.dtype))
    chain: list[mx.array] = []
    for heads in head_groups(q, k, call.blocks):
        for each in _slices_of(heads, q.shape[2], k.shape[2], call):
            part = _attend(call, each, chain)(*after(chain, each.of_queries(q), each.of_keys(k), each.of_keys(v)))
            chain = call.passed([output.write(heads.place(each.rows), part, FORWARD_NODES)])
    return output.array


def gradients(
    q: mx.array, k: mx.array, v: mx.array, cotangent: mx.array, call: Slices, earlier: Sequence[mx.array]
) -> list[mx.array]:
    """Returns dQ, dK and dV in the types of query, key and value; the first slice follows what came earlier."""
    d_query, d_key, d_value = (Written(mx.zeros_like(x)) for x in (q, k, v))
    chain = list(earlier)
    for heads in head_groups(q, k, call.blocks):
        sums = _sums(heads, k, v)
        slices = list(_slices_of(heads, q.shape[2], k.shape[2], call))
        for each in slices:
            cuts = each.of_queries(q), each.of_keys(k), each.of_keys(v), each.of_queries(cotangent)
            *primals, of_output = after(chain, *cuts)
            _, (of_query, *of_keys) = mx.vjp(_attend(call, each, chain), primals, [of_output])
            seen = slice(None), slice(None), cut(each.keys)
            parts = [one.add(seen, part, BACKWARD_NODES) for one, part in zip(sums, of_keys, strict=True)]
            chain = call.passed([d_query.write(heads.place(each.rows), of_query, BACKWARD_NODES), *parts])
        if slices:
            place = cut(heads.batches), cut(heads.kv_heads), slice(None)
            nodes = BACKWARD_NODES * len(slices)
            chain = [one.write(place, total.array, nodes) for one, total in zip((d_key, d_value), sums, strict=True)]
    return [d_query.array, d_key.array, d_value.array]


def sliced(forward_call: Slices, backward_call: Slices) -> Attend:
    """Attends in slices, forward and backward."""
    return sliced_behind(lambda q, k, v: forward(q, k, v, forward_call), backward_call)


def sliced_behind(whole: Attend, backward_call: Slices) -> Attend:
    """Attends as a whole; the backward pass is one of slices."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return whole(q, k, v)

    def pull_back(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        q, k, v = primals
        # Where slices wait, the first one does so for the forward pass to let go of its memory: for its output, since a
        # cotangent may be there before.
        earlier = [] if backward_call.passed is at_once else backward_call.passed([output])
        return gradients(q, k, v, cotangent, backward_call, earlier)

    attend.vjp(pull_back)
    return cast("Attend", attend)


def _attend(call: Slices, each: Slice, chain: list[mx.array]) -> Attend:
    """MLX's SDPA with a slice's part of the mask, which MLX converts and must not before the slice's turn."""
    sdpa, mask = MlxSdpa(), each.of_mask(call.mask)
    if mask.array is not None:
        mask = structs.replace(mask, array=after(chain, mask.array)[0])
    return lambda q, k, v: sdpa(q, k, v, scale=call.scale, mask=mask)


def _slices_of(heads: Heads, seq: int, kv_seq: int, call: Slices) -> Iterator[Slice]:
    """The slices of some heads, but those that see nothing."""
    for rows in blocks_of(seq, call.blocks.rows):
        keys = call.mask.visible_keys(rows, seq, kv_seq)
        if keys:
            yield Slice(heads, rows, keys)


def _sums(heads: Heads, k: mx.array, v: mx.array) -> list[Written]:
    """Where dK and dV of some heads are summed, in float32 and in place."""
    size = len(heads.batches), len(heads.kv_heads), k.shape[2]
    return [Written(mx.zeros((*size, x.shape[3]), mx.float32)) for x in (k, v)]
