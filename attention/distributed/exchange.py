"""Which keys each rank needs of the others, and the attention calls it makes with them: static, the same on all ranks.

    rank 1 of two, causal, zigzag      keys it needs        0 . . . . . . 5    (its rows are chunks 1 and 2 of 4)
                                       it has                   1 1 2 2
                                       rank 0 contributes   0 0         3 3    all that any other rank needs of it

Every rank contributes the same number of rows (the most that any has to; shorter ones are padded), so that one
all_gather moves them. A rank then puts what it needs in the order of the sequence, its own keys from its own arrays.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from msgspec import Struct

from attention.distributed.layout import ALIGNMENT, Chunk, Layout, rows_of, union
from attention.masks import Pattern
from attention.masks.parts import Chunks, Section, is_aligned

MAX_LISTED_TILES: Final = 1 << 28
"""Tiles of a mask's scores up to which a pattern's needed keys are taken from its list."""


class Seen(Struct, frozen=True):
    """What decides which pairs of a call are visible."""

    planes: tuple[int, int]
    """Batch and query heads."""
    causal: bool = False
    window: int | None = None
    pattern: Pattern | None = None
    array: bool = False
    """There is an array mask as large as the scores."""
    alibi: bool = False
    """Keys are counted from the query's position, so that rows and keys of a call must end together."""


class Call(Struct, frozen=True):
    """An attention call of a rank: some of its rows against a run of the keys that it needs."""

    rows: Chunk
    """Its rows, among the rank's own."""
    keys: Chunk
    """Its keys, among those that the rank needs; empty if its rows see none."""
    row_chunks: Chunks
    """Its rows, as row indices of the sequence."""
    key_chunks: Chunks
    """Its keys, as positions of the sequence."""
    causal: bool = False
    window: int | None = None
    pattern: Pattern | None = None


class Source(Struct, frozen=True):
    """A run of needed keys: rows of a rank's contribution, or of its own keys."""

    rank: int
    start: int
    stop: int


class Exchange(Struct, frozen=True):
    """What every rank contributes, needs, and computes."""

    contributed: tuple[Chunks, ...]
    """Key positions that other ranks need of each rank."""
    needed: tuple[Chunks, ...]
    """Key positions that each rank needs, its own among them."""
    slot: int
    """Rows of a contribution, padded."""
    calls: tuple[tuple[Call, ...], ...]
    owned: tuple[Chunks, ...]
    """Key positions that each rank has."""

    def sources(self, rank: int) -> list[Source]:
        """Return what the keys needed by a rank consist of, in the order of the sequence."""
        runs: list[tuple[int, Source]] = []
        for other in range(len(self.owned)):
            held = self.owned[other] if other == rank else self.contributed[other]
            for start, stop in intersection(self.needed[rank], self.owned[other]):
                first = offset_in(held, start)
                runs.append((start, Source(other, first, first + stop - start)))
        return [source for _, source in sorted(runs, key=lambda run: run[0])]

    def received(self, rank: int) -> int:
        """Return the number of keys that a rank uses of other ranks."""
        return rows_of(self.needed[rank]) - rows_of(intersection(self.needed[rank], self.owned[rank]))


@lru_cache(maxsize=512)
def make_exchange(rows: Layout, keys: Layout, seen: Seen) -> Exchange:
    """Return the exchange of a context parallel call.

    Args:
        rows: layout of the query rows, of which row i has position i + Lk - Lq.
        keys: layout of the keys.
        seen: which pairs are visible.
    """
    ranks, owned = rows.ranks, keys.chunks
    calls = tuple(tuple(_calls(rows, keys.seq, seen, rank)) for rank in range(ranks))
    needed = tuple(union(chunk for call in own for chunk in call.key_chunks) for own in calls)
    placed = tuple(tuple(_placed(call, needed[rank]) for call in calls[rank]) for rank in range(ranks))
    contributed = tuple(
        intersection(owned[rank], union(chunk for other in range(ranks) if other != rank for chunk in needed[other]))
        for rank in range(ranks)
    )
    return Exchange(contributed, needed, max(map(rows_of, contributed)), placed, owned)


