"""Routes: the code path of an implementation for a workload, and the reason."""

from typing import Final

from msgspec import Struct, ValidationError, convert, structs

MAX_PATH_LENGTH: Final = 22
FALLS_BACK: Final = "falls back: "
"""Start of the path of a route whose `fallback` is set."""


class Needs(Struct, frozen=True, kw_only=True):
    """Features of a call that a Workload does not describe; a route must support or refuse them."""

    softcap: bool = False
    """Scores are replaced by softcap * tanh(scores / softcap) before the mask."""
    array_mask: bool = False
    """The mask has a bool or additive array."""
    mask_batches: int = 1
    """Batches of the array mask or the pattern: 1 if it is the same for all."""
    mask_heads: int = 1
    """Heads of the array mask or the pattern."""
    mask_dtype: str | None = None
    """Type of the array mask; None is bool or the query's."""
    pattern: bool = False
    """The mask is a pattern of `attention.masks` beyond causal and window."""
    alibi: bool = False
    """A bias proportional to the distance of query and key is added to the scores."""
    logsumexp: bool = False
    """The logsumexp of each row is returned beside the output."""
    sinks: bool = False
    """Attention sinks: each head has an extra logit in the softmax, without a value."""


NO_NEEDS: Final = Needs()


class Route(Struct, frozen=True, kw_only=True):
    """The code path that a call would take."""

    path: str
    """Name of the path in at most 22 characters, for a table's column: "MLX SDPA, unfused"."""
    fused: bool | None
    """Whether one kernel computes the whole attention, so that the score matrix is never in memory; None if unknown."""
    reason: str
    """Why this path is taken, in one sentence."""
    supported: bool = True
    """Whether the implementation supports the workload; if not, `reason` names what it does not support."""
    fallback: bool = False
    """Whether this is a fallback, because the implementation's own path cannot run."""
    approximate: str | None = None
    """Arithmetic coarser than the inputs' dtype, such as "fp8"; its error has a tolerance of its own."""
    predicted_bytes: int | None = None
    """Peak memory above the inputs during one call, outputs included; None if unknown."""
    at_most: bool = False
    """Whether `predicted_bytes` is an upper bound, because a kernel that is not compiled yet cannot say."""
    scratch_bytes: int = 0
    """The part of it allocated outside MLX (tiles of threads), which MLX's peak does not include."""


def unsupported(reason: str) -> Route:
    """Return the route of an unsupported workload."""
    return Route(path="-", fused=False, reason=reason, supported=False)


def fitted(path: str) -> str:
    """Truncate a path to its column, ending in "…"."""
    return path if len(path) <= MAX_PATH_LENGTH else path[: MAX_PATH_LENGTH - 1] + "…"


def validated_route(route: object) -> Route:
    """Validate what an implementation returned as its route; a long path is truncated to its column.

    Raises:
        TypeError: it is not a Route, or a field has the wrong type.
    """
    if not isinstance(route, Route):
        raise TypeError(f"route() returned {type(route).__name__}; it must return an attention.core.route.Route")
    try:
        made = convert(structs.asdict(route), Route)
    except ValidationError as error:
        raise TypeError(f"route() returned a Route with a wrong field: {error}") from None
    if made.predicted_bytes is not None and made.predicted_bytes < 0:
        raise TypeError(f"route() returned a Route that predicts {made.predicted_bytes} bytes")
    return structs.replace(made, path=fitted(made.path))
