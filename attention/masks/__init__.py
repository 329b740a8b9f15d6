"""What a query may see: masks as values (`causal()`, `window(n)`, `documents(...)`, ...) and the mask of a call."""

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct, structs

from attention.core.errors import UnsupportedError, UsageError
from attention.core.mask_text import BLOCK, MaskSpec, block_count, draw_blocks
from attention.core.workload import DTYPES, Workload
from attention.masks.block_list import BlockList, MlxArray
from attention.masks.parts import band
from attention.masks.pattern import LONGEST, Pattern, Shape
from attention.masks.patterns import (
    blocks,
    causal,
    dilated,
    documents,
    padding,
    prefix,
    where,
    window,
)

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "LONGEST",
    "Alibi",
    "BlockList",
    "Mask",
    "Pattern",
    "Shape",
    "alibi",
    "blocks",
    "causal",
    "dilated",
    "documents",
    "padding",
    "prefix",
    "where",
    "window",
]
MAX_SLOPE: Final = 1e28
"""Largest magnitude of a slope of `alibi`: its product with any distance of int32 positions is finite in float32."""
SHIFTED: Final = (2.0**10, 2.0**30)
"""Range of magnitudes of a row's maximum that `shift` subtracts from an additive mask."""


class Mask(Struct, frozen=True, kw_only=True, eq=False):
    """The keys each query attends to: the intersection of all parts that are given.

    Query row i of Lq has position i + Lk - Lq among the Lk keys (lower-right alignment).
    """

    causal: bool = False
    """A query attends to no key after its own position."""
    window: int | None = None
    """A query attends to the last `window` keys up to its own position; implies causal."""
    array: MlxArray | None = None
    """Broadcastable to (B, H, Lq, Lk): bool, True where a query attends to a key, or added to the scores."""
    pattern: Pattern | None = None
    """The complete positional mask, if it is more than causal or a window, which are then unset."""
    alibi: MlxArray | None = None
    """Slopes (H,), float32: slope * (key - position of the query) is added to the scaled and capped scores."""

    def __post_init__(self) -> None:
        """Reshape an array of fewer than two axes to the axes of queries and keys."""
        if self.array is not None and self.array.ndim < 2:
            structs.force_setattr(self, "array", self.array.reshape((1,) * (2 - self.array.ndim) + self.array.shape))

    @property
    def arrays(self) -> "list[mx.array]":
        """The arrays of the mask: that of four axes, and the slopes; those that there are."""
        array = [] if self.array is None else [as_4d(self.array)]
        return array if self.alibi is None else [*array, self.alibi]

    def with_arrays(self, arrays: "list[mx.array]") -> "Mask":
        """Return the mask with its `arrays` replaced, so that a transformation can pass its own."""
        if not arrays:
            return self
        array = None if self.array is None else arrays[0]
        return structs.replace(self, array=array, alibi=None if self.alibi is None else arrays[-1])

    @property
    def bounds_only(self) -> bool:
        """Whether the mask is none, causal or a window: no array, pattern or bias."""
        return self.array is None and self.pattern is None and self.alibi is None

    @property
    def positional(self) -> bool:
        """Whether the mask depends on positions (causal or window)."""
        return self.causal or self.window is not None

    def visible_keys(self, rows: range, seq: int, kv_seq: int) -> range:
        """Return the smallest range of keys that contains all keys visible to the rows by position; may be empty."""
        if not self.positional or not rows:
            return range(kv_seq if rows else 0)
        shift = kv_seq - seq
        stop = max(0, min(rows.stop + shift, kv_seq))
        start = 0 if self.window is None else max(0, rows.start + shift - self.window + 1)
        return range(min(start, stop), stop)

    def masks_any(self, rows: range, keys: range, seq: int, kv_seq: int) -> bool:
        """Return whether positions mask any pair of a tile."""
        if not self.positional or not rows or not keys:
            return False
        first, last = rows.start + kv_seq - seq, rows.stop - 1 + kv_seq - seq
        return keys.stop - 1 > first or (self.window is not None and keys.start <= last - self.window)

    def tile(self, rows: range, keys: range, seq: int, kv_seq: int) -> "mx.array | None":
        """Return the positional mask of one tile: bool (len(rows), len(keys)), or None if nothing is masked."""
        import mlx.core as mx

        if not self.masks_any(rows, keys, seq, kv_seq):
            return None
        position = mx.arange(rows.start + kv_seq - seq, rows.stop + kv_seq - seq)[:, None]
        key = mx.arange(keys.start, keys.stop)[None]
        seen = key <= position
        return seen if self.window is None else seen & (key > position - self.window)

    def empty_rows(self, seq: int, kv_seq: int) -> int:
        """Return the number of leading query rows before the first key, which are fully masked by causal or window."""
        return max(0, seq - kv_seq) if self.positional else 0

    def materialize(self, seq: int, kv_seq: int) -> "mx.array | None":
        """Return bounds and array as one array that broadcasts to (B, H, Lq, Lk); None if all is visible.

        Raises:
            UnsupportedError: there is a pattern or a bias, for which `dense` needs batch and heads too.
        """
        if self.pattern is not None or self.alibi is not None:
            raise UnsupportedError("mask: its dense form depends on the whole shape of the scores")
        return combine(self.tile(range(seq), range(kv_seq), seq, kv_seq), self.array)

    def dense(self, shape: Shape) -> "mx.array | None":
        """Return all parts but the bias as one array that broadcasts to (B, H, Lq, Lk), bool or additive, or None."""
        seq, kv_seq = shape[2:]
        if self.pattern is not None:
            return combine(self.pattern.dense(shape), self.array)
        return combine(self.tile(range(seq), range(kv_seq), seq, kv_seq), self.array)


