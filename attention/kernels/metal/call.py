"""The normal form of a call, and which calls the kernels support."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, cast

from attention.core.kv_format import KVFormat, parse_kv_format
from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import Workload
from attention.kernels.common import check_bounds
from attention.kernels.metal.tiles import HEAD_DIMS, SIZES, Kind, Tile, tile_of
from attention.masks import dtype_name

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.quantized_kv import KeyOrValue

MaskKind = Literal["none", "bool", "float32", "float16", "bfloat16"]
"""No mask, a bool one, or the dtype of an additive one."""
FEW_ROWS: Final = 32
"""Maximum number of query rows per key head for which the keys are split and the heads packed."""


@dataclass(frozen=True)
class CallShape:
    """The arrays of a call: q (batch, heads, queries, head_dim), k and v (batch, kv_heads, keys, head_dim)."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    """Of all three, or of q."""
    kv_format: KVFormat | None = None
    """Of quantized keys and values."""

    @property
    def group(self) -> int:
        """Number of query heads per key and value head."""
        return self.heads // self.kv_heads

    @property
    def few(self) -> bool:
        """Whether the call has few enough queries for its keys to be split."""
        return self.group * self.queries <= FEW_ROWS


@dataclass(frozen=True)
class CallParams:
    """The keywords of a call in normal form: a window implies causal, and a window of all keys is dropped."""

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: MaskKind = "none"
    sinks: bool = False
    lists: bool = False
    """Whether block lists name the visible keys, in addition to causal, window and mask."""
    alibi: bool = False

    def splits_keys(self, shape: CallShape) -> bool:
        """Whether the keys are split: there are few queries and no block lists."""
        return shape.few and not self.lists


@dataclass(frozen=True)
class Specialisation:
    """The compile-time constants of one kernel."""

    tile: Tile
    dtype: str
    causal: bool
    window: bool
    softcap: bool
    mask: MaskKind
    sinks: bool
    logsumexp: bool = False
    """For backward kernels: whether the logsumexp has a cotangent."""
    lists: bool = False
    alibi: bool = False
    kv_format: KVFormat | None = None

    @property
    def name(self) -> str:
        """Readable name: "forward float16 D=128 causal window"."""
        flags = {"causal": self.causal and not self.window, "window": self.window, "softcap": self.softcap}
        words = [word for word, on in flags.items() if on]
        words += [f"{self.mask} mask"] if self.mask != "none" else []
        words += ["sinks"] if self.sinks else []
        more = {"logsumexp": self.logsumexp, "block lists": self.lists, "alibi": self.alibi}
        words += [word for word, on in more.items() if on]
        rows = f" {self.tile.block_q} rows" if self.tile.kind == "decode" else ""
        words += [f"{self.kv_format.text} K/V"] if self.kv_format else []
        kind = self.tile.kind.partition("_")[0]  # the two backward kernels are checked together
        return " ".join([f"{kind} {self.dtype} D={self.tile.head_dim}{rows}", *words])


def specialisation(kind: Kind, shape: CallShape, call: CallParams, logsumexp: bool = False) -> Specialisation:
    """Return the specialisation of a kind of kernel for a call; `logsumexp`: it has a cotangent (backward only)."""
    tile = tile_of(kind, shape.head_dim, shape.dtype, shape.group * shape.queries)
    sinks = call.sinks and kind in ("forward", "decode")
    window, softcap = call.window is not None, call.softcap is not None
    features = (call.causal, window, softcap, call.mask, sinks, logsumexp, call.lists, call.alibi)
    return Specialisation(tile, shape.dtype, *features, shape.kv_format)


def normalize(
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    keys: int,
    mask: MaskKind = "none",
    sinks: bool = False,
    lists: bool = False,
    alibi: bool = False,
) -> CallParams:
    """Validate the keywords of a call and return their normal form.

    Raises:
        ValueError: names the invalid keyword.
    """
    if not math.isfinite(scale):
        raise ValueError(f"[flash_attention] scale is finite; got {scale}.")
    check_bounds(window, softcap)
    narrow = window if window is not None and window < keys else None
    return CallParams(float(scale), causal or window is not None, narrow, softcap, mask, sinks, lists, alibi)


def refusal(dtype: str, head_dim: int, value_dim: int) -> str | None:
    """Return why the kernels do not support a call, in one line, or None if they do."""
    if dtype not in SIZES:
        return f"the Metal kernels are for {', '.join(SIZES)}, not {dtype}"
    if value_dim != head_dim:
        return f"the Metal kernels need values as wide as keys, not {value_dim} and {head_dim}"
    if head_dim not in HEAD_DIMS:
        return f"the Metal kernels take head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def refusal_of_workload(workload: Workload) -> str | None:
    """Return why the kernels do not support a workload, in one line, or None if they do."""
    return refusal(workload.dtype, workload.head_dim, workload.value_dim)


def of_workload(workload: Workload, needs: Needs = NO_NEEDS) -> tuple[CallShape, CallParams]:
    """Translate a workload into shape and call; an array mask counts as a bool one."""
    w = workload
    sizes = (w.batch, w.heads, w.kv_heads, w.seq, w.kv_seq, w.head_dim)
    shape = CallShape(*sizes, w.dtype, parse_kv_format(w.kv_format))
    softcap = 1.0 if needs.softcap else None
    mask: MaskKind = "bool" if needs.array_mask else "none"
    lists = w.structured or needs.pattern
    return shape, normalize(w.scale, w.causal, w.window, softcap, w.kv_seq, mask, needs.sinks, lists, needs.alibi)


def shape_of(q: "mx.array", k: "KeyOrValue", v: "KeyOrValue") -> CallShape:
    """Return the shape of a call.

    Raises:
        ValueError: shapes or dtypes are inconsistent or unsupported, or one of k and v is quantized and one is not.
    """
    kv_format = _kv_format(k, v)
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or len(v_shape) != 4:
        axes = f"{len(q_shape)}, {len(k_shape)}, {len(v_shape)}"
        raise ValueError(f"[flash_attention] q, k and v have 4 axes; got {axes}.")
    fits = q_shape[0] == k_shape[0] and q_shape[3] == k_shape[3] and v_shape[:3] == k_shape[:3]
    if not fits or not k_shape[1] or q_shape[1] % k_shape[1] or 0 in q_shape or 0 in k_shape:
        raise ValueError(f"[flash_attention] shapes do not fit: q {q_shape}, k {k_shape}, v {v_shape}.")
    if kv_format is None and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"[flash_attention] q, k and v have one type; got {q.dtype}, {k.dtype}, {v.dtype}.")
    dtype = dtype_name(q.dtype)
    reason = refusal(dtype, q_shape[3], v_shape[3])
    if reason:
        raise ValueError(f"[flash_attention] {reason}.")
    return CallShape(q_shape[0], q_shape[1], k_shape[1], q_shape[2], k_shape[2], q_shape[3], dtype, kv_format)


def _kv_format(k: "KeyOrValue", v: "KeyOrValue") -> KVFormat | None:
    key, value = getattr(k, "format", None), getattr(v, "format", None)
    if key is None and value is None:
        return None
    if key is None or value is None:
        raise ValueError("[flash_attention] k, v: got one quantized and one not; both are, or neither.")
    return KVFormat(key, value)


def mask_kind(mask: "mx.array | None", shape: CallShape) -> MaskKind:
    """Return the kind of a mask.

    Raises:
        ValueError: it is not a mask, or does not broadcast to (B, H, Lq, Lk).
    """
    if mask is None:
        return "none"
    whole = (shape.batch, shape.heads, shape.queries, shape.keys)
    if mask.ndim > 4 or any(a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(whole), strict=False)):
        raise ValueError(f"[flash_attention] mask {mask.shape} does not broadcast to {whole}.")
    name = dtype_name(mask.dtype)
    if name != "bool" and name not in SIZES:
        raise ValueError(f"[flash_attention] mask is bool, {', '.join(SIZES)}; got {name}.")
    return cast("MaskKind", name)
