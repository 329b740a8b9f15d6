"""The order in which the tiles of one call are computed.

MLX builds its graph lazily and would be free to have all tiles in memory at once. A chain makes each tile wait for the
one before it:

    q, k, v ──cut──▶ ordered ──▶ tile 1 ──▶ ordered ──▶ tile 2 ──▶ ...
                        └─▶ anchor 1           └─▶ anchor 2

MLX's transforms (vjp, jvp, vmap, compile) walk the graph of a call recursively, inputs first, and along thousands of
tiles that follow each other they would overflow the stack. So every ordering node has one output more, an `anchor`, and
the final node lists all anchors, from the first tile to the last, before the results: the walk finds the tile before
each anchor visited already, and its depth is that of one tile.
"""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx


class Chain:
    """The tiles of one call, each computed after the one before it."""

    def __init__(self, earlier: Sequence[mx.array] = ()) -> None:
        """Starts a chain; its first tile waits for the arrays of `earlier`."""
        self.links = list(earlier)
        """What the next tile waits for."""
        self._anchors: list[mx.array] = []
        self._latest: dict[int, tuple[mx.array, mx.array]] = {}

    def after(self, *arrays: mx.array) -> list[mx.array]:
        """Return the arrays, not to be read before the links are computed."""
        return self._anchored(arrays, self.links) if self.links else list(arrays)

    def whole(self, *arrays: mx.array) -> list[mx.array]:
        """Return the same for arrays that every tile is cut from; each time it goes on from the last time's result.

        An array that thousands of nodes read makes mx.compile slow: it compares these, and moves them in lists.
        """
        latest = self.after(*(self._latest.get(id(array), (array, array))[1] for array in arrays))
        self._latest.update({id(array): (array, late) for array, late in zip(arrays, latest, strict=True)})
        return latest

    def anchor(self, array: mx.array) -> mx.array:
        """Returns the array, as a node at which a recursive walk stops."""
        return self._anchored([array], [_anchor()])[0]

    def results(self, *arrays: mx.array) -> list[mx.array]:
        """Returns what the tiles computed, by a node that leads a recursive walk to the first tile first."""
        if not self._anchors:
            return list(arrays)
        (last,) = ordered([_anchor()], self._anchors)
        return ordered([last, *arrays], [_anchor()])[1:]

    def _anchored(self, arrays: Sequence[mx.array], links: Sequence[mx.array]) -> list[mx.array]:
        *after, anchor = ordered([*arrays, _anchor()], links)
        self._anchors.append(anchor)
        return after


def _anchor() -> mx.array:
    """An array that nothing else uses, of one axis: mx.compile would merge those of none, which takes long."""
    return mx.array([0.0])


@mx.custom_function
def _pass_on(arrays: list[mx.array], links: list[mx.array]) -> list[mx.array]:
    """Returns the arrays; the node that MLX makes of this has the links among its inputs, as `mx.depends` has.

    Unlike that it works under `mx.vmap` and `mx.jvp`.
    """
    return arrays


@_pass_on.vmap
def _pass_on_batched(
    inputs: tuple[list[mx.array], list[mx.array]], axes: tuple[list[int | None], list[int | None]]
) -> tuple[list[mx.array], list[int | None]]:
    """Maps every array, also one that is not mapped itself: MLX takes all outputs of a node for mapped if one is."""
    size = next(
        x.shape[axis]
        for xs, its in zip(inputs, axes, strict=True)
        for x, axis in zip(xs, its, strict=True)
        if axis is not None
    )
    arrays = [
        x if axis is not None else mx.broadcast_to(x, (size, *x.shape))
        for x, axis in zip(inputs[0], axes[0], strict=True)
    ]
    return ordered(arrays, inputs[1]), [axis or 0 for axis in axes[0]]


def ordered(arrays: Sequence[mx.array], links: Sequence[mx.array]) -> list[mx.array]:
    """Returns the arrays, not to be read before the links are computed; works under every transform of MLX's."""
    return cast("list[mx.array]", _pass_on(list(arrays), list(links)))
