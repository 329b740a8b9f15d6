"""Functions that make masks as values, with checks of their arguments.

Query row i of Lq has position i + Lk - Lq among the Lk keys (rows and keys are aligned at their ends), so with a cache
of earlier keys the last row is the last key. With more rows than keys the first rows have negative positions.
"""

from collections.abc import Sequence
from typing import Final, Literal, cast

import numpy as np

from attention.core.errors import UsageError
from attention.masks.parts import (
    Blocks,
    Causal,
    Dilated,
    Documents,
    Groups,
    Padding,
    Prefix,
    Visible,
    Where,
    Window,
    shown_numbers,
)
from attention.masks.pattern import DEFAULT_BLOCK, LONGEST, Pattern, Table
from attention.masks.tiles import Array

TAKEN: Final = {
    (0, 1): "a whole number or a list of them",
    (1,): "a list of whole numbers",
    (1, 2): "a list of whole numbers, or one such list per sequence",
}
"""What a mask takes, by the numbers of axes."""


def causal() -> Pattern:
    """Show each query the keys up to its own position."""
    return Causal()


def window(n: int) -> Pattern:
    """Show each query the last n keys up to its own position: 0 <= q - k < n.

    Raises:
        UsageError: n is not a whole number from 1.
    """
    return Window(min(_whole("window", "n", n), LONGEST))


def prefix(n: int) -> Pattern:
    """Show all queries the first n keys: k < n, whatever the query's position.

    Raises:
        UsageError: n is not a whole number from 1.
    """
    return Prefix(min(_whole("prefix", "n", n), LONGEST))


def dilated(n: int, stride: int) -> Pattern:
    """Show each query n keys up to its own position, `stride` apart: its own, the one `stride` before, and so on.

    Raises:
        UsageError: n or stride is not a whole number from 1.
    """
    count, apart = _whole("dilated", "n", n), min(_whole("dilated", "stride", stride), LONGEST)
    count = min(count, LONGEST // apart + 1)
    return window(count) if apart == 1 else Dilated(count, apart)


def documents(lengths: object = None, *, ids: object = None) -> Pattern:
    """Show each query the keys of its own document, of a sequence that packs several; combine with `causal()`.

    Args:
        lengths: numbers of tokens of the documents in their order, which add up to Lk; or one such list per sequence of
            the batch.
        ids: instead, the document of each position: whole numbers (Lk,) or (B, Lk). Negative is no document: such a
            query sees nothing and such a key is not seen.

    Raises:
        UsageError: neither or both are given, they have the wrong type, or no token.
    """
    if (lengths is None) == (ids is None):
        raise UsageError("mask: documents takes lengths or ids, one of the two")
    if ids is not None:
        return _of_ids(_integers("documents", "ids", ids, (1, 2)))
    rows = (
        list(cast("Sequence[object]", lengths))
        if isinstance(lengths, list | tuple)
        else [*np.atleast_2d(_integers("documents", "lengths", lengths, (1, 2)))]
    )
    nested = bool(rows) and not isinstance(rows[0], int | np.integer)
    each = [_integers("documents", "lengths", row, (1,)) for row in (rows if nested else [rows])]
    for row in each:
        if not row.size or row.min() < 1:
            raise UsageError(
                f"mask: documents got lengths {shown_numbers(row.tolist())}; it takes whole numbers from 1"
            )
    totals = [int(row.sum()) for row in each]
    if len(set(totals)) > 1:
        raise UsageError(f"mask: documents got lengths that add up to {shown_numbers(totals)}; all must add up to Lk")
    flat = np.concatenate(each)
    return Documents(Table(np.concatenate([[0], np.cumsum(flat)])), Table(np.zeros(len(flat), bool)), len(each))


def _of_ids(ids: Array) -> Pattern:
    table = np.atleast_2d(ids)
    if not table.size:
        raise UsageError("mask: documents got no ids; it takes one for each key")
    cut = np.ones(table.shape, bool)
    cut[:, 1:] = table[:, 1:] != table[:, :-1]
    starts = np.flatnonzero(cut)
    of_run, row = table.ravel()[starts], starts // table.shape[1]
    seen = of_run >= 0
    if len(np.unique(np.stack([row[seen], of_run[seen]]), axis=1).T) < seen.sum():
        # renumbered: ids may be larger than int32
        numbers = np.unique(table, return_inverse=True)[1].reshape(table.shape)
        return Groups(Table(np.where(table < 0, -1, numbers).astype(np.int32)))
    return Documents(Table(np.append(starts, table.size)), Table(~seen), len(table))


def padding(lengths: object, side: Literal["left", "right"] = "right") -> Pattern:
    """Show the keys that are no padding, to all queries.

    Args:
        lengths: number of tokens of each sequence of the batch, or one number for all.
        side: where the padding is.

    Raises:
        UsageError: a length is not a whole number from 0; the side is neither.
    """
    if side not in ("left", "right"):
        raise UsageError(f"mask: padding got side {side!r}; it takes 'left' or 'right'")
    found = np.atleast_1d(_integers("padding", "lengths", lengths, (0, 1)))
    if not found.size or found.min() < 0:
        raise UsageError(f"mask: padding got lengths {shown_numbers(found.tolist())}; it takes whole numbers from 0")
    return Padding(tuple(found.tolist()), side)


def blocks(array: object, block: int = DEFAULT_BLOCK) -> Pattern:
    """Show whole blocks of query rows and keys: block (i, j) has rows i * block and up, and keys j * block and up.

    Args:
        array: bool (B or 1, H or 1, ceil(Lq / block), ceil(Lk / block)), or without the leading axes.
        block: rows and keys of a block.

    Raises:
        UsageError: the array is not bool or not of 2 to 4 axes; the block is not a whole number from 1.
    """
    size = min(_whole("blocks", "block", block), LONGEST)
    try:
        found = np.asarray(array)
    except ValueError:  # rows of different lengths
        found = np.asarray(None)
    if found.dtype != bool or not 2 <= found.ndim <= 4 or not found.size:
        raise UsageError(
            f"mask: blocks got an array of {found.dtype} and shape {found.shape}; it takes bool, "
            "(B or 1, H or 1, row blocks, key blocks)"
        )
    return Blocks(Table(found.reshape((1,) * (4 - found.ndim) + found.shape)), size)


def where(f: Visible) -> Pattern:
    """Show the pairs for which a function returns True.

    Args:
        f: f(b, h, q, k) of int32 index arrays that broadcast: batch, head, position of the query, and key; it returns a
            bool array of a shape that they broadcast to, and depends on nothing else. It is evaluated tile by tile when
            the mask is first used with a shape, and the result is kept; two values are equal if they have the same
            function.

    Raises:
        UsageError: it is not a function.
    """
    if not callable(f):
        raise UsageError(f"mask: where got {type(f).__name__}; it takes a function of (b, h, q, k)")
    return Where(f)


def _whole(function: str, name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise UsageError(f"mask: {function} got {name} {value!r}; it takes a whole number from 1")
    return value


def _integers(function: str, name: str, value: object, axes: tuple[int, ...]) -> Array:
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.asarray(None)
    fits = found.dtype != np.uint64 or not found.size or found.max() < 2**63
    if (found.size and found.dtype.kind not in "iu") or found.ndim not in axes or not fits:
        raise UsageError(f"mask: {function} got {name} of {found.dtype}, shape {found.shape}; it takes {TAKEN[axes]}")
    return found.astype(np.int64)
