"""`mlx`: MLX's own scaled_dot_product_attention."""

from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

from attention import masks
from attention.core.errors import UnsupportedError
from attention.core.route import NO_NEEDS, Needs, Route, unsupported
from attention.core.workload import ITEM_BYTES, Workload
from attention.implementations.baseline import PATTERN_BYTES, computes_in_float32, unfused_bytes, with_tf32
from attention.implementations.calls import call_signature, current_backend, needs_with_mask
from attention.implementations.quantized_kv import attend_packed, packed_bytes
from attention.implementations.transforms import vmap_rule, with_mask_gradient
from attention.masks import Mask
from attention.measure.device import Backend, Device
from attention.quantized_kv import KeyOrValue, QuantizedArray

NO_SOFTCAP = "MLX's SDPA has no softcap"
NO_ALIBI = "MLX's SDPA has no ALiBi"
SLOW_FIRST_CALL = "; MLX compiles them at the first call of a kind, which may take half a minute"
FUSED_ROWS = 128
"""MLX's fused backward pass on CUDA requires a multiple of this many rows."""
MATERIALIZED_MASK = 2.3
"""Memory of a bool mask materialised for MLX's fused kernel on CUDA, as a multiple of the scores' size."""


class MlxSdpa:
    """mx.fast.scaled_dot_product_attention, with fully masked rows set to 0 and a gradient for additive masks.

    Quantized keys and values, which it does not take, are computed as mlx-lm does with a quantized cache.
    """

    name = "mlx"
    takes_patterns = takes_quantized = True

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route according to MLX itself, queried with arrays that are never computed."""
        if needs.softcap or needs.alibi:
            return unsupported(NO_SOFTCAP if needs.softcap else NO_ALIBI)
        needs = needs_with_mask(workload, needs)
        if workload.quantized:
            start = SLOW_FIRST_CALL if device.backend == "cuda" else ""
            return Route(
                path="quantized_matmul twice",
                fused=False,
                reason="as mlx-lm with a quantized cache: two products with packed keys and values, "
                f"and the whole score matrix between them{start}",
                predicted_bytes=packed_bytes(workload, needs, widened=False, repeated=device.backend == "cpu"),
            )
        refusal = why_unfused(workload, device.backend, needs)
        path = "MLX SDPA, dense mask" if needs.pattern else "MLX SDPA, unfused" if refusal else "MLX SDPA, fused"
        if refusal:
            return Route(
                path=with_tf32(path, workload.dtype, device.backend, widens=False),
                fused=False,
                reason=refusal,
                predicted_bytes=unfused_bytes(workload, needs),
            )
        return Route(
            path=path,
            fused=True,
            reason="MLX has a fused kernel for this shape",
            predicted_bytes=fused_bytes(workload, device.backend, needs),
        )

    def __call__(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`. Keys and values may be quantized.

        Raises:
            UnsupportedError: a softcap or a bias of ALiBi is given.
        """
        if softcap is not None:
            raise UnsupportedError(f"mlx: {NO_SOFTCAP}")
        if mask.alibi is not None:
            raise UnsupportedError(f"mlx: {NO_ALIBI}")
        if isinstance(k, QuantizedArray) or isinstance(v, QuantizedArray):
            assert isinstance(k, QuantizedArray) and isinstance(v, QuantizedArray)
            return attend_packed(q, k, v, scale=scale, mask=mask, widened=False, by_axis=True)
        return with_mask_gradient(lambda q, k, v, mask: sdpa(q, k, v, scale, mask), q, k, v, scale=scale, mask=mask)


def sdpa(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, shifted: bool = False, *, sums_wide: bool = False
) -> mx.array:
    """Call MLX's SDPA; fully masked rows are 0, and a mask's gradient is MLX's, which some paths lack.

    `shifted`: subtract `masks.shift` from an additive mask. `sums_wide`: scores and an additive mask are added in
    float32, whatever their dtype.
    """
    if not mask.bounds_only:
        return _with_array(q, k, v, scale, mask, shifted, sums_wide)
    seq, kv_seq = q.shape[2], k.shape[2]
    empty = mask.empty_rows(seq, kv_seq)
    if empty:
        q = q[:, :, empty:]
    out = _of_mlx(q, k, v, scale, _plain_mask(mask, seq - empty, kv_seq))
    return mx.pad(out, [(0, 0), (0, 0), (empty, 0), (0, 0)]) if empty else out


