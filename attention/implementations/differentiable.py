"""Forward passes with a blockwise backward pass.

Besides q, k and v, the 4-D array of a mask and the sinks are explicit inputs of the functions that MLX transforms, each
in a list that may be empty, because `mx.vmap` does not see variables captured by a function. The gradient of a mask is
in `mask_gradient`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import mlx.core as mx
from msgspec import structs

from attention.implementations.batched import folded
from attention.implementations.blockwise import Call, forward, row_statistics
from attention.implementations.blockwise_gradient import Saved, gradients, sink_gradient

Attend = Callable[..., mx.array]
Arrays = list[mx.array]
Inputs = tuple[mx.array, mx.array, mx.array, Arrays, Arrays]
"""q, k, v, the mask's array, the sinks."""
MASK: Final = 3


def blockwise(call: Call, backward: Call) -> Attend:
    """Return a function of `Inputs` that computes attention blockwise, forward and backward."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays) -> tuple[mx.array, mx.array]:
        return forward(q, k, v, _having(call, mask), *sinks)

    def pull_back(inputs: Inputs, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Arrays:
        return _pulled(inputs, cotangents, outputs, backward)

    attend.vjp(pull_back)
    attend.vmap(folded(attend, MASK))
    return lambda *inputs: cast("tuple[mx.array, mx.array]", attend(*inputs))[0]


def blocks_behind(whole: Attend, call: Call, backward: Call) -> Attend:
    """Return `whole` with a blockwise backward pass, which recomputes the row statistics."""

    def pull_back(inputs: Inputs, cotangent: mx.array, output: mx.array) -> Arrays:
        q, k, _, mask, sinks = inputs
        statistics = row_statistics(q, k, _having(call, mask), *sinks)
        return _pulled(inputs, [cotangent], [output, statistics], backward)

    return differentiable(whole, pull_back)


def differentiable(whole: Attend, pull_back: Callable[[Inputs, mx.array, mx.array], Arrays]) -> Attend:
    """Return `whole`, a function of `Inputs`, with the gradients of `pull_back`, one for each array."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays) -> mx.array:
        return whole(q, k, v, mask, sinks)

    attend.vjp(pull_back)
    attend.vmap(folded(attend, MASK))
    return cast("Attend", attend)


def _pulled(inputs: Inputs, cotangents: Sequence[mx.array], outputs: Sequence[mx.array], call: Call) -> Arrays:
    q, k, v, mask, sinks = inputs

    def saved(q: mx.array, k: mx.array, v: mx.array, _: Arrays, outputs: Arrays, cotangents: Arrays) -> Saved:
        return Saved(q, k, v, *outputs, *cotangents)

    @mx.custom_function
    def pull(*arrays: Any) -> Arrays:
        return gradients(saved(*arrays), _having(call, arrays[MASK]))

    pull.vmap(folded(pull, MASK))
    given = q, k, v, mask, list(outputs), list(cotangents)
    of_sinks = [sink_gradient(saved(*given), sink, _having(call, mask)) for sink in sinks]
    return [*cast("Arrays", pull(*given)), *(mx.zeros_like(array) for array in mask), *of_sinks]


def _having(call: Call, array: Arrays) -> Call:
    return structs.replace(call, mask=call.mask.having(array))
