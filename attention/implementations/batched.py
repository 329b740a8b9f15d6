"""`mx.vmap` rules of attention: the mapped axis becomes part of the batch."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

Rule = Callable[[Any, Any], tuple[Any, Any]]


def folded(function: Callable[..., Any], masks_at: int | None = None) -> Rule:
    """Return the vmap rule of a function from arrays (batch, ...) and lists of them to arrays (batch, ...).

    If an array without a batch axis is mapped, such as sinks (H,), each index is a separate call.

    Args:
        function: takes at least two arguments, the first of them the query or a list beginning with it.
        masks_at: index of the argument that is a list of masks, whose batch may be 1.
    """

    def rule(inputs: Any, axes: Any) -> tuple[Any, Any]:
        mapped = _mapped(inputs, axes)
        array, axis = mapped[0]
        size = array.shape[axis]
        if any(array.ndim < 5 for array, _ in mapped):
            calls = [function(*tree_map(lambda x, axis, i=i: _at(x, axis, i), inputs, axes)) for i in range(size)]
            return _mapped_first(tree_map(lambda *each: mx.stack(list(each)), *calls))
        query, its_axis = _first(inputs[0]), _first(axes[0])
        batch = query.shape[0 if its_axis is None or its_axis > 0 else 1]

        def fold(x: mx.array, axis: int | None) -> mx.array:
            x = x[None] if axis is None else mx.moveaxis(x, axis, 0)
            return mx.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(size * batch, *x.shape[2:])

        def fold_unless_one(x: mx.array, axis: int | None) -> mx.array:
            return x if axis is None and x.shape[0] == 1 else fold(x, axis)

        arguments = [
            tree_map(fold_unless_one if at == masks_at else fold, argument, its)
            for at, (argument, its) in enumerate(zip(inputs, axes, strict=True))
        ]
        return _mapped_first(tree_map(lambda x: x.reshape(size, batch, *x.shape[1:]), function(*arguments)))

    return rule


def _mapped(inputs: Any, axes: Any) -> list[tuple[mx.array, int]]:
    """Return the mapped arrays with their axes."""
    pairs: list[tuple[mx.array, int]] = []
    tree_map(lambda x, axis: None if axis is None else pairs.append((x, axis)), inputs, axes)
    return pairs


def _mapped_first(outputs: Any) -> tuple[Any, Any]:
    return outputs, tree_map(lambda _: 0, outputs)


def _first(argument: Any) -> Any:
    return argument[0] if isinstance(argument, list) else argument


def _at(x: mx.array, axis: int | None, index: int) -> mx.array:
    return x if axis is None else mx.take(x, index, axis=axis)