class Alibi(Struct, frozen=True, eq=False):
    """The value of `alibi(slopes)`."""

    slopes: MlxArray
    """(H,), float32."""

    def __repr__(self) -> str:
        return f"alibi({self.slopes.shape[0]} slopes)"


def alibi(slopes: "mx.array | Sequence[float]") -> Alibi:
    """Return a bias for `attention(..., score_mod=)`: slope[h] * (key - position of the query) is added to the scores.

    The scores are scaled and capped before. Slopes are constants: they get no gradient.

    Args:
        slopes: one finite number per query head, (H,). The values of an MLX array are not checked, as reading them
            would wait for the device: a head whose slope is NaN or infinite has NaN as its output.

    Raises:
        UsageError: it is not one axis of finite numbers.
    """
    import mlx.core as mx

    if not isinstance(slopes, mx.array):
        try:
            numbers = np.array([float(slope) for slope in slopes])
        except (TypeError, ValueError) as error:
            raise UsageError(f"score_mod: alibi got slopes {slopes!r}; it takes one number per head") from error
        bad = numbers[~(np.abs(numbers) <= MAX_SLOPE)]
        if bad.size:
            raise UsageError(f"score_mod: alibi got a slope of {bad[0]:g}; it takes numbers to {MAX_SLOPE:g}")
        return Alibi(mx.array(numbers.astype(np.float32)))  # evaluated: threads may share it
    if slopes.ndim != 1 or not mx.issubdtype(slopes.dtype, mx.floating):
        raise UsageError(
            f"score_mod: alibi got slopes of {dtype_name(slopes.dtype)}, shape {tuple(slopes.shape)}; "
            "it takes one number per head"
        )
    return Alibi(mx.stop_gradient(slopes.astype(mx.float32)))


