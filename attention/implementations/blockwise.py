"""Attention in blocks with an online softmax, forward and backward, in plain MLX operations.

A tile is some sequences x some key heads (with all query heads that share them) x rows x keys:

               keys ->
        rows   [ tile ][ tile ]......       each row of tiles keeps a running maximum m, a running sum l
          |    [ tile ][ tile ][ tile ]     and an output that is rescaled whenever m grows
          v    ....... what a mask rules out is never computed

The softmax is that of Milakov and Gimelshein (arXiv:1805.02867), the tiling that of FlashAttention 2
(arXiv:2307.08691). The backward pass recomputes each tile from the logsumexp of its rows.

MLX builds its graph lazily and would be free to have all tiles in memory at once: `mx.depends` makes
each tile wait for the one before it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final, Literal

import mlx.core as mx
from msgspec import Struct

from attention import masks
from attention.implementations.blocks import Blocks
from attention.masks import Mask

LOG2E: Final = math.log2(math.e)
Arithmetic = Literal["exact", "native"]


class Call(Struct, frozen=True, eq=False):
    """Everything about a call but its arrays.

    `arithmetic` "exact" computes in float32 with base 2 exponentials, which on MLX's CPU backend is faster as well: its
    exp is a slow one, and half precision is emulated there. "native" multiplies matrices in the inputs' type.
    """

    scale: float
    mask: Mask
    softcap: float | None
    blocks: Blocks
    arithmetic: Arithmetic

    @property
    def base2(self) -> float:
        """Factor that turns scores into exponents of the base in use."""
        return LOG2E if self.arithmetic == "exact" else 1.0

    def power(self, exponent: mx.array) -> mx.array:
        """The base in use to the power of the exponent; 0 for -inf."""
        return mx.power(2.0, exponent) if self.arithmetic == "exact" else mx.exp(exponent)

    def log(self, value: mx.array) -> mx.array:
        """The inverse of power."""
        return mx.log2(value) if self.arithmetic == "exact" else mx.log(value)

    def operand(self, x: mx.array) -> mx.array:
        """An array in the type that matrices are multiplied in."""
        return x.astype(mx.float32) if self.arithmetic == "exact" else x

    def transposed(self, x: mx.array) -> mx.array:
        """The last two axes swapped, for the right side of a product."""
        x = self.operand(x).swapaxes(-1, -2)
        # The reference BLAS takes dot products of rows at half the rate of sums of columns.
        return mx.contiguous(x) if self.arithmetic == "exact" else x


class Heads(Struct, frozen=True):
    """The sequences and key heads of a run of tiles."""

    batches: range
    kv_heads: range
    group: int

    def keys(self, x: mx.array, keys: range) -> mx.array:
        """Cuts keys or values: (batches, kv_heads, len(keys), width)."""
        return x[cut(self.batches), cut(self.kv_heads), cut(keys)]

    def rows(self, x: mx.array, rows: range) -> mx.array:
        """Cuts a query-side array; heads that share a key head stand one below the other in one long matrix."""
        x = x[cut(self.batches), self.heads, cut(rows)]
        return x.reshape(len(self.batches), len(self.kv_heads), self.group * len(rows), x.shape[-1])

    def split(self, x: mx.array, rows: int) -> mx.array:
        """Undoes the stacking of `rows`: (batches, heads, rows, width)."""
        return x.reshape(len(self.batches), len(self.kv_heads) * self.group, rows, x.shape[-1])

    @property
    def heads(self) -> slice:
        """The query heads."""
        return slice(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)


class Online(Struct):
    """The running softmax of one block of rows, in float32."""

    top: mx.array
    total: mx.array
    output: mx.array


def forward(q: mx.array, k: mx.array, v: mx.array, call: Call) -> tuple[mx.array, mx.array]:
    """Attends.

    Returns:
        The output (B, H, Lq, Dv) in the query's type; and the logsumexp of each row, (B, H, Lq, 1) in float32, in the
        base that `call` uses, +inf for rows that see nothing.
    """
    chain: list[mx.array] = []

    def one(heads: Heads) -> list[mx.array]:
        parts = [_row_block(q, k, v, call, heads, rows, chain) for rows in blocks_of(q.shape[2], call.blocks.rows)]
        return [join(list(column), 2) for column in zip(*parts, strict=True)]

    output, logsumexp = over_heads(q, k, call.blocks, one)
    return output, logsumexp


def over_heads(q: mx.array, k: mx.array, blocks: Blocks, one: Callable[[Heads], list[mx.array]]) -> list[mx.array]:
    """Runs over all groups of heads and joins what each gives along heads, then along sequences."""
    group = q.shape[1] // k.shape[1]
    bands = []
    for batches in blocks_of(q.shape[0], blocks.batches):
        made = [one(Heads(batches, kv_heads, group)) for kv_heads in blocks_of(k.shape[1], blocks.kv_heads)]
        bands.append([join(list(column), 1) for column in zip(*made, strict=True)])
    return [join(list(column), 0) for column in zip(*bands, strict=True)]


def blocks_of(length: int, size: int) -> Iterator[range]:
    """Cuts 0..length into runs of `size`, the last one shorter."""
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def key_blocks(call: Call, rows: range, seq: int, kv_seq: int) -> Iterator[range]:
    """The blocks of keys that some of the rows may see."""
    seen = call.mask.visible_keys(rows, seq, kv_seq)
    return (range(seen.start + b.start, seen.start + b.stop) for b in blocks_of(len(seen), call.blocks.keys))


def _row_block(
    q: mx.array, k: mx.array, v: mx.array, call: Call, heads: Heads, rows: range, chain: list[mx.array]
) -> tuple[mx.array, mx.array]:
    state: Online | None = None
    for keys in key_blocks(call, rows, q.shape[2], k.shape[2]):
        query, key, value = after(chain, heads.rows(q, rows), heads.keys(k, keys), heads.keys(v, keys))
        scores, _ = tile_scores(query, call.transposed(key), call, heads, rows, keys, (q.shape[2], k.shape[2]))
        state = _absorb(state, scores, call.operand(value), call)
        chain[:] = [state.output, state.total]
    if state is None:  # the mask rules out every key
        shape = (len(heads.batches), len(heads.kv_heads) * heads.group, len(rows))
        return mx.zeros((*shape, v.shape[3]), q.dtype), mx.full((*shape, 1), mx.inf)
    blind = state.total == 0
    output = (state.output / mx.where(blind, 1.0, state.total)).astype(q.dtype)
    logsumexp = mx.where(blind, mx.inf, state.top + call.log(state.total))
    chain[:] = [output, logsumexp]
    return heads.split(output, len(rows)), heads.split(logsumexp, len(rows))


def _absorb(state: Online | None, scores: mx.array, value: mx.array, call: Call) -> Online:
    """Takes one more block of keys into the running softmax."""
    scores = scores.astype(mx.float32)
    top = scores.max(axis=-1, keepdims=True)
    if state is not None:
        top = mx.maximum(top, state.top)
    top = mx.where(mx.isinf(top), 0.0, top)  # a row that has seen nothing yet: -inf minus 0 is no NaN
    weights = call.power(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    output = (weights.astype(value.dtype) @ value).astype(mx.float32)
    if state is None:
        return Online(top, total, output)
    shrink = call.power(state.top - top)
    return Online(top, state.total * shrink + total, state.output * shrink + output)


def tile_scores(
    query: mx.array, key_t: mx.array, call: Call, heads: Heads, rows: range, keys: range, lengths: tuple[int, int]
) -> tuple[mx.array, mx.array | None]:
    """The masked scores of one tile, as exponents of the base in use; and tanh of the capped ones, for the gradient."""
    capped = None
    factor = call.scale * call.base2 if call.softcap is None else call.scale / call.softcap
    scores = (call.operand(query) * factor) @ key_t
    if call.softcap is not None:
        capped = mx.tanh(scores)
        scores = capped * (call.softcap * call.base2)
    return _masked(scores, call, heads, rows, keys, lengths), capped


def _masked(scores: mx.array, call: Call, heads: Heads, rows: range, keys: range, lengths: tuple[int, int]) -> mx.array:
    tile = call.mask.tile(rows, keys, *lengths)
    if call.mask.array is not None:
        given = masks.part(masks.as_4d(call.mask.array), cut(heads.batches), heads.heads, cut(rows), cut(keys))
        tile = masks.combine(tile, given)
    if tile is None:
        return scores
    shape = (len(heads.batches), len(heads.kv_heads) * heads.group, len(rows), len(keys))
    return masks.apply(scores.reshape(shape), tile, call.base2).reshape(scores.shape)


def after(chain: list[mx.array], *arrays: mx.array) -> list[mx.array]:
    """The arrays, not to be computed with before those of the chain are there."""
    return mx.depends(list(arrays), chain) if chain else list(arrays)


def join(parts: list[mx.array], axis: int) -> mx.array:
    """Puts parts one after the other; a single one is left as it is."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def cut(run: range) -> slice:
    """The slice of a run."""
    return slice(run.start, run.stop)
