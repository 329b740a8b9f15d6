"""Parameters and shapes of a call, and the checks of what the kernels support."""

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from attention.core.workload import Workload
from attention.kernels.common import check_bounds
from attention.kernels.cuda.runtime.program import Element

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.masks import Pattern

MAX_HEAD_DIM: Final = 256
MIN_FLOAT, MAX_FLOAT = 2.0**-126, 2.0**126
DIM_STEP: Final = 8
"""Elements per load; head dims that are not a multiple of it are zero-padded."""
LOG2_E: Final = math.log2(math.e)
MAX_SOFTCAP: Final = 11_000.0
"""Largest softcap for which tanh as 1 - 2 / (1 + e^2x) is accurate enough in float32; exponents stay below
LARGE_EXPONENT of common.cuh."""
ELEMENTS: Final[dict[str, Element]] = {"bfloat16": "bf16", "float16": "f16"}
MaskKind = Literal["bool", "bfloat16", "float16", "float32"]
MASK_KINDS: Final[tuple[MaskKind, ...]] = get_args(MaskKind)


@dataclass(frozen=True)
class CallParams:
    """Parameters of a call in normal form: a window implies causal, and a window over all keys is None."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    mask: MaskKind | None = None
    """Dtype of the array mask (batch, heads, queries, keys): bool, or added to the scores; None without a mask."""
    pattern: "Pattern | None" = None
    """Mask by block lists; it then holds all of the mask by position."""
    alibi: bool = False
    """Whether the last input is slopes (heads,): slope * (key - position of the query) is added after the softcap."""

    @property
    def adds_mask(self) -> bool:
        """Whether the mask is added to the scores."""
        return self.mask is not None and self.mask != "bool"


@dataclass(frozen=True)
class CallShape:
    """Shapes of a call: q (batch, heads, queries, head_dim), k (batch, kv_heads, keys, head_dim), v (batch, kv_heads,
    keys, value_dim), output (batch, heads, queries, value_dim)."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    element: Element
    value_dim: int = 0
    """0 means head_dim."""

    def __post_init__(self) -> None:
        """Resolve the default of value_dim."""
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """Shape of the scores."""
        return self.batch, self.heads, self.queries, self.keys

    def with_keys(self, keys: int) -> "CallShape":
        """Return this shape with another number of keys; `dataclasses.replace` takes several times as long."""
        return CallShape(
            self.batch, self.heads, self.kv_heads, self.queries, keys, self.head_dim, self.element, self.value_dim
        )

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads


def normalize(
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    keys: int,
    mask: MaskKind | None = None,
    pattern: "Pattern | None" = None,
    alibi: bool = False,
) -> CallParams:
    """Validate the keywords of a call and return them in normal form.

    Raises:
        ValueError: a keyword is invalid; the message names it.
    """
    if pattern is not None and (causal or window is not None):
        raise ValueError("[flash_attention] pattern holds the whole mask by position: causal and window are left out.")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"[flash_attention] scale is positive; got {scale}.")
    check_bounds(window, softcap)
    if softcap is not None and softcap > MAX_SOFTCAP:
        raise ValueError(f"[flash_attention] softcap is at most {MAX_SOFTCAP:g}; got {softcap:g}.")
    narrow = window is not None and window < keys
    return CallParams(
        float(scale), causal or window is not None, window if narrow else None, softcap, mask, pattern, alibi
    )


def refusal(dtype: str, head_dim: int, value_dim: int) -> str | None:
    """Return None if the kernels support the dtype and head dims, else a one-line reason."""
    if dtype == "float32":
        return "the CUDA kernels are for bfloat16 and float16; MLX's own float32 products may round to TF32"
    if dtype not in ELEMENTS:
        return f"the CUDA kernels are for bfloat16 and float16, not {dtype}"
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"the CUDA kernels take head dims up to {MAX_HEAD_DIM}, not {max(head_dim, value_dim)}"
    return None


def refusal_of_workload(workload: Workload) -> str | None:
    """Return None if the kernels support the dtype and head dims of a workload, else a one-line reason."""
    return refusal(workload.dtype, workload.head_dim, workload.value_dim)


def float_bits(x: float) -> int:
    """Return the bits of a positive float32 as an int: MLX's precompiled kernels have no float scalars (0.32.4).

    Values outside the normal range are clamped to it: masked scores are -inf, and -inf * 0 would be NaN.
    """
    return int(struct.unpack("i", struct.pack("f", min(max(x, MIN_FLOAT), MAX_FLOAT)))[0])


def check_arrays(
    q: "mx.array", k: "mx.array", v: "mx.array", mask: "mx.array | None", slopes: "mx.array | None" = None
) -> tuple[str, MaskKind | None]:
    """Validate the arrays of a call; return the names of their dtype and of the mask's.

    Raises:
        ValueError: shapes or dtypes are inconsistent or unsupported.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or len(v_shape) != 4:
        raise ValueError(
            f"[flash_attention] q, k and v have 4 axes; got {len(q_shape)}, {len(k_shape)}, {len(v_shape)}."
        )
    fits = q_shape[0] == k_shape[0] and q_shape[3] == k_shape[3] and v_shape[:3] == k_shape[:3]
    if not fits or not k_shape[1] or q_shape[1] % k_shape[1] or 0 in q_shape or 0 in v_shape:
        raise ValueError(f"[flash_attention] shapes do not fit: q {q_shape}, k {k_shape}, v {v_shape}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"[flash_attention] q, k and v have one type; got {q.dtype}, {k.dtype}, {v.dtype}.")
    reason = refusal(_name(q), q_shape[3], v_shape[3])
    if reason:
        raise ValueError(f"[flash_attention] {reason}.")
    check_slopes(slopes, q_shape[1])
    kind = None if mask is None else mask_kind(mask, (*q_shape[:3], k_shape[2]))
    return _name(q), kind


def check_slopes(slopes: "mx.array | None", heads: int) -> None:
    """Validate the slopes of a call with ALiBi.

    Raises:
        ValueError: their shape or dtype is another one.
    """
    if slopes is not None and (slopes.shape != (heads,) or _name(slopes) != "float32"):
        raise ValueError(
            f"[flash_attention] alibi takes slopes ({heads},) in float32; got {slopes.shape}, {_name(slopes)}."
        )


def mask_kind(mask: "mx.array", scores: tuple[int, ...]) -> MaskKind:
    """Return the name of a mask's dtype; `scores` is the shape (batch, heads, queries, keys) it must broadcast to.

    Raises:
        ValueError: the mask does not broadcast to `scores`, or its dtype is unsupported.
    """
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, whole) for size, whole in zip(sizes, scores, strict=True)):
        raise ValueError(f"[flash_attention] mask has a shape that broadcasts to {scores}; got {tuple(mask.shape)}.")
    for kind in MASK_KINDS:
        if _name(mask) == kind:
            return kind
    raise ValueError(f"[flash_attention] mask is of type {', '.join(MASK_KINDS)}; got {_name(mask)}.")


def _name(array: "mx.array") -> str:
    return str(array.dtype).removeprefix("mlx.core.")
