"""Whoever watches the calls that implementations get in a program, outside of any benchmark; and the paths that ran."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attention import forking

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.implementations.protocol import Implementation
    from attention.masks import Mask

Watcher = Callable[..., "mx.array"]
"""Called with the implementation and the arguments of its call, which it has to make once."""
watchers: list[Watcher] = []


class _Latest(threading.local):
    """The path of this thread's latest call."""

    path: str | None = None


_latest = _Latest()


def ran(path: str) -> None:
    """Records the path that a call takes; an implementation that chooses among paths does so when it has chosen."""
    _latest.path = path


def take_path() -> str | None:
    """Return the path recorded last in this thread and forget it; None where none was recorded."""
    path, _latest.path = _latest.path, None
    return path


def call(
    implementation: "Implementation", q: "mx.array", k: Any, v: Any, *, scale: float, mask: "Mask", **more: Any
) -> "mx.array":
    """Calls an implementation, through the watcher that came last where there is one.

    Raises:
        ForkedError: attention was computed before this process was forked.
    """
    forking.check()
    if watchers:
        return watchers[-1](implementation, q, k, v, scale=scale, mask=mask, **more)
    return implementation(q, k, v, scale=scale, mask=mask, **more)
