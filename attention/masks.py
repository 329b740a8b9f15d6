"""What a query may see: the meaning of every mask, in one place."""

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    import mlx.core as mx


class Mask(Struct, frozen=True, kw_only=True, eq=False):
    """Which keys each query attends to. All parts that are given must let a pair through.

    Query row i of Lq stands at position i + Lk - Lq among the Lk keys (lower-right alignment).
    """

    causal: bool = False
    """A query sees no key after its own position."""
    window: int | None = None
    """A query sees only the last `window` keys that end at its own position; implies causal."""
    array: "mx.array | None" = None
    """Broadcastable to (B, H, Lq, Lk): bool, True where a pair may be seen, or numbers that are added to the scores."""
