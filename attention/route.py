"""Which code path an implementation takes for a workload, and why."""

from typing import Final

from msgspec import Struct


class Needs(Struct, frozen=True, kw_only=True):
    """What a call asks for beyond what a Workload says; a route must take it or refuse it."""

    softcap: bool = False
    """Scores are squashed to softcap * tanh(scores / softcap) before the mask."""
    array_mask: bool = False
    """A bool or additive array is given as mask."""
    sinks: bool = False
    """Each head has a score that takes part in the softmax and has no value."""


PLAIN: Final = Needs()


class Route(Struct, frozen=True, kw_only=True):
    """The path that would run, told before it runs."""

    path: str
    """The path in at most 22 characters, as the table's column shows it: "MLX SDPA, unfused"."""
    fused: bool
    """Whether one kernel does the whole attention, so that the score matrix never reaches memory."""
    reason: str
    """Why this path and no other, in one sentence."""
    supported: bool = True
    """Whether the implementation takes the workload at all; if not, `reason` says what it does not take."""
    fallback: bool = False
    """Whether this is not the implementation's own path but what it takes where that cannot run."""
    predicted_bytes: int | None = None
    """Peak memory above the inputs while one call runs, outputs included; None where it cannot be known."""


def unsupported(reason: str) -> Route:
    """A route for what an implementation does not take."""
    return Route(path="-", fused=False, reason=reason, supported=False)
