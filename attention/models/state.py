"""A model's state between runs: exact copies of its caches, and digests to compare states."""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten

WORDS: Final = {8: mx.uint32, 4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
"""Dtype used to sum an array's bits, by item size in bytes."""


class StateChanged(Exception):
    """A run would start from another state than the first one."""


def copied(cache: Any) -> Any:
    """Return an evaluated copy of mlx-lm's caches that shares no memory with them, bit for bit.

    MLX writes into a buffer that nobody else holds and copies one that is shared: with the arrays themselves
    copied here, a run pays for no copy inside its clock.
    """
    held = {id(value): value for _, value in _leaves(cache, "") if isinstance(value, mx.array)}
    # An operation whose output is never its input's memory, and which keeps every bit.
    fresh = {key: mx.where(mx.array(True), array, array) for key, array in held.items()}
    mx.eval(list(fresh.values()))
    return copy.deepcopy(cache, dict[int, Any](fresh))  # looks up what is copied already by its id


def digest_of_caches(caches: Any) -> str:
    """Return a digest of mlx-lm's caches: their arrays, lengths and positions."""
    return digest(_leaves(caches, ""))


def digest_of_weights(model: Any) -> str:
    """Return a digest of a model's parameters and their names."""
    named: Any = tree_flatten(model.parameters())
    return digest(named)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{name}.{index}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}")
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _leaves(vars(value), f"{name}.{type(value).__name__}")
    else:
        yield name, value


def digest(named: Iterable[tuple[str, object]]) -> str:
    """Return a digest of named arrays and plain values.

    The bits of an array are summed along its last axis, and the sums weighted by their position: one pass over the
    memory on the device that holds it, exact, and not moved by a row that went elsewhere.
    """
    hashed = hashlib.blake2b(digest_size=16)
    sums: list[mx.array] = []
    for name, value in named:
        if isinstance(value, mx.array):
            hashed.update(f"{name} {value.shape} {value.dtype};".encode())
            sums += [_summed(value)] if value.size else []
        else:
            hashed.update(f"{name} {value!r};".encode())
    mx.eval(sums)
    hashed.update(repr([each.item() for each in sums]).encode())
    return hashed.hexdigest()


def _summed(array: mx.array) -> mx.array:
    words = (array.reshape(-1, 1) if array.ndim < 2 else array).view(WORDS[array.dtype.size])
    rows = mx.sum(words, axis=-1).flatten().astype(mx.uint32)
    return mx.sum(rows * (2 * mx.arange(rows.size, dtype=mx.uint32) + 1))
