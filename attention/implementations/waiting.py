"""Letting a GPU finish, and let go of memory, before more is queued.

MLX keeps every buffer that a kernel reads until its command buffer is done, and on CUDA queues up to ten of these, each
of a gigabyte, ahead of the GPU: whatever tiles are meant to follow each other, all of them are in memory then. Only
where an array passes from one stream to another does MLX's CUDA backend wait on the host.
"""

import threading
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


class _Streams(threading.local):
    def __init__(self) -> None:
        self.beside: dict[mx.DeviceType, mx.Stream] = {}


_streams = _Streams()


def at_once(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The arrays themselves: nothing is waited for but their being queued."""
    return list(arrays)


def when_done(arrays: Sequence[mx.array]) -> list[mx.array]:
    """A number that is there once the device has computed the arrays; on CUDA its evaluation waits for them."""
    (token,) = mx.depends([mx.zeros(())], list(arrays))
    return [mx.add(token, 1, stream=_side_stream())]


def passed(backend: Backend) -> Passed:
    """How tiles that must not be in memory together follow each other on a backend."""
    return when_done if backend == "cuda" else at_once


def _side_stream() -> mx.Stream:
    """A stream of this thread beside its default one, on the same device."""
    device = mx.default_device()
    if device.type not in _streams.beside:
        _streams.beside[device.type] = mx.new_stream(device)
    return _streams.beside[device.type]
