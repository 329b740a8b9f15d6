"""A forward pass, and the gradient that blocks compute for it."""

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from attention.implementations.blockwise import Call, forward
from attention.implementations.blockwise_gradient import Saved, gradients, sink_gradient

Primals = tuple[mx.array, ...]
Attend = Callable[..., mx.array]


def blockwise(call: Call, backward: Call) -> Attend:
    """Attends in blocks, forward and backward; of q, k, v, and sinks if there are any."""

    @mx.custom_function
    def attend(*primals: mx.array) -> tuple[mx.array, mx.array]:
        return forward(primals[0], primals[1], primals[2], call, *primals[3:])

    def pull_back(primals: Primals, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[mx.array]:
        return _pulled(primals, cotangents[0], outputs[0], outputs[1], backward)

    attend.vjp(pull_back)
    return lambda *primals: cast("tuple[mx.array, mx.array]", attend(*primals))[0]


def blocks_behind(whole: Attend, call: Call, backward: Call) -> Attend:
    """Attends as a whole; the backward pass is one of blocks, which recomputes the logsumexp."""

    @mx.custom_function
    def attend(*primals: mx.array) -> mx.array:
        return whole(*primals)

    def pull_back(primals: Primals, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        _, logsumexp = forward(primals[0], primals[1], primals[2], call, *primals[3:])
        return _pulled(primals, cotangent, output, logsumexp, backward)

    attend.vjp(pull_back)
    return cast("Attend", attend)


def _pulled(primals: Primals, cotangent: mx.array, output: mx.array, logsumexp: mx.array, call: Call) -> list[mx.array]:
    saved = Saved(primals[0], primals[1], primals[2], output, logsumexp, cotangent)
    sinks = [sink_gradient(saved, sink, call) for sink in primals[3:]]
    return [*gradients(saved, call), *sinks]