def attend_whole(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: Mask,
    widened: bool,
    sinks: mx.array | None = None,
) -> mx.array:
    """Call MLX's SDPA, in float32 if `widened` (see `is_call_widened`).

    A negative scale is replaced by a negated query, and 0 by a query of zeros: cuDNN returns NaN for both with a mask.
    """
    dtype = q.dtype
    if scale <= 0:
        q, scale = (-q, -scale) if scale else (mx.zeros_like(q), 1.0)
    if widened:
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    wide = dtype != mx.float32 and not widened and current_backend() == "cuda"  # cuDNN adds a mask in float32
    if wide and dtype == mx.float16 and q.shape[2] % FUSED_ROWS and sinks is None:
        return _with_widened_backward(q, k, v, scale, mask)
    out = (
        sdpa(q, k, v, scale, mask, widened and dtype != mx.float32, sums_wide=wide)
        if sinks is None
        else _with_sinks(q, k, v, scale, mask, sinks)
    )
    return out.astype(dtype)


def _with_widened_backward(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    """Call MLX's fused SDPA with a gradient computed in float32: MLX's own is unfused, and overflows in float16."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, array: list[mx.array]) -> mx.array:
        return sdpa(q, k, v, scale, mask.with_arrays(array), sums_wide=True)

    def pull_back(inputs: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        primals, array = list(inputs[:3]), inputs[3]

        def widened(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return attend_whole(q, k, v, scale, mask.with_arrays(array), True)

        _, gradients = mx.vjp(widened, primals, [cotangent])
        return [*gradients, *(mx.zeros_like(x) for x in array)]

    attend.vjp(pull_back)
    attend.vmap(vmap_rule(attend, masks_at=3))
    return cast("mx.array", attend(q, k, v, [] if mask.array is None else [masks.as_4d(mask.array)]))


def is_call_widened(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> bool:
    """Return whether a call computes in float32: if MLX has no fused kernel for it and `computes_in_float32` holds."""
    backend = current_backend()
    if q.dtype != mx.float16:
        return computes_in_float32(masks.dtype_name(q.dtype), backend)
    return is_unfused(*call_signature(q, k, v, mask, None), backend)


@lru_cache(maxsize=1024)
def is_unfused(workload: Workload, needs: Needs, backend: Backend) -> bool:
    """Return whether MLX has no fused kernel for a call."""
    return why_unfused(workload, backend, needs) is not None


def _with_sinks(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, sinks: mx.array) -> mx.array:
    """Call MLX's SDPA with attention sinks; rows that attend to the sinks alone give 0 without further measures."""
    lengths = q.shape[2], k.shape[2]
    named = mask.causal and mask.window is None and mask.bounds_only and not mask.empty_rows(*lengths)
    whole = "causal" if named else mask.dense(masks.scores_shape(q, k))
    sinks = sinks.astype(q.dtype)
    if isinstance(whole, mx.array):
        whole = whole if whole.dtype == mx.bool_ else masks.cast_additive(whole, q.dtype)
        # With a sink of -inf MLX would weigh the hidden keys of rows that see none, or divide by 0.
        sinks = mx.maximum(sinks, mx.array(mx.finfo(q.dtype).min / 2, q.dtype))
    return _of_mlx(q, k, v, scale, whole, sinks)


def _of_mlx(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Call MLX's SDPA; on CUDA, arrays in a layout that it fails on are copied first.

    With a mask of these lengths, as MLX makes one of "causal" where it has no kernel, the lengths are bound to it.
    """
    backend = current_backend()
    on_cuda = backend == "cuda" and mx.cuda.is_available()
    if on_cuda:
        from attention.kernels.cuda.runtime.launcher import laid_out, of_sdpa

        q, k, v = laid_out(q, k, v)
        if isinstance(mask, mx.array):
            (mask,) = laid_out(mask)
    if isinstance(mask, mx.array) or (mask is not None and backend == "cpu"):
        q, k = _bound(q, k)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return of_sdpa(out) if on_cuda else out


def _bound(q: mx.array, k: mx.array) -> tuple[mx.array, mx.array]:
    """Return views of query and key for which a graph of `mx.compile(shapeless=True)` refuses other lengths.

    Such a graph keeps the mask that it was traced with, and MLX would read beyond the shorter of the two.
    """
    query, key = (mx.squeeze(x.reshape(1, *x.shape), 0) for x in (q, k))
    return query, key


def _plain_mask(mask: Mask, seq: int, kv_seq: int) -> mx.array | str | None:
    """Return a positional mask as an argument of MLX's SDPA: "causal", a bool array for a window, or None."""
    if mask.window is not None:
        return mask.materialize(seq, kv_seq)
    return "causal" if mask.causal else None


def _with_array(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, shifted: bool, sums_wide: bool
) -> mx.array:
    whole = mask.dense(masks.scores_shape(q, k))
    assert whole is not None
    if whole.dtype != mx.bool_:
        whole = masks.cast_additive(whole, q.dtype, summed=not sums_wide)
    opened, seeing = masks.opened(whole, shifted)
    out = _of_mlx(q, k, v, scale, opened)
    return mx.where(masks.as_4d(seeing), out, mx.zeros((), out.dtype))


def fused_bytes(workload: Workload, backend: Backend, needs: Needs = NO_NEEDS) -> int:
    """Return the peak bytes of a fused call above its inputs: outputs, and in training logsumexp and float32 gradients.

    In addition to their outputs, flash backward passes store the float32 gradient of the query and a sum per row. On
    CUDA a bool mask, including a window's, is expanded to a number per score and head: 2.25 times the scores, measured.
    """
    rows = workload.batch * workload.heads * workload.seq
    mask = workload.seq * workload.kv_seq * 2 if workload.window is not None else 0
    if needs.pattern:
        mask = workload.seq * workload.kv_seq * PATTERN_BYTES * needs.mask_batches * needs.mask_heads
    if materializes_mask(workload, backend, needs):
        mask += int(MATERIALIZED_MASK * workload.scores * ITEM_BYTES[workload.dtype])
    scratch = rows * (8 + 4 * workload.head_dim) if workload.pass_ == "training" else 0
    return workload.output_bytes + mask + scratch


def materializes_mask(workload: Workload, backend: Backend, needs: Needs) -> bool:
    """Return whether a fused call expands its mask to a number per score and head."""
    return backend == "cuda" and (workload.window is not None or needs.array_mask or needs.pattern)


def why_unfused(workload: Workload, backend: Backend, needs: Needs = NO_NEEDS) -> str | None:
    """Return MLX's own reason for having no fused kernel here, or None if it has one; nothing is computed.

    `force_fused` is the only way to query it. For a training pass the call is differentiated, since some backends then
    decide otherwise.
    """
    dtype = getattr(mx, workload.dtype)
    q = mx.zeros((workload.batch, workload.heads, workload.seq, workload.head_dim), dtype)
    k = mx.zeros((workload.batch, workload.kv_heads, workload.kv_seq, workload.head_dim), dtype)
    v = mx.zeros((workload.batch, workload.kv_heads, workload.kv_seq, workload.value_dim), dtype)
    mask, sinks = _mask_of_workload(workload, needs), mx.zeros((workload.heads,), dtype) if needs.sinks else None

    def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask, sinks=sinks, force_fused=True)

    try:
        if workload.pass_ == "training":
            mx.vjp(call, [q, k, v], [mx.zeros((*q.shape[:3], workload.value_dim), dtype)])
        else:
            call(q, k, v)
    except ValueError as error:
        return _reason(str(error))
    if workload.pass_ == "training" and backend == "cuda" and workload.seq % FUSED_ROWS:
        return f"the backward kernel on CUDA needs a seq that is a multiple of {FUSED_ROWS}, and it is {workload.seq}"
    return None


def _mask_of_workload(workload: Workload, needs: Needs) -> mx.array | str | None:
    if workload.window is not None or needs.array_mask or needs.pattern:
        return mx.zeros((workload.seq, workload.kv_seq), mx.bool_)
    return "causal" if workload.causal else None


def _reason(message: str) -> str:
    """Return MLX's message without its prefix, for example "no fused kernel is available in CPU backend"."""
    text = message.split("] ", 1)[-1].strip().rstrip(".")
    return text.removeprefix("force_fused=True but ")
