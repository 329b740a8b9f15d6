"""`baseline`: unfused attention, and the memory that it takes."""

import os
from typing import Final

import mlx.core as mx
from msgspec import structs

from attention.core.kv_format import DENSE, parse_kv_format
from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import ITEM_BYTES, Workload
from attention.implementations.calls import needs_with_mask
from attention.kernels.common.unfused import attend
from attention.masks import Mask
from attention.measure.device import Backend, Device
from attention.quantized_kv import KeyOrValue, QuantizedArray

PATTERN_BYTES: Final = 4
"""Bytes per pair of the steps in which a pattern is made dense."""


def unfused_bytes(workload: Workload, needs: Needs = NO_NEEDS) -> int:
    """Return the peak bytes above the inputs of a call that builds the whole score matrix, outputs included.

    In a forward pass the softmax reuses the scores' memory, so one matrix is alive; sinks are joined to the scores
    and cut off again, which adds two. A backward pass stores the probabilities, their gradient and the gradient of the
    scores. Positional masks take one byte per pair for all heads, and in a backward pass one value per pair for the
    selection. The scaled query is added.
    """
    item = ITEM_BYTES[workload.dtype]
    training = workload.pass_ == "training"
    matrices = (5 if needs.softcap else 3) if training else (3 if needs.sinks else 1)
    return (
        matrices * workload.scores * item
        + _mask_bytes(workload, needs, item if training else 0)
        + _spread_bytes(workload)
        + workload.query_bytes
        + workload.output_bytes
    )


def with_tf32(path: str, dtype: str, backend: Backend, *, widens: bool = True) -> str:
    """Append TF32 to the name of a path whose float32 matrix products are MLX's on CUDA.

    TF32 has 10 of float32's 23 mantissa bits, which gives a relative error of about 1e-3 in the output. It is used
    unless MLX_ENABLE_TF32=0 was set when the process started. `widens`: the path converts inputs to float32 where
    `computes_in_float32` holds.
    """
    multiplied = "float32" if widens and computes_in_float32(dtype, backend) else dtype
    return f"{path}, TF32" if in_tf32(multiplied, backend) else path


def in_tf32(dtype: str, backend: Backend) -> bool:
    """Return whether MLX multiplies matrices of a dtype in TF32."""
    return backend == "cuda" and dtype == "float32" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def computes_in_float32(dtype: str, backend: Backend) -> bool:
    """Return whether unfused paths convert inputs of a half-precision dtype to float32.

    Scores in float16 overflow from 65,520. On the CPU, where MLX multiplies matrices in float32 in any case, scores in
    bfloat16 would be less accurate than blocks.
    """
    return dtype == "float16" or (dtype == "bfloat16" and backend == "cpu")


def unfused_call_bytes(workload: Workload, backend: Backend, needs: Needs = NO_NEEDS) -> int:
    """Return the peak bytes above the inputs of an unfused call, in float32 if `computes_in_float32` holds."""
    widened = computes_in_float32(workload.dtype, backend)
    return float32_bytes(workload, needs) if widened else unfused_bytes(workload, needs)


def float32_bytes(workload: Workload, needs: Needs = NO_NEEDS) -> int:
    """Return `unfused_bytes` of half-precision inputs converted to float32 first, with the results converted back."""
    wide = structs.replace(workload, dtype="float32")
    return unfused_bytes(wide, needs) + wide.query_bytes + wide.key_value_bytes + workload.output_bytes


def dequantizing_bytes(workload: Workload, backend: Backend, needs: Needs = NO_NEEDS) -> int:
    """Return the peak bytes above the inputs of `baseline` with quantized keys and values.

    These are dequantized as a whole, through float32, in the dtype of the computation.
    """
    widened = workload.dtype == "float16"
    dense = structs.replace(workload, kv_format=DENSE, dtype="float32" if widened else workload.dtype)
    rows = workload.batch * workload.kv_heads * workload.kv_seq
    largest = 4 * rows * max(workload.head_dim, workload.value_dim)
    copies = unpacking_arrays(workload, backend) + (0 if dense.dtype == "float32" else 2)
    own = unfused_bytes(dense, needs) + dense.key_value_bytes + (dense.query_bytes if widened else 0)
    return own + int(copies * largest)


