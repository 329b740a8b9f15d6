"""Attention masks: which keys each query attends to, and operations on masks."""

from typing import TYPE_CHECKING

from msgspec import Struct, structs

from attention.errors import UsageError
from attention.workload import DTYPES, Workload

if TYPE_CHECKING:
    import mlx.core as mx

Shape = tuple[int, int, int, int]


class Mask(Struct, frozen=True, kw_only=True, eq=False):
    """The keys each query attends to: the intersection of all parts that are given.

    Query row i of Lq has position i + Lk - Lq among the Lk keys (lower-right alignment).
    """

    causal: bool = False
    """A query attends to no key after its own position."""
    window: int | None = None
    """A query attends to the last `window` keys up to its own position; implies causal."""
    array: "mx.array | None" = None
    """Broadcastable to (B, H, Lq, Lk): bool, True where a query attends to a key, or added to the scores."""

    def __post_init__(self) -> None:
        """Reshape an array of fewer than two axes to the axes of queries and keys."""
        if self.array is not None and self.array.ndim < 2:
            structs.force_setattr(self, "array", self.array.reshape((1,) * (2 - self.array.ndim) + self.array.shape))

    def having(self, array: "list[mx.array]") -> "Mask":
        """Return the mask with its array replaced, if it has one."""
        return structs.replace(self, array=array[0]) if array else self

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

    def cuts(self, rows: range, keys: range, seq: int, kv_seq: int) -> bool:
        """Return whether positions mask any pair of a tile."""
        if not self.positional or not rows or not keys:
            return False
        first, last = rows.start + kv_seq - seq, rows.stop - 1 + kv_seq - seq
        return keys.stop - 1 > first or (self.window is not None and keys.start <= last - self.window)

    def tile(self, rows: range, keys: range, seq: int, kv_seq: int) -> "mx.array | None":
        """Return the positional mask of one tile: bool (len(rows), len(keys)), or None if nothing is masked."""
        import mlx.core as mx

        if not self.cuts(rows, keys, seq, kv_seq):
            return None
        position = mx.arange(rows.start + kv_seq - seq, rows.stop + kv_seq - seq)[:, None]
        key = mx.arange(keys.start, keys.stop)[None]
        seen = key <= position
        return seen if self.window is None else seen & (key > position - self.window)

    def blind_rows(self, seq: int, kv_seq: int) -> int:
        """Return the number of leading query rows before the first key, which are fully masked."""
        return max(0, seq - kv_seq) if self.positional else 0

    def whole(self, seq: int, kv_seq: int) -> "mx.array | None":
        """Return all parts as one array that broadcasts to (B, H, Lq, Lk), bool or additive; None if all is visible."""
        return combine(self.tile(range(seq), range(kv_seq), seq, kv_seq), self.array)


def of_workload(workload: Workload) -> Mask:
    """Return the mask of a workload."""
    return Mask(causal=workload.causal, window=workload.window)


def combine(allowed: "mx.array | None", array: "mx.array | None") -> "mx.array | None":
    """Combine a bool array with a bool or additive one of a broadcastable shape; None masks nothing."""
    import mlx.core as mx

    if allowed is None or array is None:
        return allowed if array is None else array
    return allowed & array if array.dtype == mx.bool_ else mx.where(allowed, array, mx.array(-mx.inf, array.dtype))


def apply(scores: "mx.array", mask: "mx.array | None", factor: float = 1.0) -> "mx.array":
    """Apply a bool mask (-inf where False) or add an additive mask times a factor, in the scores' dtype."""
    import mlx.core as mx

    if mask is None:
        return scores
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
    return scores + in_type(mask, scores.dtype, factor)


def in_type(mask: "mx.array", dtype: "mx.Dtype", factor: float = 1.0) -> "mx.array":
    """Convert an additive mask times a factor to a dtype; finite values stay finite, so that -1e9 masks no row fully.

    Values are clipped to half of the dtype's range, so that a score can be added. In float32 and bfloat16 only scores
    beyond 1e31 would need that.
    """
    import mlx.core as mx

    if mask.dtype == dtype != mx.float16 and factor == 1.0:
        return mask
    most = float(mx.finfo(dtype).max) / 2
    clipped = mx.clip(mask.astype(mx.float32), -most / factor, most / factor) * factor
    return mx.where(mx.isinf(mask), mask, clipped).astype(dtype)


def sighted(mask: "mx.array") -> "mx.array":
    """Return which rows of a bool or additive mask are not fully masked: bool, the last axis kept with length 1."""
    import mlx.core as mx

    if mask.dtype == mx.bool_:
        return mask.any(axis=-1, keepdims=True)
    return mask.max(axis=-1, keepdims=True) > -mx.inf


def open_blind(mask: "mx.array", seeing: "mx.array") -> "mx.array":
    """Unmask fully masked rows so that their softmax is finite; the caller sets their output to 0."""
    import mlx.core as mx

    if mask.dtype == mx.bool_:
        return mask | ~seeing
    return mx.where(seeing, mask, mx.zeros((), mask.dtype))


def part(array: "mx.array", batches: slice, heads: slice, rows: slice, keys: slice) -> "mx.array":
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
