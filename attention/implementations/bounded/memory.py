"""Memory fences: wait until a GPU has finished and freed memory before queueing more.

MLX keeps every buffer that a kernel reads until its command buffer is done, and on CUDA queues up to ten command
buffers of a gigabyte each ahead of the GPU: without a fence, tiles meant to run one after another are all in memory.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Final, cast

import mlx.core as mx
from msgspec import Struct

from attention.measure.device import Backend


class Chain:
    """The tiles of one call, each computed after the one before it."""

    def __init__(self, earlier: Sequence[mx.array] = ()) -> None:
        """Start a chain; its first tile waits for the arrays of `earlier`."""
        self.links = list(earlier)
        """Arrays that the next tile waits for."""
        self._anchors: list[mx.array] = []
        self._latest: dict[int, tuple[mx.array, mx.array]] = {}

    def after(self, *arrays: mx.array) -> list[mx.array]:
        """Return the arrays as nodes that wait for the links."""
        return self._anchored(arrays, self.links) if self.links else list(arrays)

    def whole(self, *arrays: mx.array) -> list[mx.array]:
        """Return arrays that every tile is sliced from, as nodes that wait for the links and for the last call.

        mx.compile is slow if thousands of nodes read one array: it compares these nodes and moves them in lists.
        """
        latest = self.after(*(self._latest.get(id(array), (array, array))[1] for array in arrays))
        self._latest.update({id(array): (array, late) for array, late in zip(arrays, latest, strict=True)})
        return latest

    def anchor(self, array: mx.array) -> mx.array:
        """Return the array as a node at which a recursive walk of the graph stops."""
        return self._anchored([array], [_anchor()])[0]

    def results(self, *arrays: mx.array) -> list[mx.array]:
        """Return the results of the tiles through a node that leads a recursive walk to the first tile first."""
        if not self._anchors:
            return list(arrays)
        (last,) = depend([_anchor()], self._anchors)
        return depend([last, *arrays], [_anchor()])[1:]

    def _anchored(self, arrays: Sequence[mx.array], links: Sequence[mx.array]) -> list[mx.array]:
        *after, anchor = depend([*arrays, _anchor()], links)
        self._anchors.append(anchor)
        return after


def _anchor() -> mx.array:
    """Return an unused array with one axis: mx.compile would merge arrays without axes, which is slow."""
    return mx.array([0.0])


@mx.custom_function
def _depend(arrays: list[mx.array], links: list[mx.array]) -> list[mx.array]:
    """Return the arrays, as outputs of a node that also has the links as inputs, like `mx.depends`.

    Unlike `mx.depends` it works under `mx.vmap` and `mx.jvp`.
    """
    return arrays


@_depend.vmap
def _depend_batched(
    inputs: tuple[list[mx.array], list[mx.array]], axes: tuple[list[int | None], list[int | None]]
) -> tuple[list[mx.array], list[int | None]]:
    """Map every array, including unmapped ones: MLX treats all outputs of a node as mapped if one is."""
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
    return depend(arrays, inputs[1]), [axis or 0 for axis in axes[0]]


def depend(arrays: Sequence[mx.array], links: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays as nodes that wait for the links, under every transform of MLX."""
    return cast("list[mx.array]", _depend(list(arrays), list(links)))


RESIDENT_TILES: Final[dict[Backend, float]] = {"cpu": 1.0, "cuda": 2.2, "metal": 12.0}
"""Number of tiles that may be in memory at once.

On CUDA the next tile is queued while one runs. On Metal, without such a fence, it is the number of command buffers in
flight: ten, one being filled and one being released; derived from MLX's source, not measured.
"""
Fence = Callable[[Sequence[mx.array]], list[mx.array]]
"""Returns arrays that later tiles depend on, given the arrays computed by earlier tiles."""


class TileOrder(Struct, frozen=True):
    """The ordering of tiles."""

    next: Fence
    """Used before a tile that may be in memory together with the previous one."""
    alone: Fence
    """Used before a tile that may not."""


def no_fence(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays themselves: later tiles wait only until these are queued."""
    return list(arrays)


def fence_on_completion(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return a scalar computed on the CPU stream after the arrays; on CUDA it fences whatever depends on it.

    It is MLX's only fence of this kind, and a slow one: it polls at growing intervals.
    """
    (token,) = depend([mx.array(0.0)], list(arrays))
    return [mx.add(token, 1.0, stream=mx.cpu)]


def fence_on_release(arrays: Sequence[mx.array], lag: int) -> list[mx.array]:
    """Return a scalar, made by the CUDA launcher, that is available once MLX has freed the arrays' inputs.

    `lag`: number of preceding fences that may still be pending, whose tiles may still be in memory.
    """
    from attention.kernels.cuda.runtime import launcher

    (token,) = depend([mx.array(0.0)], [mx.stop_gradient(array) for array in arrays])
    return [launcher.module().passed(token, lag)]


UNORDERED: Final = TileOrder(no_fence, no_fence)
"""Ordering of tiles that may all be in memory together."""


def tile_order(backend: Backend) -> TileOrder:
    """Return the ordering of tiles that must not all be in memory together, on a backend."""
    return _on_cuda() if backend == "cuda" else UNORDERED


@cache
def _on_cuda() -> TileOrder:
    """Return the launcher's fences (compiled on first use), or MLX's if the launcher is unavailable."""
    from attention.kernels.cuda.runtime import launcher

    if not mx.cuda.is_available() or launcher.unavailable_reason():
        return TileOrder(fence_on_completion, fence_on_completion)
    return TileOrder(partial(fence_on_release, lag=1), partial(fence_on_release, lag=0))


VIEWS: Final = 12
"""Pairs of views that equal the depth of a tile's graph; each pair is two nodes."""
TILES: Final = 8
"""Number of tiles after which the views get an anchor."""


class TileWriter:
    """An array that blocks are written into in place, which requires that nothing else references it, not even a chain.

    MLX evaluates a graph breadth-first from its outputs: writes, which depend only on one another, would all come last,
    when every block is in memory. Views between two writes make their path as deep as the path through the tiles.
    """

    def __init__(self, zeros: mx.array, chain: Chain) -> None:
        """Create it with the initial array."""
        self.array = zeros
        self._chain = chain

    def write(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """Write a part computed from `tiles` tiles; return it in the array's dtype, for a chain to hold."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array[place] = part
        self.array = self._chain.anchor(self.array)
        return part

    def add(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """Add a part to the current contents; arguments as in `write`."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array = self._chain.anchor(self.array.at[place].add(part))
        return part

    def _wait(self, tiles: int) -> None:
        for tile in range(1, tiles + 1):
            for _ in range(VIEWS):
                self.array = self.array[None].squeeze(0)
            if tile % TILES == 0:
                self.array = self._chain.anchor(self.array)
