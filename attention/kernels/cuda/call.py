"""What a call asks for besides its arrays, and what is taken of it."""

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from attention.kernels.cuda.forward import Element
from attention.route import PLAIN, Needs
from attention.workload import Workload

if TYPE_CHECKING:
    import mlx.core as mx

LARGEST_HEAD_DIM: Final = 256
LOG2_E: Final = math.log2(math.e)
ELEMENTS: Final[dict[str, Element]] = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Call:
    """The keywords of a call, in their normal form: a window implies causal, and one of all keys is none."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Shape:
    """The arrays of a call: q (batch, heads, queries, head_dim), k and v (batch, kv_heads, keys, head_dim)."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    element: Element

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads


def normal(scale: float, causal: bool, window: int | None, softcap: float | None, keys: int) -> Call:
    """Checks the keywords of a call and brings them to normal form.

    Raises:
        ValueError: naming the keyword that does not fit.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"[flash_attention] scale is positive; got {scale}.")
    if window is not None and window < 1:
        raise ValueError(f"[flash_attention] window is at least 1; got {window}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"[flash_attention] softcap is positive; got {softcap}.")
    narrow = window is not None and window < keys
    return Call(float(scale), causal or window is not None, window if narrow else None, softcap)


def refusal(dtype: str, head_dim: int, value_dim: int, array_mask: bool) -> str | None:
    """Why the kernel does not take a call, in one line, or None if it does."""
    if dtype == "float32":
        return "the CUDA kernel is for bfloat16 and float16; MLX's own float32 products may round to TF32"
    if dtype not in ELEMENTS:
        return f"the CUDA kernel is for bfloat16 and float16, not {dtype}"
    if value_dim != head_dim:
        return f"the CUDA kernel needs values as wide as keys, not {value_dim} and {head_dim}"
    if head_dim % 8 or not 8 <= head_dim <= LARGEST_HEAD_DIM:
        return f"the CUDA kernel takes head dims that are multiples of 8 up to {LARGEST_HEAD_DIM}, not {head_dim}"
    if array_mask:
        return "the CUDA kernel takes no array mask"
    return None


def refusal_of(workload: Workload, needs: Needs = PLAIN) -> str | None:
    """The same for a workload."""
    return refusal(workload.dtype, workload.head_dim, workload.value_dim, needs.array_mask)


def float_bits(x: float) -> int:
    """A float32 as the int32 of the same bits: MLX's precompiled kernels take no float scalars (0.32.4)."""
    return int(struct.unpack("i", struct.pack("f", x))[0])


def check_arrays(q: "mx.array", k: "mx.array", v: "mx.array", mask: "mx.array | None") -> str:
    """The name of the arrays' type.

    Raises:
        ValueError: shapes or types do not fit together, or are not taken.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or len(v_shape) != 4:
        raise ValueError(
            f"[flash_attention] q, k and v have 4 axes; got {len(q_shape)}, {len(k_shape)}, {len(v_shape)}."
        )
    fits = q_shape[0] == k_shape[0] and q_shape[3] == k_shape[3] and v_shape[:3] == k_shape[:3]
    if not fits or not k_shape[1] or q_shape[1] % k_shape[1] or 0 in q_shape or 0 in k_shape:
        raise ValueError(f"[flash_attention] shapes do not fit: q {q_shape}, k {k_shape}, v {v_shape}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"[flash_attention] q, k and v have one type; got {q.dtype}, {k.dtype}, {v.dtype}.")
    dtype = str(q.dtype).removeprefix("mlx.core.")
    reason = refusal(dtype, q_shape[3], v_shape[3], mask is not None)
    if reason:
        raise ValueError(f"[flash_attention] {reason}.")
    return dtype
