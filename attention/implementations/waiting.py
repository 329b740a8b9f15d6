"""Letting a GPU finish, and let go of memory, before more is queued.

MLX keeps every buffer that a kernel reads until its command buffer is done, and on CUDA queues up to ten of these, each
of a gigabyte, ahead of the GPU: whatever tiles are meant to follow each other, all of them are in memory then. Only
where an array passes from the GPU to the processor does MLX's CUDA backend wait while it queues.
"""

from collections.abc import Callable, Sequence
from typing import Final

import mlx.core as mx

from attention.device import Backend

AT_ONCE: Final[dict[Backend, float]] = {"cpu": 1.0, "cuda": 2.2, "metal": 12.0}
"""Tiles that may be in memory at once.

On CUDA one is let go while the next begins. On Metal, where MLX does not wait like that, there are as many as command
buffers under way: ten, one that is being filled, and one that is let go; read from MLX's source, not measured.
"""
Passed = Callable[[Sequence[mx.array]], list[mx.array]]
"""What later tiles have to wait for, given what earlier ones computed."""


def at_once(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The arrays themselves: nothing is waited for but their being queued."""
    return list(arrays)


def when_done(arrays: Sequence[mx.array]) -> list[mx.array]:
    """A number that the processor makes once the arrays are there; on CUDA nothing that needs it is queued before."""
    (token,) = mx.depends([mx.array(0.0)], list(arrays))
    return [mx.add(token, 1.0, stream=mx.cpu)]


def passed(backend: Backend) -> Passed:
    """How tiles that must not be in memory together follow each other on a backend."""
    return when_done if backend == "cuda" else at_once
