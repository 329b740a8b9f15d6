"""Memory fences: wait until a GPU has finished and freed memory before queueing more.

MLX keeps every buffer that a kernel reads until its command buffer is done, and on CUDA queues up to ten command
buffers of a gigabyte each ahead of the GPU: without a fence, tiles meant to run one after another are all in memory.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Final

import mlx.core as mx
from msgspec import Struct

from attention.device import Backend
from attention.implementations.chain import ordered

AT_ONCE: Final[dict[Backend, float]] = {"cpu": 1.0, "cuda": 2.2, "metal": 12.0}
"""Number of tiles that may be in memory at once.

On CUDA the next tile is queued while one runs. On Metal, without such a fence, it is the number of command buffers in
flight: ten, one being filled and one being released; derived from MLX's source, not measured.
"""
Passed = Callable[[Sequence[mx.array]], list[mx.array]]
"""Returns arrays that later tiles depend on, given the arrays computed by earlier tiles."""


class Turns(Struct, frozen=True):
    """The ordering of tiles."""

    next: Passed
    """Used before a tile that may be in memory together with the previous one."""
    alone: Passed
    """Used before a tile that may not."""


def at_once(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays themselves: later tiles wait only until these are queued."""
    return list(arrays)


def when_done(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return a scalar computed on the CPU stream after the arrays; on CUDA it fences whatever depends on it.

    It is MLX's only fence of this kind, and a slow one: it polls at growing intervals.
    """
    (token,) = ordered([mx.array(0.0)], list(arrays))
    return [mx.add(token, 1.0, stream=mx.cpu)]


def when_released(arrays: Sequence[mx.array], behind: int) -> list[mx.array]:
    """Return a scalar, made by the CUDA launcher, that is available once MLX has freed the arrays' inputs.

    `behind`: number of preceding fences that may still be pending, whose tiles may still be in memory.
    """
    from attention.kernels.cuda import launcher

    (token,) = ordered([mx.array(0.0)], [mx.stop_gradient(array) for array in arrays])
    return [launcher.module().passed(token, behind)]


QUEUED: Final = Turns(at_once, at_once)
"""Ordering of tiles that may all be in memory together."""


def turns(backend: Backend) -> Turns:
    """Return the ordering of tiles that must not all be in memory together, on a backend."""
    return _on_cuda() if backend == "cuda" else QUEUED


@cache
def _on_cuda() -> Turns:
    """Return the launcher's fences (compiled on first use), or MLX's if the launcher is unavailable."""
    from attention.kernels.cuda import launcher

    if not mx.cuda.is_available() or launcher.missing():
        return Turns(when_done, when_done)
    return Turns(partial(when_released, behind=1), partial(when_released, behind=0))
