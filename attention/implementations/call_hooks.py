"""Hooks on the calls of implementations in a program, outside any benchmark; and the paths that ran."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attention.core import forking

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.implementations.protocol import Implementation
    from attention.masks import Mask

CallHook = Callable[..., "mx.array"]
"""Called with the implementation and the arguments of a call; it must make that call exactly once."""
hooks: list[CallHook] = []


class _LatestPath(threading.local):
    """The path of this thread's latest call."""

    path: str | None = None


_latest = _LatestPath()


def record_path(path: str) -> None:
    """Record the path that a call takes; called by implementations that choose among paths, after the choice."""
    _latest.path = path


def take_path() -> str | None:
    """Return the path recorded last in this thread and clear it; None if none was recorded."""
    path, _latest.path = _latest.path, None
    return path


def call_through_hooks(
    implementation: "Implementation", q: "mx.array", k: Any, v: Any, *, scale: float, mask: "Mask", **more: Any
) -> "mx.array":
    """Call an implementation, through the most recent hook if there is one.

    Raises:
        ForkedError: attention was computed before this process was forked.
    """
    forking.check()
    if hooks:
        return hooks[-1](implementation, q, k, v, scale=scale, mask=mask, **more)
    return implementation(q, k, v, scale=scale, mask=mask, **more)