UNPACKING_ARRAYS: Final = {"affine": 2.0, "mxfp8": 0.5, "mxfp4": 2.7, "nvfp4": 2.7}
UNPACKING_ODD_BITS: Final = 6.0
"""Float32 arrays of the result's size that MLX's CPU backend makes beside it while it dequantizes an array, measured:
for 8, 4 and 2 bits, and for numbers that straddle words. GPU kernels make none."""


def unpacking_arrays(workload: Workload, backend: Backend) -> float:
    """Return how many arrays of the size of dequantized keys, in float32, are made to dequantize keys or values."""
    kv = parse_kv_format(workload.kv_format)
    if kv is None or backend != "cpu":
        return 0.0
    return max(
        UNPACKING_ODD_BITS if form.bits in (3, 5, 6) else UNPACKING_ARRAYS[form.mode] for form in (kv.key, kv.value)
    )


def _spread_bytes(workload: Workload) -> int:
    """Return the bytes of dK and dV per query head, before they are summed over heads that share a key head."""
    group = workload.heads // workload.kv_heads
    return workload.key_value_bytes * group if workload.pass_ == "training" and group > 1 else 0


def _mask_bytes(workload: Workload, needs: Needs, kept: int) -> int:
    arrays = 2 if workload.window is not None else int(workload.causal)
    if workload.seq == 1 and workload.window is None:
        arrays = 0  # one query at the end sees every key: nothing is masked
    if needs.array_mask:
        arrays += 2
    if needs.pattern:
        arrays += PATTERN_BYTES * needs.mask_batches * needs.mask_heads
    if needs.alibi:
        arrays += 8 * workload.heads
    return workload.seq * workload.kv_seq * (arrays + kept if arrays else 0)


class Baseline:
    """Matmul, scale, softcap, mask, softmax, matmul. The softmax is float32; for float16 inputs everything is.

    Float16 scores would overflow from 65,520.
    """

    name = "baseline"
    takes_patterns = takes_alibi = takes_quantized = True

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route, which is the same for every workload; quantized keys and values are dequantized first."""
        needs = needs_with_mask(workload, needs)
        if workload.quantized:
            return Route(
                path=with_tf32("dequantize, unfused", workload.dtype, device.backend),
                fused=False,
                reason="dequantizes all keys and values, then separate steps, which build the whole score matrix",
                predicted_bytes=dequantizing_bytes(workload, device.backend, needs),
            )
        return Route(
            path=with_tf32("manual, unfused", workload.dtype, device.backend),
            fused=False,
            reason="separate steps, which build the whole score matrix",
            predicted_bytes=float32_bytes(workload, needs)
            if workload.dtype == "float16"
            else unfused_bytes(workload, needs),
        )

    def __call__(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`. Quantized keys and values are dequantized."""
        return _widened(q, k, v, scale, mask, softcap)[0]

    def with_logsumexp(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> tuple[mx.array, mx.array]:
        """Compute attention and the logsumexp of its rows, as in `ReturnsLogsumexp`."""
        return _widened(q, k, v, scale, mask, softcap)


def _widened(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, scale: float, mask: Mask, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """Return output and logsumexp; float16 is computed in float32."""
    dtype = mx.float32 if q.dtype == mx.float16 else q.dtype
    shifted = q.dtype != mx.float32
    k, v = (x.dequantized(dtype) if isinstance(x, QuantizedArray) else x for x in (k, v))
    if q.dtype != mx.float16:
        return attend(q, k, v, scale=scale, mask=mask, softcap=softcap, shifted=shifted)
    wide_q, wide_k, wide_v = (x.astype(mx.float32) for x in (q, k, v))
    out, logsumexp = attend(wide_q, wide_k, wide_v, scale=scale, mask=mask, softcap=softcap, shifted=shifted)
    return out.astype(q.dtype), logsumexp
