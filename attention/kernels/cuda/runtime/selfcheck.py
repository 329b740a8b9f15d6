"""Small inputs of the self-check on first use, the comparison of its results with float64, and the kept verdicts."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

import mlx.core as mx
import numpy as np
from msgspec import structs

from attention import masks
from attention.kernels.common import selfcheck
from attention.kernels.common.cache import code_fingerprint
from attention.kernels.common.first_use import Check, SelfChecks
from attention.kernels.common.selfcheck import Floats, RulesOf, additive, exact
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.program import Program, machine_code
from attention.masks import dtype_name
from attention.measure.reference import Rules


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


def slopes(shape: CallShape, call: CallParams) -> list[mx.array]:
    """Return the slopes of a call with ALiBi; empty without."""
    return [mx.array(_slopes(shape.heads).astype(np.float32))] if call.alibi else []


def _slopes(heads: int) -> Floats:
    """Return another slope for each head, of either sign."""
    return np.array([(-1) ** head * 2.0 ** -(head % 4 + 1) for head in range(heads)])


def _rules(call: CallParams, q: Floats, k: Floats, mask: Floats | None) -> RulesOf:
    """Return the rules of each head; an additive mask broadcasts to the scores. ALiBi is of `slopes`."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    added = None if mask is None else np.broadcast_to(mask, shape)
    if call.alibi:
        position = np.arange(shape[2])[:, None] + shape[3] - shape[2]
        bias = np.broadcast_to(_slopes(shape[1])[:, None, None] * (np.arange(shape[3]) - position), shape)
        added = bias if added is None else added + bias
    if call.pattern is not None:
        visible = np.broadcast_to(np.array(call.pattern.dense(shape)), shape)
        added = np.where(visible, 0.0 if added is None else added, -np.inf)
    plain = Rules(scale=call.scale, causal=call.causal, window=call.window, softcap=call.softcap)
    return lambda b, h: plain if added is None else structs.replace(plain, mask=added[b, h])


def reference(q: Floats, k: Floats, v: Floats, call: CallParams, mask: Floats | None = None) -> tuple[Floats, Floats]:
    """Return output and logsumexp; fully masked rows are 0 and -inf. The mask is additive."""
    return selfcheck.results(q, k, v, _rules(call, q, k, mask))


def reference_gradients(
    q: Floats, k: Floats, v: Floats, cotangent: Floats, call: CallParams, mask: Floats | None = None
) -> list[Floats]:
    """Return the gradients of q, k and v."""
    return selfcheck.gradients(q, k, v, cotangent, _rules(call, q, k, mask))[:3]


def gradient_disagreement(
    call: CallParams, found: Sequence[mx.array], made: Sequence[mx.array], mask: Sequence[mx.array] = ()
) -> str | None:
    """Compare the gradients of a call on `made` with the reference; return a one-line error, or None."""
    q, k, v, cotangent = (exact(x) for x in made)
    expected = reference_gradients(q, k, v, cotangent, call, additive(mask[0]) if mask else None)
    return selfcheck.gradient_disagreement(found, expected, dtype_name(made[0].dtype))


def disagreement(
    call: CallParams,
    output: mx.array,
    logsumexp: mx.array,
    made: Sequence[mx.array],
    mask: Sequence[mx.array] = (),
) -> str | None:
    """Compare output and logsumexp of a call on `made` with the reference; return a one-line error, or None."""
    q, k, v = (exact(x) for x in made[:3])
    expected = reference(q, k, v, call, additive(mask[0]) if mask else None)
    return selfcheck.disagreement(output, logsumexp, expected, dtype_name(made[0].dtype), relative_above=math.inf)


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
    return f"{gpu().fingerprint}, MLX {_mlx_version()}, code {code_fingerprint('kernels/common', 'kernels/cuda')}"


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
