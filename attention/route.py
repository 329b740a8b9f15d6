"""Which code path an implementation takes for a workload, and why."""

from typing import Final

from msgspec import Struct, ValidationError, convert, structs

LONGEST_PATH: Final = 22


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
    scratch_bytes: int = 0
    """What of it is allocated outside of MLX, as threads' tiles are, and so is missing in MLX's own peak."""


def unsupported(reason: str) -> Route:
    """A route for what an implementation does not take."""
    return Route(path="-", fused=False, reason=reason, supported=False)


def checked(route: object) -> Route:
    """Return what an implementation gave as its route, with a path that fits its column.

    Raises:
        TypeError: it is no route, or one whose fields are of other types than they should be.
    """
    if not isinstance(route, Route):
        raise TypeError(f"route() returned {type(route).__name__}; it must return an attention.route.Route")
    try:
        made = convert(structs.asdict(route), Route)
    except ValidationError as error:
        raise TypeError(f"route() returned a Route with a wrong field: {error}") from None
    if made.predicted_bytes is not None and made.predicted_bytes < 0:
        raise TypeError(f"route() returned a Route that predicts {made.predicted_bytes} bytes")
    if len(made.path) > LONGEST_PATH:
        made = structs.replace(made, path=made.path[: LONGEST_PATH - 1] + "…")
    return made
