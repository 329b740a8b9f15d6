"""Attention over keys in several places, each with its own query: a softmax for each, joined by their logsumexps."""

from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx
from msgspec import Struct

from attention.core.errors import UnsupportedError
from attention.implementations.calls import call_through_hooks, with_logsumexp
from attention.implementations.protocol import Implementation, ReturnsLogsumexp
from attention.masks import Mask
from attention.quantized_kv import KeyOrValue

ALL_SEEN: Final = Mask()
LEAST_SUM: Final = 1e-37
"""Divides the zeros of rows that see nothing; the sum of other rows is at least 1."""


class Part(Struct, frozen=True, eq=False):
    """Keys and values (B, Hkv, n, ·) in one place, the query (B, H, Lq, D) rotated for them, and what it sees."""

    q: mx.array
    k: KeyOrValue
    v: KeyOrValue
    mask: Mask = ALL_SEEN


class Settings(Struct, frozen=True, eq=False):
    """What all parts of a call have in common."""

    implementation: Implementation
    scale: float
    softcap: float | None = None
    sinks: mx.array | None = None
    """(H,): one more logit of each head's softmax, without a value."""


def attend_parts(parts: Sequence[Part], settings: Settings) -> mx.array:
    """Return attention (B, H, Lq, Dv) over the keys of all parts together.

    Raises:
        UnsupportedError: there is more than one softmax to join, and the implementation returns no logsumexp.
    """
    named: dict[str, Any] = {"scale": settings.scale, "softcap": settings.softcap}
    chosen: Any = settings.implementation
    if len(parts) == 1 and settings.sinks is None:
        (part,) = parts
        alone: mx.array = call_through_hooks(chosen, part.q, part.k, part.v, mask=part.mask, **named)
        return alone
    if not isinstance(chosen, ReturnsLogsumexp):
        raise UnsupportedError(f"{chosen.name}: it does not return the logsumexp; practical does")
    called = with_logsumexp(chosen)
    found = [call_through_hooks(called, part.q, part.k, part.v, mask=part.mask, **named) for part in parts]
    return _joined([out for out, _ in found], [lse for _, lse in found], settings.sinks)


def _joined(outputs: Sequence[mx.array], logsumexps: Sequence[mx.array], sinks: mx.array | None) -> mx.array:
    """Return the outputs (B, H, Lq, Dv) weighted by the sums of their exponentials; rows that see nothing are 0."""
    if sinks is not None:
        logsumexps = [*logsumexps, mx.broadcast_to(sinks.astype(mx.float32)[:, None], logsumexps[0].shape)]
    top = logsumexps[0]
    for lse in logsumexps[1:]:
        top = mx.maximum(top, lse)
    base = mx.where(mx.isfinite(top), top, 0)
    weights = [mx.exp(lse - base) for lse in logsumexps]
    total = mx.maximum(sum(weights[1:], weights[0]), LEAST_SUM)
    made = sum(
        (out.astype(mx.float32) * (weight / total)[..., None] for out, weight in zip(outputs, weights, strict=False)),
        mx.zeros(1),
    )
    return made.astype(outputs[0].dtype)
