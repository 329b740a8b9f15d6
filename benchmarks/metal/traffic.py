"""Global memory traffic and matrix products of a kernel, counted tile by tile for a whole call.

The counts follow the kernels' loops: a row past the end of an array is never read, a fully masked tile is never
loaded, and a mask is read only for pairs that positions leave visible. The block lists themselves are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attention.core.kv_format import Format
from attention.kernels.metal.call import CallParams, CallShape, specialisation
from attention.kernels.metal.tiles import EDGE, LIST_QUERIES, Kind, Tile

Bools = NDArray[np.bool_]
VALUES = 8
"""Neighbouring quantized values that a thread loads."""
WORD = 32
"""Bits of a word of quantized numbers."""


@dataclass
class Traffic:
    """Elements read and written by array, and number of 8 x 8 matrix products."""

    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    products: int = 0
    barriers: int = 0
    """Barriers, summed over all threadgroups."""

    def read(self, name: str, elements: int) -> None:
        """Count elements read of an array."""
        self.reads[name] = self.reads.get(name, 0) + elements

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products."""
        return 2 * EDGE**3 * self.products


def traffic(
    kind: Kind,
    shape: CallShape,
    call: CallParams,
    splits: int = 1,
    span: int | None = None,
    seen: Bools | None = None,
) -> Traffic:
    """Count the traffic of one launch of a kernel.

    Args:
        kind: of the kernel.
        shape: of the arrays.
        call: keywords of the call.
        splits: number of key splits, for a call with few queries.
        span: keys per split.
        seen: visible pairs of the block lists (1 or B, 1 or H, Lq, Lk), if the call has any.
    """
    tile = specialisation(kind, shape, call).tile
    if kind == "backward_key":
        return _of_keys(tile, shape, call, seen)
    return _of_queries(tile, shape, call, splits, span or shape.keys, seen)


