"""Dispatch of the backward pass: the Hopper kernel if it supports the call, else the general one, else MLX."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from attention.kernels.common.selfcheck import additive, exact
from attention.kernels.common.unfused import attend
from attention.kernels.cuda import choice
from attention.kernels.cuda.portable import gradient as portable_gradient
from attention.kernels.cuda.runtime import launcher, selfcheck
from attention.kernels.cuda.runtime.call import LOG2_E, CallParams, CallShape
from attention.kernels.cuda.runtime.launch import dtype_of
from attention.kernels.cuda.runtime.launcher import laid_out, of_sdpa
from attention.kernels.cuda.sm90 import gradient
from attention.masks import Mask, combine


def through_mlx(primals: list[mx.array], cotangents: list[mx.array], call: CallParams) -> list[mx.array]:
    """Return the gradients of the primals, computed by MLX.

    Args:
        primals: q, k, v, a mask (batch, heads, queries, keys) and slopes (heads,), if the call has them.
        cotangents: cotangents of the output, and of the logsumexp if it was requested.
        call: parameters of the call.
    """
    queries, keys = primals[0].shape[2], primals[1].shape[2]
    # fully masked rows would be NaN in MLX's SDPA
    may_be_empty = call.mask is not None or call.pattern is not None or (call.causal and queries > keys)
    plain = len(cotangents) > 1 or call.softcap is not None or call.alibi or may_be_empty

    def sdpa(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        window = Mask(window=call.window).materialize(queries, keys) if call.window else None
        mask = window if window is not None else "causal" if call.causal else None
        q, k, v = laid_out(q, k, v)
        return [of_sdpa(mx.fast.scaled_dot_product_attention(q, k, v, scale=call.scale, mask=mask))]

    def unfused(q: mx.array, k: mx.array, v: mx.array, *more: mx.array) -> list[mx.array]:
        return list(plain_attention(q, k, v, call, *more))[: len(cotangents)]

    _, gradients = mx.vjp(unfused if plain else sdpa, primals, cotangents)
    return gradients


def plain_attention(
    q: mx.array, k: mx.array, v: mx.array, call: CallParams, *more: mx.array
) -> tuple[mx.array, mx.array]:
    """Return output and logsumexp from the whole score matrix, in float32; fully masked rows give 0 and -inf.

    `more`: the mask and the slopes of the call, if it has them.
    """
    mask, slopes = more[0] if call.mask else None, more[-1] if call.alibi else None
    positions = None if call.pattern is None else call.pattern.dense((q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    whole = Mask(causal=call.causal, window=call.window, array=combine(positions, mask), alibi=slopes)
    wide_q, wide_k, wide_v = (x.astype(mx.float32) for x in (q, k, v))
    out, logsumexp = attend(wide_q, wide_k, wide_v, scale=call.scale, mask=whole, softcap=call.softcap)
    return out.astype(q.dtype), logsumexp


def refusal(shape: CallShape, call: CallParams) -> str | None:
    """Return why gradients fall back to MLX, in one line, or None if the kernels compute them (by checks so far)."""
    own = _refusal_of_own(shape, call)
    general = selfcheck.distrust_reason(portable_gradient.kernel_of(shape, call).program) if own else None
    return f"{own}; the general kernel: {general}" if general else None


def scratch_bytes(shape: CallShape, call: CallParams) -> int:
    """Return the scratch memory of the backward pass, in bytes, for the kernel that computes it."""
    own = _refusal_of_own(shape, call) is None
    return gradient.scratch_bytes(shape, call) if own else portable_gradient.scratch_bytes(shape)


def gradients(
    primals: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    outputs: Sequence[mx.array],
    shape: CallShape,
    call: CallParams,
) -> list[mx.array]:
    """Return the gradients of q, k and v, and of a mask; slopes are constants, and theirs is 0.

    Args:
        primals: q, k, v, a mask (batch, heads, queries, keys) and slopes (heads,), if the call has them.
        cotangents: cotangents of the output, and of the logsumexp if it was requested.
        outputs: outputs of the forward pass: output, logsumexp and stats.
        shape: shapes of the arrays.
        call: parameters of the call.
    """
    of_slopes = [mx.zeros_like(primals[-1])] if call.alibi else []
    if _own_is_taken(shape, call):
        return [*gradient.by_kernel(primals, cotangents, outputs, shape, call), *of_slopes]
    if not _general_is_taken(shape, call):
        return [*through_mlx(list(primals), list(cotangents), call)[: len(primals) - call.alibi], *of_slopes]
    made = portable_gradient.gradients(primals, cotangents, outputs, shape, call)
    return [*made, *(_of_mask(primals, cotangents, call) if call.mask else ()), *of_slopes]


def _of_mask(primals: Sequence[mx.array], cotangents: Sequence[mx.array], call: CallParams) -> list[mx.array]:
    """Return the gradient of a mask, in MLX operations; they are lazy, so an unused gradient costs nothing."""
    if call.mask == "bool":
        return [mx.zeros_like(primals[3])]
    return through_mlx(list(primals), list(cotangents), call)[3:4]


def _refusal_of_own(shape: CallShape, call: CallParams) -> str | None:
    """Return why the Hopper kernel does not compute the gradients of a call, or None (by checks so far)."""
    if launcher.known_obstacle() is not None:
        return "the Hopper kernel needs the launcher"
    return choice.sm90_refusal(shape, call) or gradient.refusal(shape, call)


@functools.lru_cache(maxsize=256)
def _own_is_taken(shape: CallShape, call: CallParams) -> bool:
    if _refusal_of_own(shape, call) is None:
        gradient.check(shape, call)
    return _refusal_of_own(shape, call) is None


@functools.lru_cache(maxsize=256)
def _general_is_taken(shape: CallShape, call: CallParams) -> bool:
    return selfcheck.check(portable_gradient.kernel_of(shape, call).program, lambda: _compare(shape, call)) is None


def _compare(shape: CallShape, call: CallParams) -> str | None:
    """Run the general kernel of a call on small inputs; return an error in its results, or None."""
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=200, keys=331)
    tried = selfcheck.small_call(small, call)
    made, mask = selfcheck.inputs(small), selfcheck.random_mask(small, tried)
    given = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in made]  # in the layout that models pass
    q, k, v = (exact(x) for x in made[:3])
    output, logsumexp = selfcheck.reference(q, k, v, tried, additive(mask[0]) if mask else None)
    stats = np.stack([np.zeros_like(logsumexp), logsumexp * LOG2_E], axis=-1)
    outputs = [mx.array(output, dtype=mx.float32).astype(dtype_of(shape)), mx.array(logsumexp, dtype=mx.float32)]
    outputs.append(mx.array(stats, dtype=mx.float32))
    primals = [*given[:3], *mask, *selfcheck.slopes(small, tried)]
    found = portable_gradient.gradients(primals, given[3:], outputs, small, tried)
    return selfcheck.gradient_disagreement(tried, found, made, mask)