def alibi_bias(slopes: "mx.array", rows: range, keys: range, seq: int, kv_seq: int) -> "mx.array":
    """Return slope * (key - position) of a tile: (1, heads, len(rows), len(keys)), float32."""
    import mlx.core as mx

    position = mx.arange(rows.start + kv_seq - seq, rows.stop + kv_seq - seq, dtype=mx.float32)[:, None]
    distance = mx.arange(keys.start, keys.stop, dtype=mx.float32)[None] - position
    return slopes[None, :, None, None] * distance


def scores_shape(q: "mx.array", k: "mx.array") -> Shape:
    """Return (B, H, Lq, Lk) of a query and a key."""
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


def of_pattern(pattern: Pattern) -> Mask:
    """Return the mask of a call with a pattern; causal and windows become bounds."""
    reach = band(pattern)
    if reach is None:
        return Mask(pattern=pattern)
    return Mask(causal=True) if reach == 0 else Mask(window=reach)


def of_workload(workload: Workload) -> Mask:
    """Return the mask of a workload: a pattern if it is structured, else bounds.

    Raises:
        UsageError: it is a program's own mask, of which only the density is known.
    """
    if workload.mask_spec.pattern is not None:
        raise UsageError(f"mask: got {workload.mask!r}, a program's own mask; only the program can make it")
    if not workload.structured:
        return Mask(causal=workload.causal, window=workload.window)
    return of_pattern(pattern_of(workload.mask_spec, workload.seq, workload.kv_seq, workload.heads))


@lru_cache(maxsize=64)
def pattern_of(spec: MaskSpec, seq: int, kv_seq: int, heads: int) -> Pattern:
    """Return the pattern of a mask string's parts, of which there is at least one."""
    parts: list[Pattern] = []
    if spec.prefix:
        parts.append(prefix(spec.prefix))
    if spec.causal:
        parts.append(causal())
    if spec.documents:
        whole, rest = divmod(kv_seq, spec.documents)
        parts.append(causal() & documents([spec.documents] * whole + [rest] * bool(rest)))
    if spec.window:
        parts.append(window(spec.window))
    if spec.strided:
        parts.append(dilated(*spec.strided))
    if spec.blocks:
        array = np.zeros((1, heads, block_count(seq), block_count(kv_seq)), np.bool_)
        for head in range(heads):
            choice = np.array(draw_blocks(spec.blocks, seq, kv_seq, head))
            np.put_along_axis(array[0, head], choice, values=True, axis=1)
        parts.append(blocks(array, BLOCK))
    return reduce(or_, parts)


def combine(allowed: "mx.array | None", array: "mx.array | None") -> "mx.array | None":
    """Combine a bool array with a bool or additive one of a broadcastable shape; None masks nothing.

    `mx.logical_and`, not `&`, which is wrong under `mx.vmap` where one side is mapped and the other is broadcast to it.
    """
    import mlx.core as mx

    if allowed is None or array is None:
        return allowed if array is None else array
    if array.dtype == mx.bool_:
        return mx.logical_and(allowed, array)
    return mx.where(allowed, array, mx.array(-mx.inf, array.dtype))


def apply(scores: "mx.array", mask: "mx.array | None") -> "mx.array":
    """Apply a bool mask (-inf where False) or add an additive mask, in the scores' dtype."""
    import mlx.core as mx

    if mask is None:
        return scores
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array([-mx.inf], scores.dtype))
    return scores + cast_additive(mask, scores.dtype)


def cast_additive(mask: "mx.array", dtype: "mx.Dtype", *, summed: bool = True) -> "mx.array":
    """Convert an additive mask to a dtype; finite values stay finite, so that -1e9 masks no row fully.

    If scores are added in that dtype (`summed`), values are clipped to half of its range, so that a score can be added.
    In float32 and bfloat16 only scores beyond 1e31 would need that. Otherwise the sum is float32's, and values are
    clipped to what it can hold after a factor of log2(e).
    """
    import mlx.core as mx

    if mask.dtype == dtype and (dtype == mx.float32 or summed == (dtype == mx.bfloat16)):
        return mask
    most = float(mx.finfo(dtype).max)
    most = most / 2 if summed else min(most, float(mx.finfo(mx.float32).max) / 4)
    clipped = mx.clip(mask.astype(mx.float32), -most, most)
    return mx.where(mx.isinf(mask), mask, clipped).astype(dtype)