def _planes(seen: Bools | None, planes: int) -> list[tuple[Bools | None, int]]:
    """Return the visible pairs of each list plane, and how many of `planes` it is for."""
    if seen is None:
        return [(None, planes)]
    each = seen.reshape(-1, *seen.shape[2:])
    return [(own, planes // len(each)) for own in each]


def _of_queries(tile: Tile, shape: CallShape, call: CallParams, splits: int, span: int, seen: Bools | None) -> Traffic:
    """Count for kernels whose threadgroups own query rows: forward, decode and dQ."""
    found = Traffic()
    packed = tile.kind == "decode"
    planes, rows = (shape.kv_heads, shape.group * shape.queries) if packed else (shape.heads, shape.queries)
    planes *= shape.batch
    # With lists, blocks fill whole tiles: the last may be past the end.
    end = rows if seen is None else -(-rows // LIST_QUERIES) * LIST_QUERIES
    for first in range(0, end, tile.block_q):
        block = range(first, max(first, min(first + tile.block_q, rows)))
        queries = range(shape.queries) if packed else block
        for split in range(splits):
            part = (split * span, split * span + span)
            for own, count in _planes(seen, planes):
                _block_of_queries(found, tile, shape, call, block, queries, count, part, own)
    lines = splits * shape.batch * shape.heads * shape.queries
    if tile.kind == "backward_query":
        found.read("o", lines * shape.head_dim)
        for name in ("lse", "rest"):
            found.read(name, 4 * lines)  # the four lanes of a row each
        found.writes = {"d_q": lines * shape.head_dim, "delta": lines}
    else:
        found.writes = {"o": lines * shape.head_dim, "lse": lines, "rest": lines}
    return found


def _block_of_queries(
    found: Traffic,
    tile: Tile,
    shape: CallShape,
    call: CallParams,
    block: range,
    queries: range,
    planes: int,
    span: tuple[int, int],
    own: Bools | None,
) -> None:
    found.read("q", planes * len(block) * shape.head_dim)
    if tile.kind == "backward_query":
        found.read("d_o", planes * len(block) * shape.head_dim)
        found.products += planes * tile.products_per_block
        found.barriers += planes * tile.barriers_per_block
    if not block:
        return
    for keys in _key_tiles(tile, shape, call, queries, span):
        if not _is_listed(own, queries, keys):
            continue
        if shape.kv_format is None:
            found.read("k", planes * len(keys) * (shape.head_dim + tile.dims_again))
            found.read("v", planes * len(keys) * shape.head_dim)
        else:
            _read_packed(found, "k", "key", shape.kv_format.key, planes * len(keys), shape.head_dim)
            _read_packed(found, "v", "value", shape.kv_format.value, planes * len(keys), shape.head_dim)
        found.products += planes * tile.products_per_tile
        found.barriers += planes * tile.barriers_per_tile
        if call.mask != "none":
            seen = [_seen_by(call, shape, row % shape.queries, keys, own) for row in block]
            found.read("mask", planes * sum(seen))


def _read_packed(found: Traffic, numbers: str, parts: str, form: Format, rows: int, width: int) -> None:
    """Count words, scales and biases of quantized rows, read by a thread for each eight values."""
    bits = [first * form.bits for first in range(0, width, VALUES)]
    found.read(numbers, rows * sum((bit + VALUES * form.bits - 1) // WORD - bit // WORD + 1 for bit in bits))
    found.read(f"{parts}_scales", rows * len(bits))
    if form.has_biases:
        found.read(f"{parts}_biases", rows * len(bits))


def _is_listed(own: Bools | None, queries: range, keys: range) -> bool:
    """Return whether a block has a visible pair, or there are no block lists."""
    return own is None or bool(own[queries.start : queries.stop, keys.start : keys.stop].any())


def _of_keys(tile: Tile, shape: CallShape, call: CallParams, seen: Bools | None) -> Traffic:
    """Count for the dK and dV kernel, whose threadgroups own keys."""
    found = Traffic()
    for key0 in range(0, shape.keys, tile.block_k):
        keys = range(key0, min(key0 + tile.block_k, shape.keys))
        for name in ("k", "v"):
            found.read(name, shape.batch * shape.kv_heads * len(keys) * shape.head_dim)
        blocks = _query_tiles(tile, shape, call, keys)
        each = [(block, *plane) for block in blocks for plane in _planes(seen, shape.batch * shape.heads)]
        for block, own, planes in each:
            if not _is_listed(own, block, keys):
                continue
            for name in ("q", "d_o"):
                found.read(name, planes * len(block) * (shape.head_dim + tile.dims_again))
            for name in ("lse", "rest", "delta"):
                found.read(name, planes * len(block))
            found.products += planes * tile.products_per_tile
            found.barriers += planes * tile.barriers_per_tile
            if call.mask != "none":
                found.read("mask", planes * sum(_seen_by(call, shape, row, keys, own) for row in block))
    made = shape.batch * shape.kv_heads * shape.keys * shape.head_dim
    found.writes = {"d_k": made, "d_v": made}
    return found


def _key_tiles(
    tile: Tile, shape: CallShape, call: CallParams, queries: range, span: tuple[int, int]
) -> Iterator[range]:
    """Yield the key tiles of a query block's loop."""
    shift = shape.keys - shape.queries
    start = 0 if call.window is None else max(0, queries[0] + shift - call.window + 1) // tile.block_k * tile.block_k
    end = min(shape.keys, max(0, queries[-1] + shift + 1)) if call.causal else shape.keys
    for key0 in range(max(start, span[0]), min(end, span[1]), tile.block_k):
        yield range(key0, min(key0 + tile.block_k, shape.keys))


def _query_tiles(tile: Tile, shape: CallShape, call: CallParams, keys: range) -> Iterator[range]:
    """Yield the query tiles of a key block's loop."""
    shift = shape.keys - shape.queries
    start = max(0, keys[0] - shift) // tile.block_q * tile.block_q if call.causal else 0
    end = shape.queries if call.window is None else min(shape.queries, keys[-1] - shift + call.window)
    for query0 in range(start, end, tile.block_q):
        yield range(query0, min(query0 + tile.block_q, shape.queries))


def _seen_by(call: CallParams, shape: CallShape, query: int, keys: range, own: Bools | None) -> int:
    """Return how many of the keys are visible to a query by position."""
    if own is not None:
        return int(own[query, keys.start : keys.stop].sum())
    position = query + shape.keys - shape.queries
    stop = min(keys.stop, position + 1) if call.causal else keys.stop
    start = keys.start if call.window is None else max(keys.start, position - call.window + 1)
    return max(0, stop - start)
