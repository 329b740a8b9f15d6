"""The backward pass: by our kernels where they have shown that they are right, else through the score matrix."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from attention.errors import KernelUnavailable
from attention.kernels.metal import launch, selfcheck, trust
from attention.kernels.metal.call import Call, Shape, specialisation
from attention.kernels.metal.plain import plain_gradients


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
    """The gradients of q, k, v, mask (always 0) and sinks.

    Args:
        primals: q, k, v, mask and sinks.
        d_o: cotangent of the output, in its type.
        d_lse: of the logsumexp, if that was asked for.
        outputs: what the forward pass made: output and logsumexp.
        shape: of the arrays.
        call: what was computed.
    """
    if not _taken(shape, call, d_lse is not None):
        return plain_gradients(primals, d_o, d_lse, call)
    return by_kernel(primals, d_o, d_lse, outputs, shape, call)


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
    """The same by our kernels."""
    q, k, v, mask, sinks = primals
    d_q, d_k, d_v, delta = launch.backward((q, k, v), outputs, d_o, d_lse, mask, shape, call)
    d_sinks = mx.zeros_like(sinks)
    if call.sinks:
        d_sinks = of_sinks(sinks, outputs[1], delta).sum(axis=(0, 2))
    return d_q, d_k, d_v, mx.zeros_like(mask), d_sinks


def of_sinks(sinks: mx.array, logsumexp: mx.array, delta: mx.array) -> mx.array:
    """What each row adds to the gradient of its head's sink, (B, H, Lq): a sink is a key with the value 0.

    dS = P (dP - delta), where dP is 0. A row with nothing at all, whose logsumexp is -inf, adds 0.
    """
    weights = mx.where(mx.isneginf(logsumexp), 0.0, mx.exp(sinks[:, None] - logsumexp))
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
        return selfcheck.gradient_disagreement(given, asked, [*made[:3], *([made[4]] if call.sinks else [])])

    trust.ensure(specialisation("backward_key", shape, call, logsumexp), compare)
