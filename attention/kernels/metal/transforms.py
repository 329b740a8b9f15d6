"""Rules of the kernels for MLX's other transformations: `mx.vmap`, jvp, second derivatives."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NoReturn

import mlx.core as mx

from attention.kernels.metal.call import Shape

MASK: Final = 3
"""Index of the mask argument, whose batch may be 1."""
SINKS: Final = 4
"""Index of the sinks argument, which has no batch."""

Function = Callable[..., Sequence[mx.array]]
Rule = Callable[[Sequence[mx.array], Sequence[int | None]], tuple[list[mx.array], list[int]]]


def folded(shape: Shape, function_of: Callable[[Shape], Function]) -> Rule:
    """Return the vmap rule of a function of (q, k, v, mask, sinks, more ...): the mapped axis joins the batch.

    If the sinks are mapped, each index is a separate call.

    Args:
        shape: of the arrays of one call.
        function_of: returns the function for arrays of another shape.
    """

    def rule(inputs: Sequence[mx.array], axes: Sequence[int | None]) -> tuple[list[mx.array], list[int]]:
        size = next(x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None)
        if axes[SINKS] is not None:
            one = function_of(shape)
            calls = [one(*(_at(x, axis, i) for x, axis in zip(inputs, axes, strict=True))) for i in range(size)]
            made = [mx.stack(list(each)) for each in zip(*calls, strict=True)]
        else:
            arguments = [_fold(at, x, axis, size) for at, (x, axis) in enumerate(zip(inputs, axes, strict=True))]
            outputs = function_of(replace(shape, batch=size * shape.batch))(*arguments)
            made = [x.reshape(size, shape.batch, *x.shape[1:]) for x in outputs]
        return made, [0] * len(made)

    def _fold(at: int, x: mx.array, axis: int | None, size: int) -> mx.array:
        if axis is None and (at == SINKS or (at == MASK and x.shape[0] == 1)):
            return x
        x = x[None] if axis is None else mx.moveaxis(x, axis, 0)
        return mx.broadcast_to(x, (size, shape.batch, *x.shape[2:])).reshape(size * shape.batch, *x.shape[2:])

    return rule


def _at(x: mx.array, axis: int | None, index: int) -> mx.array:
    return x if axis is None else mx.take(x, index, axis=axis)


def refuse_jvp(*_: Any) -> NoReturn:
    """The jvp rule of the kernels."""
    raise ValueError("flash_attention has no forward-mode derivative (jvp); implementation 'baseline' has.")


def refuse_second_derivative(*_: Any) -> NoReturn:
    """The vjp rule of the backward kernels."""
    raise ValueError("flash_attention has no second derivative; implementation 'baseline' has.")
