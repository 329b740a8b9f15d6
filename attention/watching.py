"""Whoever watches the calls that implementations get in a program, outside of any benchmark."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.implementations.protocol import Implementation
    from attention.masks import Mask

Watcher = Callable[..., "mx.array"]
"""Called with the implementation and the arguments of its call, which it has to make once."""
watchers: list[Watcher] = []


def call(
    implementation: "Implementation", q: "mx.array", k: Any, v: Any, *, scale: float, mask: "Mask", **more: Any
) -> "mx.array":
    """Calls an implementation, through the watcher that came last where there is one."""
    if watchers:
        return watchers[-1](implementation, q, k, v, scale=scale, mask=mask, **more)
    return implementation(q, k, v, scale=scale, mask=mask, **more)
