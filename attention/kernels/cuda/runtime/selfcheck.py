"""Inputs and float64 reference of the first-use self-check."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention import masks
from attention.kernels.common.cache import code_fingerprint
from attention.kernels.common.first_use import Check, SelfChecks
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.program import Program, machine_code

Floats = NDArray[np.float64]
TOLERANCE = {"bf16": 1.2e-2, "f16": 1.5e-3}
"""Relative error of the output (by its norm): four times the error from rounding inputs and weights."""
LOGSUMEXP_TOLERANCE = 1e-3


def inputs(shape: CallShape, seed: int = 7) -> list[mx.array]:
    """Return random q, k and v, and a cotangent of the output."""
    random = np.random.default_rng(seed)
    rows, keys = (shape.batch, shape.heads, shape.queries), (shape.batch, shape.kv_heads, shape.keys)
    dtype = mx.bfloat16 if shape.element == "bf16" else mx.float16
    shapes = ((*rows, shape.head_dim), (*keys, shape.head_dim), (*keys, shape.value_dim), (*rows, shape.value_dim))
    return [mx.array(random.standard_normal(size, np.float32)).astype(dtype) for size in shapes]


def small_call(shape: CallShape, call: CallParams) -> CallParams:
    """Return a call of the same kind for inputs of a small shape; a pattern has full, partial and missing tiles."""
    window, pattern = (100 if call.window is not None else None), None
    if call.pattern is not None:
        blocks = (1, shape.heads, -(-shape.queries // 64), -(-shape.keys // 64))
        cells = np.random.default_rng(7).random(blocks) < 0.4
        cells[:, 0, 0] = False
        documents = [shape.keys // 3, shape.keys // 4, shape.keys - shape.keys // 3 - shape.keys // 4]
        pattern = (masks.causal() & masks.documents(documents)) | masks.blocks(cells, block=64)
    return replace(call, scale=shape.head_dim**-0.5, window=window, pattern=pattern)


def random_mask(shape: CallShape, call: CallParams, seed: int = 7) -> list[mx.array]:
    """Return a mask of the call's dtype, shared by the batch, that masks a quarter of the pairs; empty without one."""
    if call.mask is None:
        return []
    random = np.random.default_rng(seed)
    size = (1, shape.heads, shape.queries, shape.keys)
    hidden = random.random(size) < 0.25
    if call.mask == "bool":
        return [mx.array(~hidden)]
    added = np.where(hidden, -np.inf, random.standard_normal(size)).astype(np.float32)
    return [mx.array(added).astype(getattr(mx, call.mask))]


