"""The backward pass: by our kernels where they have shown that they are right, else through the score matrix."""

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
    """Why gradients go through the score matrix, in one line, or None if our kernels make them, as far as is known."""
    return trust.distrust(specialisation("backward_key", shape, call))


def gradients(
    primals: Sequence[mx.array],
    d_o: mx.array,
    d_lse: mx.array | None,
    outputs: Sequence[mx.array],
    shape: Shape,
    call: Call,
) -> tuple[mx.array, ...]:
    """The gradients of q, k, v, mask and sinks.

    That of an additive mask goes through the score matrix, if somebody evaluates it; that of a bool mask is 0.

    Args:
        primals: q, k, v, mask and sinks.
        d_o: cotangent of the output, in its type.
        d_lse: of the logsumexp, if that was asked for.
        outputs: what the forward pass made.
        shape: of the arrays.
        call: what was computed.
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
    """The gradients of q, k, v and sinks by our kernels; arguments as `gradients` has them."""
    more = () if d_lse is None else (d_lse,)
    d_q, d_k, d_v, delta = _backward(shape, call)(*primals, *outputs, d_o, *more)
    sinks = primals[SINKS]
    d_sinks = of_sinks(sinks, outputs, delta).sum(axis=(0, 2)) if call.sinks else mx.zeros_like(sinks)
    return d_q, d_k, d_v, d_sinks


@functools.lru_cache(maxsize=256)
def _backward(shape: Shape, call: Call) -> Function:
    """The backward kernels as a function of q, k, v, mask, sinks, the outputs and their cotangents."""

    @mx.custom_function
    def function(*arrays: mx.array) -> tuple[mx.array, ...]:
        q, k, v, mask, _, o, lse, rest, d_o, *d_lse = arrays
        return launch.backward((q, k, v), (o, lse, rest), d_o, d_lse[0] if d_lse else None, mask, shape, call)

    function.vjp(refuse_second_derivative)
    function.jvp(refuse_second_derivative)
    function.vmap(folded(shape, lambda batched: _backward(batched, call)))
    return cast("Function", function)


def of_sinks(sinks: mx.array, outputs: Sequence[mx.array], delta: mx.array) -> mx.array:
    """What each row adds to the gradient of its head's sink, (B, H, Lq): a sink is a key with the value 0.

    dS = P (dP - delta), where dP is 0. A row with nothing at all, whose logsumexp is -inf, adds 0.
    """
    _, logsumexp, rest = outputs
    weights = mx.where(mx.isneginf(logsumexp), 0.0, mx.exp(sinks[:, None] - logsumexp - rest))
    return -weights * delta


def check(shape: Shape, call: Call, logsumexp: bool = False) -> None:
    """Sees to it that both kernels have shown on this machine that they are right.

    Args:
        shape: of the arrays.
        call: what is asked for.
        logsumexp: whether that has a cotangent.

    Raises:
        KernelUnavailable: one cannot be compiled, or is wrong.
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
