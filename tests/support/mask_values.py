"""Random masks of `attention.masks`, each with the pairs that it shows by a definition of its own, in numpy."""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from attention import masks
from attention.masks import Pattern

Bools = NDArray[np.bool_]
Shape = tuple[int, int, int, int]
Drawn = tuple[Pattern, Bools]
"""A mask, and the pairs it shows: (B, H, Lq, Lk)."""


def draw(random: Generator, shape: Shape, depth: int = 2) -> Drawn:
    """Draw a mask of up to 2^depth parts for a call of (B, H, Lq, Lk)."""
    if depth == 0 or random.random() < 0.35:
        return DRAWN[random.integers(len(DRAWN))](random, shape)
    (left, seen_left), (right, seen_right) = draw(random, shape, depth - 1), draw(random, shape, depth - 1)
    if random.random() < 0.5:
        return left & right, seen_left & seen_right
    return left | right, seen_left | seen_right


def places(shape: Shape) -> tuple[NDArray[Any], ...]:
    """Return batch, head, position of the query, and key of every pair."""
    b, h, row, k = np.indices(shape, sparse=True)
    return b, h, row + shape[3] - shape[2], k


def whole(seen: NDArray[Any], shape: Shape) -> Bools:
    return np.broadcast_to(seen, shape)


def size(random: Generator, most: int) -> int:
    """Draw a size from 1, often a small one or one at the limit."""
    return int(random.choice([1, 2, max(1, most // 3), most, most + 3, int(random.integers(1, most + 1))]))


def causal(random: Generator, shape: Shape) -> Drawn:
    _, _, q, k = places(shape)
    return masks.causal(), whole(q >= k, shape)


def window(random: Generator, shape: Shape) -> Drawn:
    n, (_, _, q, k) = size(random, shape[3]), places(shape)
    return masks.window(n), whole((q - k >= 0) & (q - k < n), shape)


def prefix(random: Generator, shape: Shape) -> Drawn:
    n, (_, _, _, k) = size(random, shape[3]), places(shape)
    return masks.prefix(n), whole(k < n, shape)


def dilated(random: Generator, shape: Shape) -> Drawn:
    n, stride, (_, _, q, k) = size(random, shape[3]), int(random.integers(1, 9)), places(shape)
    seen = np.zeros(shape, bool)
    for step in range(min(n, shape[3])):
        seen |= q - k == step * stride
    return masks.dilated(n, stride), seen


def lengths_of(random: Generator, total: int) -> list[int]:
    cuts = np.unique(random.integers(1, total, int(random.integers(1, 6)))) if total > 1 else np.zeros(0, int)
    return np.diff([0, *cuts.tolist(), total]).tolist()


def of_documents(random: Generator, shape: Shape) -> Drawn:
    keys = shape[3]
    each = [lengths_of(random, keys) for _ in range(shape[0] if random.random() < 0.4 else 1)]
    seen = np.zeros((len(each), 1, shape[2], keys), bool)
    for b, lengths in enumerate(each):
        start = 0
        for length in lengths:
            for position in range(start, start + length):
                row = position - (keys - shape[2])
                if row >= 0:
                    seen[b, 0, row, start : start + length] = True
            start += length
    return masks.documents(each if len(each) > 1 or random.random() < 0.3 else each[0]), whole(seen, shape)


def of_ids(random: Generator, shape: Shape) -> Drawn:
    ids = random.integers(-1, 4, (shape[0] if random.random() < 0.5 else 1, shape[3]))
    if random.random() < 0.5:
        ids = np.sort(ids, axis=1)[:, ::-1]
    q = places(shape)[2]
    own = np.where(q < 0, -1, ids[:, np.clip(q[0, 0, :, 0], 0, None)][:, None, :, None])
    seen = (own == ids[:, None, None, :]) & (own >= 0)
    return masks.documents(ids=ids if len(ids) > 1 else ids[0]), whole(seen, shape)


def padding(random: Generator, shape: Shape) -> Drawn:
    lengths = random.integers(0, shape[3] + 1, shape[0] if random.random() < 0.6 else 1)
    k, kept = np.arange(shape[3]), lengths[:, None, None, None]
    if random.random() < 0.5:
        return masks.padding(lengths.tolist(), side="left"), whole(k >= shape[3] - kept, shape)
    return masks.padding(lengths), whole(k < kept, shape)


def of_blocks(random: Generator, shape: Shape) -> Drawn:
    block = int(random.choice([1, 16, 48, 64, 128, 200]))
    planes = [n if random.random() < 0.5 else 1 for n in shape[:2]]
    array = random.random((*planes, -(-shape[2] // block), -(-shape[3] // block))) < random.choice([0.1, 0.5, 0.9])
    seen = np.repeat(np.repeat(array, block, axis=2), block, axis=3)[:, :, : shape[2], : shape[3]]
    return masks.blocks(mx.array(array), block), whole(seen, shape)


def where(random: Generator, shape: Shape) -> Drawn:
    n, kind = int(random.integers(2, 90)), int(random.integers(4))
    b, h, q, k = places(shape)
    if kind == 0:
        return masks.where(lambda b, h, q, k: (q + 2 * k) % n < n // 2), whole((q + 2 * k) % n < n // 2, shape)
    if kind == 1:
        return masks.where(lambda b, h, q, k: mx.abs(q - k) <= n), whole(np.abs(q - k) <= n, shape)
    if kind == 2:
        return masks.where(lambda b, h, q, k: (q - k) % (h + 2) == 0), whole((q - k) % (h + 2) == 0, shape)
    return masks.where(lambda b, h, q, k: k // 32 >= b), whole(k // 32 >= b, shape)


DRAWN = (causal, window, prefix, dilated, of_documents, of_ids, padding, of_blocks, where)
