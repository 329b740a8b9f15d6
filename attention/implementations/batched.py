"""`mx.vmap` of attention: the mapped axis becomes part of the batch."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

Rule = Callable[[Any, Any], tuple[Any, Any]]


def folded(function: Callable[..., Any], masks_at: int | None = None) -> Rule:
    """Returns the vmap rule of a function of arrays (batch, ...) and lists of such, to arrays (batch, ...).

    Where an array without a batch is mapped, such as sinks (H,), there is a call for each index instead.

    Args:
        function: takes two arguments or more, the first of them the query or a list that begins with it.
        masks_at: the argument that is a list of masks, whose batch may be 1 where the query's is not.
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
    """The arrays that are mapped, with their axes."""
    pairs: list[tuple[mx.array, int]] = []
    tree_map(lambda x, axis: None if axis is None else pairs.append((x, axis)), inputs, axes)
    return pairs


def _mapped_first(outputs: Any) -> tuple[Any, Any]:
    return outputs, tree_map(lambda _: 0, outputs)


def _first(argument: Any) -> Any:
    return argument[0] if isinstance(argument, list) else argument


def _at(x: mx.array, axis: int | None, index: int) -> mx.array:
    return x if axis is None else mx.take(x, index, axis=axis)
