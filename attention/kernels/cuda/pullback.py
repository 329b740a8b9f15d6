"""Dispatch of the backward pass: the Hopper kernel if it supports the call, else the general one, else MLX."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from attention.kernels.cuda import choice, general_gradient, gradient, launcher, selfcheck, trust
from attention.kernels.cuda.call import LOG2_E, Call, Shape
from attention.kernels.cuda.launch import dtype_of
from attention.kernels.cuda.plain import through_mlx


def refusal(shape: Shape, call: Call) -> str | None:
    """Return why gradients fall back to MLX, in one line, or None if the kernels compute them (by checks so far)."""
    own = _refusal_of_own(shape, call)
    general = trust.distrust(general_gradient.kernel_of(shape, call).program) if own else None
    return f"{own}; the general kernel: {general}" if general else None


def scratch_bytes(shape: Shape, call: Call) -> int:
    """Return the scratch memory of the backward pass, in bytes, for the kernel that computes it."""
    own = _refusal_of_own(shape, call) is None
    return gradient.scratch_bytes(shape, call) if own else general_gradient.scratch_bytes(shape)


def gradients(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array], shape: Shape, call: Call
) -> list[mx.array]:
    """Return the gradients of q, k and v, and of a mask.

    Args:
        primals: q, k, v, and a mask (batch, heads, queries, keys) if the call has one.
        cotangents: cotangents of the output, and of the logsumexp if it was requested.
        outputs: outputs of the forward pass: output, logsumexp and stats.
        shape: shapes of the arrays.
        call: parameters of the call.
    """
    if _own_is_taken(shape, call):
        return list(gradient.by_kernel(primals, cotangents, outputs, shape, call))
    if not _general_is_taken(shape, call):
        return through_mlx(list(primals), list(cotangents), call)
    made = general_gradient.gradients(primals, cotangents, outputs, shape, call)
    return [*made, *(_of_mask(primals, cotangents, call) if call.mask else ())]


def _of_mask(primals: Sequence[mx.array], cotangents: Sequence[mx.array], call: Call) -> list[mx.array]:
    """Return the gradient of a mask, in MLX operations; they are lazy, so an unused gradient costs nothing."""
    if call.mask == "bool":
        return [mx.zeros_like(primals[3])]
    return through_mlx(list(primals), list(cotangents), call)[3:]


def _refusal_of_own(shape: Shape, call: Call) -> str | None:
    """Return why the Hopper kernel does not compute the gradients of a call, or None (by checks so far)."""
    if launcher.obstacle() is not None:
        return "the Hopper kernel needs the launcher"
    return choice.own_refusal(shape, call) or gradient.refusal(shape, call)


@functools.lru_cache(maxsize=256)
def _own_is_taken(shape: Shape, call: Call) -> bool:
    if _refusal_of_own(shape, call) is None:
        gradient.check(shape, call)
    return _refusal_of_own(shape, call) is None


@functools.lru_cache(maxsize=256)
def _general_is_taken(shape: Shape, call: Call) -> bool:
    return trust.judged(general_gradient.kernel_of(shape, call).program, lambda: _compare(shape, call)) is None


def _compare(shape: Shape, call: Call) -> str | None:
    """Run the general kernel of a call on small inputs; return an error in its results, or None."""
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=200, keys=331)
    tried = replace(call, scale=shape.head_dim**-0.5, window=100 if call.window is not None else None)
    made, mask = selfcheck.inputs(small), selfcheck.random_mask(small, tried)
    given = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in made]  # in the layout that models pass
    q, k, v = (selfcheck.exact(x) for x in made[:3])
    output, logsumexp = selfcheck.reference(q, k, v, tried, selfcheck.added(mask))
    stats = np.stack([np.zeros_like(logsumexp), logsumexp * LOG2_E], axis=-1)
    outputs = [mx.array(output, dtype=mx.float32).astype(dtype_of(shape)), mx.array(logsumexp, dtype=mx.float32)]
    outputs.append(mx.array(stats, dtype=mx.float32))
    found = general_gradient.gradients([*given[:3], *mask], given[3:], outputs, small, tried)
    return selfcheck.gradient_disagreement(small, tried, found, made, mask)
