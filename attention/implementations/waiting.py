"""Letting a GPU finish, and let go of memory, before more is queued.

MLX keeps every buffer that a kernel reads until its command buffer is done, and on CUDA queues up to ten of these, each
of a gigabyte, ahead of the GPU: whatever tiles are meant to follow each other, all of them are in memory then.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Final

import mlx.core as mx
from msgspec import Struct

from attention.device import Backend
from attention.implementations.chain import ordered

AT_ONCE: Final[dict[Backend, float]] = {"cpu": 1.0, "cuda": 2.2, "metal": 12.0}
"""Tiles that may be in memory at once.

On CUDA the next one is queued while one runs. On Metal, where MLX does not wait like that, there are as many as command
buffers under way: ten, one that is being filled, and one that is let go; read from MLX's source, not measured.
"""
Passed = Callable[[Sequence[mx.array]], list[mx.array]]
"""What later tiles have to wait for, given what earlier ones computed."""


class Turns(Struct, frozen=True):
    """How tiles follow each other."""

    next: Passed
    """For a tile that may be in memory together with the last one."""
    alone: Passed
    """For one that may not."""


def at_once(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The arrays themselves: nothing is waited for but their being queued."""
    return list(arrays)


def when_done(arrays: Sequence[mx.array]) -> list[mx.array]:
    """A number that the processor makes once the arrays are there; on CUDA nothing that needs it is queued before.

    It is MLX's only wait of this kind, and a slow one: what it asks for, it asks for at intervals that grow.
    """
    (token,) = ordered([mx.array(0.0)], list(arrays))
    return [mx.add(token, 1.0, stream=mx.cpu)]


def when_released(arrays: Sequence[mx.array], behind: int) -> list[mx.array]:
    """A number that is there once MLX has let go of what the arrays were made from, by the CUDA launcher.

    `behind` is how many such waits before this one need not be over: their tiles may still be in memory.
    """
    from attention.kernels.cuda import launcher

    (token,) = ordered([mx.array(0.0)], [mx.stop_gradient(array) for array in arrays])
    return [launcher.module().passed(token, behind)]


QUEUED: Final = Turns(at_once, at_once)
"""Tiles that may all be in memory together."""


def turns(backend: Backend) -> Turns:
    """How tiles that must not all be in memory together follow each other on a backend."""
    return _on_cuda() if backend == "cuda" else QUEUED


@cache
def _on_cuda() -> Turns:
    """By the launcher, which is compiled at first use, or else by MLX's own means."""
    from attention.kernels.cuda import launcher

    if not mx.cuda.is_available() or launcher.missing():
        return Turns(when_done, when_done)
    return Turns(partial(when_released, behind=1), partial(when_released, behind=0))
