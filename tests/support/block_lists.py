"""Block lists of a dense bool mask, made independently of `attention.masks`; what they leave open is random."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention.masks.block_list import BlockList, BlockLists

Array = NDArray[Any]
BITS = 32


def lists_of(seen: Array, block_q: int, block_k: int, seed: int = 0) -> BlockList:
    """Return the block lists of a bool mask (1 or B, 1 or H, Lq, Lk), True where a pair is visible.

    Bits of rows and keys past the ends are random, and such pairs do not keep a tile from being listed as full.
    Tiles of bits are in random order, the first belongs to no tile, and equal ones are stored once. The list's shape
    and pairs are those of the mask before it is broadcast.
    """
    random = np.random.default_rng(seed)
    batches, heads, queries, keys = seen.shape
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    by_row: list[list[tuple[int, int]]] = [[] for _ in range(batches * heads * rows)]
    by_key: list[list[tuple[int, int]]] = [[] for _ in range(batches * heads * columns)]
    places = iter(random.permutation(len(by_row) * columns) + 1)
    stored: dict[bytes, int] = {}
    bits = random.integers(0, 2**BITS, (len(by_row) * columns + 1, block_q, block_k // BITS), np.uint32)
    for plane, whole in enumerate(seen.reshape(-1, queries, keys)):
        for row in range(rows):
            for column in range(columns):
                tile = whole[row * block_q :][:block_q, column * block_k :][:, :block_k]
                if not tile.any():
                    continue
                place = -1
                if not tile.all():
                    place = stored.get(tile.tobytes(), -1) if tile.shape == (block_q, block_k) else -1
                    if place < 0:
                        place = stored[tile.tobytes()] = int(next(places))
                        bits[place] = _packed(tile, block_q, block_k, random)
                by_row[plane * rows + row].append((column, place))
                by_key[plane * columns + column].append((row, place))
    return BlockList(
        block_q=block_q,
        block_k=block_k,
        batches=batches,
        heads=heads,
        shape=seen.shape,
        rows=_flat(by_row),
        bits=bits,
        pairs=int(seen.sum()),
        _made={"transposed": _flat(by_key)},
    )


def _packed(tile: Array, block_q: int, block_k: int, random: np.random.Generator) -> Array:
    whole = random.random((block_q, block_k)) < 0.5
    whole[: tile.shape[0], : tile.shape[1]] = tile
    return np.packbits(whole, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def _flat(lists: list[list[tuple[int, int]]]) -> BlockLists:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    entries = [entry for entries in lists for entry in entries]
    return BlockLists(offsets, np.array(entries, np.int32).reshape(-1, 2), [])


def random_pairs(shape: tuple[int, int, int, int], block: int = 64, seed: int = 0) -> Array:
    """Return a bool mask whose blocks are empty, full, or a mixture of smaller ones, of which some are random.

    In the first plane the last of three or more blocks of rows, and the second of four or more of keys, are empty.
    """
    random = np.random.default_rng(seed)
    batches, heads, queries, keys = shape
    whole = (batches, heads, -(-queries // block) * block, -(-keys // block) * block)

    def drawn(size: int, *probabilities: float) -> Array:
        cells = random.choice(3, (*whole[:2], whole[2] // size, whole[3] // size), p=probabilities)
        return np.repeat(np.repeat(cells, size, axis=2), size, axis=3)

    coarse, fine = drawn(block, 0.3, 0.25, 0.45), drawn(8, 0.3, 0.3, 0.4)
    medium = drawn(block // 2, 0.3, 0.3, 0.4)
    fine[random.random(whole[:3]) < 0.1] = 0
    fine = np.where(medium == 2, np.where(fine == 2, random.integers(0, 2, whole), fine), medium)
    seen = np.where(coarse == 2, fine, coarse) == 1
    if whole[2] > 2 * block:
        seen[0, 0, -block:] = False
    if whole[3] > 3 * block:
        seen[0, 0, :, block : 2 * block] = False
    return seen[:, :, :queries, :keys]
