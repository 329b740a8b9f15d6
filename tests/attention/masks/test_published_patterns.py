"""Ten published patterns, as functions of (b, h, q, k) and as a dense mask by a definition of their own."""

import mlx.core as mx
import numpy as np
import pytest

from attention import attention, masks

SHAPE = BATCH, HEADS, ROWS, KEYS = 2, 2, 160, 160
Q, K = np.arange(ROWS)[:, None], np.arange(KEYS)[None]
IDS = np.repeat([0, 1, 2, 3], [50, 30, 60, 20])
GLOBAL = np.isin(np.arange(KEYS), [0, 31, 77])
RANDOM_KEYS = np.random.default_rng(0).random((10, 10)) < 0.2
TREE = np.array([-1, 0, 0, 1, 1, 2, 3, 3, 5, 6])
"""Parent of each drafted token; the tokens before them are the common past."""
WIDTH = 16
LENGTHS = np.array([160, 90])


def ancestors() -> np.ndarray:
    seen = np.eye(len(TREE), dtype=bool)
    for node, parent in enumerate(TREE):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


PAST = KEYS - len(TREE)
RELATED = np.pad(ancestors(), (PAST, 0))


def of_tree() -> np.ndarray:
    seen = np.where(K < PAST, K <= Q, RELATED)
    return np.where(Q < PAST, K <= Q, seen)


def neighbours() -> np.ndarray:
    row, column = np.divmod(np.arange(ROWS), WIDTH)
    return (np.abs(row[:, None] - row) <= 2) & (np.abs(column[:, None] - column) <= 3)


def padded() -> np.ndarray:
    return np.stack([(n > Q) & (n > K) & (K <= Q) for n in LENGTHS])[:, None]


def packed_with_padding() -> np.ndarray:
    ids = np.where(np.arange(KEYS) < 140, IDS, -1)
    return (ids[:, None] == ids) & (ids[:, None] >= 0) & (K <= Q)


def mx_of(table: np.ndarray) -> mx.array:
    return mx.array(table)


ids, is_global, random_keys, related, lengths = map(mx_of, (IDS, GLOBAL, RANDOM_KEYS, RELATED, LENGTHS))
PATTERNS = {
    "window and prefix": (lambda b, h, q, k: (k < 4) | ((q >= k) & (q - k < 24)), (K < 4) | ((Q >= K) & (Q - K < 24))),
    "document causal": (lambda b, h, q, k: (ids[q] == ids[k]) & (k <= q), (IDS[:, None] == IDS) & (K <= Q)),
    "prefix LM": (lambda b, h, q, k: (k <= q) | (k < 40), (K <= Q) | (K < 40)),
    "dilated": (
        lambda b, h, q, k: (k <= q) & ((q - k) % 4 == 0) & (q - k < 64),
        (K <= Q) & ((Q - K) % 4 == 0) & (Q - K < 64),
    ),
    "Longformer": (
        lambda b, h, q, k: (mx.abs(q - k) <= 12) | is_global[q] | is_global[k],
        (np.abs(Q - K) <= 12) | GLOBAL[:, None] | GLOBAL,
    ),
    "BigBird": (
        lambda b, h, q, k: (mx.abs(q // 16 - k // 16) <= 1) | (q < 16) | (k < 16) | random_keys[q // 16, k // 16],
        (np.abs(Q // 16 - K // 16) <= 1) | (Q < 16) | (K < 16) | np.repeat(np.repeat(RANDOM_KEYS, 16, 0), 16, 1),
    ),
    "padding of PagedAttention": (lambda b, h, q, k: (q < lengths[b]) & (k < lengths[b]) & (k <= q), padded()),
    "tree of drafts": (lambda b, h, q, k: mx.where((k < PAST) | (q < PAST), k <= q, related[q, k]), of_tree()),
    "natten in two dimensions": (
        lambda b, h, q, k: (mx.abs(q // WIDTH - k // WIDTH) <= 2) & (mx.abs(q % WIDTH - k % WIDTH) <= 3),
        neighbours(),
    ),
    "packing with padding": (
        lambda b, h, q, k: (ids[q] == ids[k]) & (q < 140) & (k < 140) & (k <= q),
        packed_with_padding(),
    ),
}
VALUES = {
    "window and prefix": masks.window(24) | masks.prefix(4),
    "document causal": masks.causal() & masks.documents([50, 30, 60, 20]),
    "prefix LM": masks.causal() | masks.prefix(40),
    "dilated": masks.dilated(16, 4),
    "packing with padding": masks.causal() & masks.documents(ids=np.where(np.arange(KEYS) < 140, IDS, -1)),
}
"""The same as values where there are such."""


@pytest.mark.parametrize("name", PATTERNS)
def test_a_published_pattern_is_its_dense_mask(name):
    function, seen = PATTERNS[name]
    lists = masks.where(function).block_list(SHAPE, 32, 32)
    whole = np.broadcast_to(seen, SHAPE)
    np.testing.assert_array_equal(np.broadcast_to(lists.dense(), SHAPE), whole)
    assert lists.pairs == whole.sum()
    q, k, v = (mx.random.normal((BATCH, HEADS, ROWS, 16), key=mx.random.key(n)) for n in range(3))
    expected = attention(q, k, v, mask=mx.array(whole), implementation="baseline")
    found = attention(q, k, v, mask=masks.where(function))
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_its_published_pattern(name):
    np.testing.assert_array_equal(np.broadcast_to(np.array(VALUES[name].dense(SHAPE)), SHAPE)[0, 0], PATTERNS[name][1])
