"""The backward pass: by the Metal kernels if they passed their self-check, else through the score matrix."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx

from attention.errors import KernelUnavailable
from attention.kernels.metal import launch, selfcheck, trust
from attention.kernels.metal.call import Call, Shape, specialisation
from attention.kernels.metal.plain import mask_gradient, plain_gradients
from attention.kernels.metal.transforms import SINKS, Function, folded, refuse_second_derivative


def refusal(shape: Shape, call: Call) -> str | None:
    """Return why gradients go through the score matrix, in one line, or None if the kernels are expected to work."""
    return trust.distrust(specialisation("backward_key", shape, call))


def gradients(
    primals: Sequence[mx.array],
    d_o: mx.array,
    d_lse: mx.array | None,
    outputs: Sequence[mx.array],
    shape: Shape,
    call: Call,
) -> tuple[mx.array, ...]:
    """Return the gradients of q, k, v, mask and sinks.

    The gradient of an additive mask goes through the score matrix, and only if it is evaluated; that of a bool mask
    is 0.

    Args:
        primals: q, k, v, mask and sinks.
        d_o: cotangent of the output, in the output's dtype.
        d_lse: cotangent of the logsumexp, if it was returned.
        outputs: outputs of the forward pass.
        shape: of the arrays.
        call: keywords of the call.
    """
    if not _taken(shape, call, d_lse is not None):
        return plain_gradients(primals, d_o, d_lse, call)
    d_q, d_k, d_v, d_sinks = by_kernel(primals, d_o, d_lse, outputs, shape, call)
    return d_q, d_k, d_v, mask_gradient(primals, d_o, d_lse, call), d_sinks


@functools.lru_cache(maxsize=256)
def _taken(shape: Shape, call: Call, logsumexp: bool) -> bool:
    try:
        check(shape, call, logsumexp)
    except KernelUnavailable:
        return False
    return True


def by_kernel(
    primals: Sequence[mx.array],
    d_o: mx.array,
    d_lse: mx.array | None,
    outputs: Sequence[mx.array],
    shape: Shape,
    call: Call,
) -> tuple[mx.array, ...]:
    """Return the gradients of q, k, v and sinks by the Metal kernels; arguments as in `gradients`."""
    more = () if d_lse is None else (d_lse,)
    d_q, d_k, d_v, delta = _backward(shape, call)(*primals, *outputs, d_o, *more)
    sinks = primals[SINKS]
    d_sinks = of_sinks(sinks, outputs, delta).sum(axis=(0, 2)) if call.sinks else mx.zeros_like(sinks)
    return d_q, d_k, d_v, d_sinks


@functools.lru_cache(maxsize=256)
def _backward(shape: Shape, call: Call) -> Function:
    """Return the backward kernels as a function of q, k, v, mask, sinks, the outputs and their cotangents."""

    @mx.custom_function
    def function(*arrays: mx.array) -> tuple[mx.array, ...]:
        q, k, v, mask, _, o, lse, rest, d_o, *d_lse = arrays
        return launch.backward((q, k, v), (o, lse, rest), d_o, d_lse[0] if d_lse else None, mask, shape, call)

    function.vjp(refuse_second_derivative)
    function.jvp(refuse_second_derivative)
    function.vmap(folded(shape, lambda batched: _backward(batched, call)))
    return cast("Function", function)


def of_sinks(sinks: mx.array, outputs: Sequence[mx.array], delta: mx.array) -> mx.array:
    """Return each row's contribution to the gradient of its head's sink, (B, H, Lq): a sink is a key with value 0.

    dS = P (dP - delta) with dP = 0. A fully masked row, whose logsumexp is -inf, contributes 0.
    """
    _, logsumexp, rest = outputs
    weights = mx.where(mx.isneginf(logsumexp), 0.0, mx.exp(sinks[:, None] - logsumexp - rest))
    return -weights * delta


def check(shape: Shape, call: Call, logsumexp: bool = False) -> None:
    """Run the self-checks of both kernels, unless they have passed on this machine before.

    Args:
        shape: of the arrays.
        call: keywords of the call.
        logsumexp: whether the logsumexp has a cotangent.

    Raises:
        KernelUnavailable: a kernel cannot be compiled, or its results are wrong.
    """
    small = replace(shape, batch=1, heads=4, kv_heads=2, queries=70, keys=83)
    asked = selfcheck.tried(call, small)

    def compare() -> str | None:
        given = selfcheck.inputs(small, asked, logsumexp=logsumexp)
        primals = given.arrays(small)
        outputs = launch.forward(*primals, small, asked)
        made = by_kernel(primals, given.cotangent, given.logsumexp_cotangent, outputs, small, asked)
        return selfcheck.gradient_disagreement(given, asked, made[: 4 if call.sinks else 3])

    trust.ensure(specialisation("backward_key", shape, call, logsumexp), compare)