def _calls(rows: Layout, kv_seq: int, seen: Seen, rank: int) -> Iterable[Call]:
    """Yield the calls of a rank, their keys not yet placed."""
    chunks = rows.chunks[rank]
    whole = seen.pattern
    if whole is None or seen.array or seen.alibi:
        groups: list[Chunks] = [(chunk,) for chunk in chunks]
    else:
        groups = [chunks] if chunks else []
    first = 0
    for group in groups:
        own = (first, first + rows_of(group))
        first = own[1]
        last = group[-1][1] + kv_seq - rows.seq
        if whole is None:
            seen_keys = _bounds(seen, group[0][0] + kv_seq - rows.seq, last, kv_seq)
            yield Call(own, (0, 0), group, seen_keys, seen.causal and bool(seen_keys), seen.window)
            continue
        lengths = rows.seq, kv_seq
        seen_keys = _listed_keys(whole, (*seen.planes, *lengths), group)
        if seen.alibi and seen_keys:
            seen_keys = ((seen_keys[0][0], max(last, seen_keys[-1][1])),)
        yield Call(own, (0, 0), group, seen_keys, pattern=Section(whole, lengths, group, seen_keys))


def _bounds(seen: Seen, first: int, last: int, kv_seq: int) -> Chunks:
    """Return the keys that rows at positions `first` to `last` see by bounds."""
    if not seen.causal:
        return ((0, kv_seq),)
    low = 0 if seen.window is None else max(0, first - seen.window + 1)
    return ((low, last),) if last > low else ()


def _listed_keys(pattern: Pattern, shape: tuple[int, int, int, int], rows: Chunks) -> Chunks:
    """Return the keys, in whole tiles, that some row of the chunks may see."""
    seq, kv_seq = shape[2:]
    tiles = -(-seq // ALIGNMENT) * -(-kv_seq // ALIGNMENT)
    if not is_aligned(rows, seq, ALIGNMENT) or tiles > MAX_LISTED_TILES:
        return ((0, kv_seq),)
    found = pattern.block_list(shape, ALIGNMENT, ALIGNMENT)
    seen = np.zeros(found.key_tiles, bool)
    for plane in range(found.batches * found.heads):
        for start, stop in rows:
            at = [plane * found.row_tiles + tile for tile in (start // ALIGNMENT, -(-stop // ALIGNMENT))]
            seen[found.entries[found.offsets[at[0]] : found.offsets[at[1]], 0]] = True
    edges = np.flatnonzero(np.diff(seen, prepend=False, append=False)).reshape(-1, 2).tolist()
    return tuple((first * ALIGNMENT, min(kv_seq, last * ALIGNMENT)) for first, last in edges)


def _placed(call: Call, needed: Chunks) -> Call:
    """Return a call with its run of the needed keys."""
    if not call.key_chunks:
        return call
    first = offset_in(needed, call.key_chunks[0][0])
    last = offset_in(needed, call.key_chunks[-1][1] - 1) + 1
    if last - first != rows_of(call.key_chunks):  # other calls of the rank need keys in between
        raise AssertionError("the keys of a call are not adjacent")
    return Call(call.rows, (first, last), call.row_chunks, call.key_chunks, call.causal, call.window, call.pattern)


def tile_costs(pattern: Pattern, shape: tuple[int, int, int, int]) -> list[float]:
    """Return the number of key tiles that each tile of ALIGNMENT rows of a mask visits, in all planes."""
    found = pattern.block_list(shape, ALIGNMENT, ALIGNMENT)
    per_tile = np.diff(found.offsets).reshape(found.batches * found.heads, found.row_tiles).sum(axis=0)
    costs: list[float] = per_tile.astype(float).tolist()
    return costs


def intersection(a: Sequence[Chunk], b: Sequence[Chunk]) -> Chunks:
    """Return what is in both of two lists of ascending disjoint ranges; ranges that touch stay apart."""
    both = ((max(one[0], other[0]), min(one[1], other[1])) for one in a for other in b)
    return tuple(sorted(chunk for chunk in both if chunk[0] < chunk[1]))


def offset_in(chunks: Sequence[Chunk], position: int) -> int:
    """Return the place of a position among those of chunks, one after another."""
    before = 0
    for start, stop in chunks:
        if start <= position < stop:
            return before + position - start
        before += stop - start
    raise ValueError(f"{position} is in none of {chunks}")
