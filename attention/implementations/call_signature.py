"""The signature of a call, derived from its arrays."""

from functools import lru_cache

import mlx.core as mx

from attention.core.errors import UnsupportedError, UsageError
from attention.core.mask_text import MaskSpec
from attention.core.route import Needs
from attention.core.workload import DTYPES, DType, Workload
from attention.masks import Mask, as_4d, dtype_name
from attention.measure.device import Backend


def call_signature(q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float | None) -> tuple[Workload, Needs]:
    """Return the workload of a call, as a forward pass, and the features that it does not describe.

    Raises:
        UnsupportedError: the query's dtype is not supported.
    """
    for name in DTYPES:
        if q.dtype == getattr(mx, name):
            workload = _workload(tuple(q.shape), tuple(k.shape), v.shape[3], name, mask.causal, mask.window)
            return workload, needs_of(softcap is not None, mask.array)
    raise UnsupportedError(f"q: got {q.dtype}; it takes {', '.join(DTYPES)}")


def needs_of(softcap: bool, array: mx.array | None) -> Needs:
    """Return the features that a workload does not describe: a softcap, an array mask and its size."""
    if array is None:
        return Needs(softcap=softcap)
    batches, heads = as_4d(array).shape[:2]
    dtype = dtype_name(array.dtype)
    return Needs(softcap=softcap, array_mask=True, mask_batches=batches, mask_heads=heads, mask_dtype=dtype)


def current_backend() -> Backend:
    """Return the backend of MLX's current default device."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@lru_cache(maxsize=1024)
def _workload(
    q: tuple[int, ...], k: tuple[int, ...], value_dim: int, dtype: DType, causal: bool, window: int | None
) -> Workload:
    try:
        return _make_workload(Workload, q, k, value_dim, dtype, causal, window)
    except UsageError:
        return _make_workload(_UnlimitedWorkload, q, k, value_dim, dtype, causal, window)


class _UnlimitedWorkload(Workload, frozen=True, kw_only=True):
    """A workload without the benchmark's limits, which do not apply to `attention()`."""

    def __post_init__(self) -> None:
        """Skip validation: all fields come from validated arrays."""

    @property
    def mask_spec(self) -> MaskSpec:
        """The parts of the mask; a window may be of any size."""
        size = self.mask.removeprefix("window:")
        return MaskSpec(window=int(size)) if size.isdigit() else MaskSpec(causal=self.mask == "causal")


def _make_workload(
    kind: type[Workload],
    q: tuple[int, ...],
    k: tuple[int, ...],
    value_dim: int,
    dtype: DType,
    causal: bool,
    window: int | None,
) -> Workload:
    return kind(
        batch=q[0],
        heads=q[1],
        seq=q[2],
        head_dim=q[3],
        kv_heads=k[1],
        kv_seq=k[2],
        value_dim=value_dim,
        dtype=dtype,
        # a window of more than all keys is a causal mask
        mask=f"window:{window}" if window is not None and window < k[2] else "causal" if causal or window else "none",
    )