def has_shift(mask: "mx.array") -> bool:
    """Return whether values of an additive mask can exceed what float32 can hold beside a score: not in float16."""
    import mlx.core as mx

    return mask.dtype in (mx.float32, mx.bfloat16)


def shift(top: "mx.array") -> "mx.array":
    """Return what to subtract from each row of an additive mask, which does not change the softmax.

    Next to -1e9, float32 rounds a score to a multiple of 64, and a row that is -1e9 throughout would lose its scores.
    Inputs in half precision, computed in float32, keep them: the row's maximum is subtracted if its magnitude is
    between 2^10 and 2^30. Beyond that float64 loses scores too. float32 inputs are not shifted: as in plain attention,
    their sum with -1e9 is what float32 makes of it, and such a row is the mean of the values.

    Args:
        top: maximum of each row of the mask over the keys that the row may see.
    """
    import mlx.core as mx

    size = mx.abs(top)
    return mx.stop_gradient(mx.where((size > SHIFTED[0]) & (size < SHIFTED[1]), top, mx.zeros((), top.dtype)))


def opened(mask: "mx.array", shifted: bool = False) -> "tuple[mx.array, mx.array]":
    """Return a mask whose softmax is finite in every row, and which rows are not fully masked.

    Fully masked rows are unmasked; the caller sets their output to 0. The second array is bool, the last axis kept with
    length 1.

    Args:
        mask: bool or additive, with all keys of each row.
        shifted: subtract `shift`.
    """
    import mlx.core as mx

    if mask.dtype == mx.bool_:
        seeing = mask.any(axis=-1, keepdims=True)
        return mx.logical_or(mask, mx.logical_not(seeing)), seeing
    top = mask.max(axis=-1, keepdims=True)
    seeing = mx.logical_not(mx.isneginf(top))  # a row with a NaN stays one
    lessened = mask - shift(top) if shifted and has_shift(mask) else mask
    return mx.where(seeing, lessened, mx.zeros((), mask.dtype)), seeing


def mask_tile(array: "mx.array", batches: slice, heads: slice, rows: slice, keys: slice) -> "mx.array":
    """Slice a 4-D mask to one tile; axes of length 1 (broadcast) are not sliced."""
    wanted = (batches, heads, rows, keys)
    return array[tuple(cut if size > 1 else slice(None) for cut, size in zip(wanted, array.shape, strict=True))]


def as_4d(array: "mx.array") -> "mx.array":
    """Return the mask with leading axes of length 1 added up to four."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim < 4 else array


def check_array(array: "mx.array", shape: Shape) -> None:
    """Raise UsageError unless the array is bool or of a supported dtype and broadcasts to (B, H, Lq, Lk)."""
    import mlx.core as mx

    problems = []
    if array.dtype not in (mx.bool_, mx.float32, mx.float16, mx.bfloat16):
        problems.append(
            f"mask: got an array of {dtype_name(array.dtype)}; it takes bool (True is seen), or numbers to add in "
            f"{', '.join(DTYPES)}"
        )
    sizes = (1,) * (4 - array.ndim) + tuple(array.shape)
    if array.ndim > 4 or any(size not in (1, whole) for size, whole in zip(sizes, shape, strict=True)):
        problems.append(
            f"mask: got shape {tuple(array.shape)}; it takes one that broadcasts to (B, H, Lq, Lk) = {shape}"
        )
    if problems:
        raise UsageError(*problems)


def dtype_name(dtype: "mx.Dtype") -> str:
    """Return the name of a dtype as in workloads: "float16"."""
    return str(dtype).removeprefix("mlx.core.")