def exact(array: mx.array) -> Floats:
    """Convert an array to float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weights(q: Floats, k: Floats, call: CallParams, mask: Floats | None = None) -> tuple[Floats, Floats, Floats]:
    """Return the softmax weights, the logsumexp, and the derivative of the capped scores with respect to the scores."""
    scores = q @ np.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2) * call.scale
    slope = np.ones_like(scores)
    if call.softcap is not None:
        squashed = np.tanh(scores / call.softcap)
        scores, slope = call.softcap * squashed, 1 - squashed**2
    if mask is not None:
        scores = scores + mask
    if call.pattern is not None:
        scores[np.broadcast_to(~np.array(call.pattern.dense(scores.shape)), scores.shape)] = -np.inf
    queries, keys = scores.shape[2:]
    position, key = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
    if call.causal:
        scores[..., key > position] = -np.inf
    if call.window is not None:
        scores[..., key <= position - call.window] = -np.inf
    largest = scores.max(axis=-1, keepdims=True)
    made = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    total = made.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return made / np.where(total == 0, 1, total), (largest + np.log(total))[..., 0], slope


def additive(mask: Sequence[mx.array]) -> Floats | None:
    """Return a mask as an additive float64 array, or None without a mask."""
    if not mask:
        return None
    return np.where(np.array(mask[0]), 0, -np.inf) if mask[0].dtype == mx.bool_ else exact(mask[0])


def reference(q: Floats, k: Floats, v: Floats, call: CallParams, mask: Floats | None = None) -> tuple[Floats, Floats]:
    """Return output and logsumexp; fully masked rows are 0 and -inf."""
    found, logsumexp, _ = weights(q, k, call, mask)
    return found @ np.repeat(v, q.shape[1] // k.shape[1], axis=1), logsumexp


def reference_gradients(
    q: Floats, k: Floats, v: Floats, cotangent: Floats, call: CallParams, mask: Floats | None = None
) -> list[Floats]:
    """Return the gradients of q, k and v."""
    batch, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    found, _, slope = weights(q, k, call, mask)
    wide_k, wide_v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    by_weight = cotangent @ wide_v.swapaxes(-1, -2)
    by_score = found * (by_weight - (found * by_weight).sum(axis=-1, keepdims=True)) * slope * call.scale

    def summed(x: Floats) -> Floats:  # over the heads that share a key head
        return np.asarray(x.reshape(batch, kv_heads, group, *x.shape[2:]).sum(axis=2))

    by_key, by_value = by_score.swapaxes(-1, -2) @ q, found.swapaxes(-1, -2) @ cotangent
    return [by_score @ wide_k, summed(by_key), summed(by_value)]


def gradient_disagreement(
    shape: CallShape,
    call: CallParams,
    found: Sequence[mx.array],
    made: Sequence[mx.array],
    mask: Sequence[mx.array] = (),
) -> str | None:
    """Compare the gradients of a call on `made` with the reference; return a one-line error, or None."""
    q, k, v, cotangent = (exact(x) for x in made)
    expected = reference_gradients(q, k, v, cotangent, call, additive(mask))
    for name, gradient, right in zip(("dQ", "dK", "dV"), found, expected, strict=True):
        error = relative_error(gradient, right, floor=0.1)
        if not error <= 2 * TOLERANCE[shape.element]:
            return f"its {name} disagrees with the reference by {error:.2g}"
    return None


def relative_error(found: mx.array, expected: Floats, floor: float = 1e-30) -> float:
    """Return ||found - expected|| / max(||expected||, floor * sqrt(size)); NaN if any element is NaN."""
    whole = max(float(np.linalg.norm(expected)), floor * math.sqrt(expected.size))
    return float(np.linalg.norm(exact(found) - expected)) / whole


def disagreement(
    shape: CallShape,
    call: CallParams,
    output: mx.array,
    logsumexp: mx.array,
    made: Sequence[mx.array],
    mask: Sequence[mx.array] = (),
) -> str | None:
    """Compare output and logsumexp of a call on `made` with the reference; return a one-line error, or None."""
    q, k, v = (exact(x) for x in made[:3])
    expected, expected_logsumexp = reference(q, k, v, call, additive(mask))
    error = relative_error(output, expected)
    if not error <= TOLERANCE[shape.element]:
        return f"its output disagrees with the reference by {error:.2g}"
    found, unseen = exact(logsumexp), np.isneginf(expected_logsumexp)
    gap = float(np.abs(np.where(unseen, 0, found) - np.where(unseen, 0, expected_logsumexp)).max())
    if not gap <= LOGSUMEXP_TOLERANCE or not np.array_equal(np.isneginf(found), unseen):
        return f"its logsumexp disagrees with the reference by {gap:.2g}"
    return None


def distrust_reason(program: Program) -> str | None:
    """Return why a program must not be used on this GPU, or None if unknown."""
    return checks.distrust_reason(program.key)


def check(program: Program, check: Check) -> str | None:
    """Self-check a program unless it was checked on this GPU before; return why it must not be used, or None.

    Args:
        program: program to check; its verdict is stored.
        check: runs the kernel and returns an error in its results, or None.

    Raises:
        RuntimeError: the launch failed, and the CUDA context of this process is no longer usable.
    """
    reason = checks.check(program.key, program.name, check, prepare=lambda: machine_code(program))
    if reason is not None and not _gpu_responds():
        raise RuntimeError(f"{program.name} broke this process's use of the GPU; a new one goes without it: {reason}")
    return reason


def machine_fingerprint() -> str:
    """Return the key of a verdict: GPU, driver, MLX version, and a fingerprint of the code in this package."""
    return f"{gpu().fingerprint}, MLX {_mlx_version()}, code {code_fingerprint('kernels/cuda')}"


@functools.cache
def _mlx_version() -> str:
    return metadata.version("mlx")


def _gpu_responds() -> bool:
    """Return whether MLX can still compute; after an illegal memory access, every CUDA call fails."""
    try:
        mx.eval(mx.zeros(1) + 1)
    except RuntimeError:
        return False
    return True


checks = SelfChecks(machine_fingerprint)
