"""What a query may see: the meaning of every mask, in one place."""

from typing import TYPE_CHECKING

from msgspec import Struct, structs

from attention.errors import UsageError
from attention.workload import DTYPES, Workload

if TYPE_CHECKING:
    import mlx.core as mx

Shape = tuple[int, int, int, int]


class Mask(Struct, frozen=True, kw_only=True, eq=False):
    """Which keys each query attends to. All parts that are given must let a pair through.

    Query row i of Lq stands at position i + Lk - Lq among the Lk keys (lower-right alignment).
    """

    causal: bool = False
    """A query sees no key after its own position."""
    window: int | None = None
    """A query sees only the last `window` keys that end at its own position; implies causal."""
    array: "mx.array | None" = None
    """Broadcastable to (B, H, Lq, Lk): bool, True where a pair may be seen, or numbers that are added to the scores."""

    def __post_init__(self) -> None:
        """Gives an array of fewer axes the two of queries and keys."""
        if self.array is not None and self.array.ndim < 2:
            structs.force_setattr(self, "array", self.array.reshape((1,) * (2 - self.array.ndim) + self.array.shape))

    def having(self, array: "list[mx.array]") -> "Mask":
        """Returns the same mask with another array in it, if there is one."""
        return structs.replace(self, array=array[0]) if array else self

    @property
    def positional(self) -> bool:
        """Whether positions alone rule pairs out."""
        return self.causal or self.window is not None

    def visible_keys(self, rows: range, seq: int, kv_seq: int) -> range:
        """The smallest run of keys that holds every key some of the rows may see by their positions; may be empty."""
        if not self.positional or not rows:
            return range(kv_seq if rows else 0)
        shift = kv_seq - seq
        stop = max(0, min(rows.stop + shift, kv_seq))
        start = 0 if self.window is None else max(0, rows.start + shift - self.window + 1)
        return range(min(start, stop), stop)

    def cuts(self, rows: range, keys: range, seq: int, kv_seq: int) -> bool:
        """Whether positions rule out any pair of a tile."""
        if not self.positional or not rows or not keys:
            return False
        first, last = rows.start + kv_seq - seq, rows.stop - 1 + kv_seq - seq
        return keys.stop - 1 > first or (self.window is not None and keys.start <= last - self.window)

    def tile(self, rows: range, keys: range, seq: int, kv_seq: int) -> "mx.array | None":
        """The positional part for one tile: bool (len(rows), len(keys)), or None where every pair is let through."""
        import mlx.core as mx

        if not self.cuts(rows, keys, seq, kv_seq):
            return None
        position = mx.arange(rows.start + kv_seq - seq, rows.stop + kv_seq - seq)[:, None]
        key = mx.arange(keys.start, keys.stop)[None]
        seen = key <= position
        return seen if self.window is None else seen & (key > position - self.window)

    def blind_rows(self, seq: int, kv_seq: int) -> int:
        """How many leading query rows stand before the first key and so see nothing."""
        return max(0, seq - kv_seq) if self.positional else 0

    def whole(self, seq: int, kv_seq: int) -> "mx.array | None":
        """All parts as one array, broadcastable to (B, H, Lq, Lk), bool or additive; None where all is seen."""
        return combine(self.tile(range(seq), range(kv_seq), seq, kv_seq), self.array)


def of_workload(workload: Workload) -> Mask:
    """The mask that a workload names."""
    return Mask(causal=workload.causal, window=workload.window)


def combine(allowed: "mx.array | None", array: "mx.array | None") -> "mx.array | None":
    """Joins a bool array with a bool or additive one of a shape that broadcasts with it; None lets all through."""
    import mlx.core as mx

    if allowed is None or array is None:
        return allowed if array is None else array
    return allowed & array if array.dtype == mx.bool_ else mx.where(allowed, array, mx.array(-mx.inf, array.dtype))


def apply(scores: "mx.array", mask: "mx.array | None", factor: float = 1.0) -> "mx.array":
    """Hides what a bool mask rules out (-inf), or adds an additive mask times a factor, in the scores' type."""
    import mlx.core as mx

    if mask is None:
        return scores
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
    return scores + in_type(mask, scores.dtype, factor)


def in_type(mask: "mx.array", dtype: "mx.Dtype", factor: float = 1.0) -> "mx.array":
    """An additive mask times a factor in a type; finite numbers stay finite, so that -1e9 blinds no row.

    Numbers are clipped to half of the type's range, so that a score can be added to them. In float32 and bfloat16 only
    scores beyond 1e31 would need that.
    """
    import mlx.core as mx

    if mask.dtype == dtype != mx.float16 and factor == 1.0:
        return mask
    most = float(mx.finfo(dtype).max) / 2
    clipped = mx.clip(mask.astype(mx.float32), -most / factor, most / factor) * factor
    return mx.where(mx.isinf(mask), mask, clipped).astype(dtype)


def sighted(mask: "mx.array") -> "mx.array":
    """The rows of a bool or additive mask that see any key at all: bool, the last axis kept with length 1."""
    import mlx.core as mx

    if mask.dtype == mx.bool_:
        return mask.any(axis=-1, keepdims=True)
    return mask.max(axis=-1, keepdims=True) > -mx.inf


def open_blind(mask: "mx.array", seeing: "mx.array") -> "mx.array":
    """Lets blind rows see everything, so that a softmax over them is no NaN; their output is then set to 0."""
    import mlx.core as mx

    if mask.dtype == mx.bool_:
        return mask | ~seeing
    return mx.where(seeing, mask, mx.zeros((), mask.dtype))


def part(array: "mx.array", batches: slice, heads: slice, rows: slice, keys: slice) -> "mx.array":
    """Cuts a 4-D mask to one tile; an axis of length 1 is broadcast and stays whole."""
    wanted = (batches, heads, rows, keys)
    return array[tuple(cut if size > 1 else slice(None) for cut, size in zip(wanted, array.shape, strict=True))]


def as_4d(array: "mx.array") -> "mx.array":
    """The same mask with leading axes of length 1 up to four."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim < 4 else array


def check_array(array: "mx.array", shape: Shape) -> None:
    """Raises UsageError unless the array is bool, or of a type that queries have, and broadcasts to (B, H, Lq, Lk)."""
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
    """The name of a type as workloads have it: "float16"."""
    return str(dtype).removeprefix("mlx.core.")
