"""Where the tokens of an endless sequence are kept: the first ones, and a ring of the latest.

    slots     0 .. first-1 | first                                    first + ring - 1
              first tokens | tokens of this lap -> | <- tokens of the lap before
                                        newest ----^^---- oldest

A token's slot is its position in the rotary sense too, so positions are bounded for ever, and a lap later the distance
of a query to the keys of the lap before is that of slots, plus the ring.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from attention.core.errors import UsageError

HeadKind = Literal["streaming", "full"]
MAX_TOKENS = 2**31 - 1
"""Slots are 32-bit numbers in kernels."""


class Layout(Struct, frozen=True):
    """Numbers of tokens: kept from the start, attended to among the latest, and kept beyond those for rewinds."""

    first: int
    window: int
    spare: int = 0

    def __post_init__(self) -> None:
        """Raise UsageError for numbers out of range."""
        problems = [
            f"{name}: got {value!r}; it takes a whole number from {least} to {MAX_TOKENS}"
            for name, value, least in (("first", self.first, 0), ("window", self.window, 1), ("spare", self.spare, 0))
            if type(value) is not int or not least <= value <= MAX_TOKENS
        ]
        if problems:
            raise UsageError(*problems)

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.window + self.spare

    @property
    def slots(self) -> int:
        """All slots."""
        return self.first + self.ring

    def slot(self, position: int) -> int:
        """Return the slot of a token."""
        return position if position < self.first else self.first + (position - self.first) % self.ring

    def lap(self, position: int) -> int:
        """Return how often the ring was filled before a token."""
        return max(0, position - self.first) // self.ring

    def slots_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of tokens."""
        ring = self.first + (positions - self.first) % self.ring
        return np.where(positions < self.first, positions, ring)

    def by_slot(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Split the tokens [begin, end) where their slots are not consecutive."""
        while begin < end:
            stop = self.first + (self.lap(begin) + 1) * self.ring
            yield begin, min(end, stop)
            begin = stop


class Row(Struct):
    """The tokens of one sequence of a batch."""

    seen: int = 0
    """Number of tokens, and the position of the next one."""
    oldest: int = 0
    """Position of the oldest token that is still in the ring; those between the first tokens and it are gone."""

    def advance(self, layout: Layout, tokens: int) -> None:
        """Count tokens that were written."""
        self.seen += tokens
        self.overwrite(layout, self.seen)

    def overwrite(self, layout: Layout, end: int) -> None:
        """Count as gone what the tokens before position `end` replaced in the ring."""
        self.oldest = max(self.oldest, layout.first, end - layout.ring)

    def begins(self, layout: Layout, position: int) -> int:
        """Return the position of the oldest token of the ring that a query at a position attends to."""
        return max(layout.first, self.oldest, position - layout.window + 1)

    def kept(self, layout: Layout) -> NDArray[np.int64]:
        """Return the positions that the latest query attends to, in order."""
        if self.seen <= layout.first:
            return np.arange(self.seen)
        latest = np.arange(self.begins(layout, self.seen - 1), self.seen)
        return np.concatenate([np.arange(layout.first), latest])

    def removable(self, layout: Layout) -> int:
        """Return how many tokens a rewind can take back."""
        return self.seen if self.oldest <= layout.first else self.seen - self.oldest

    def removable_exactly(self, layout: Layout) -> int:
        """Return how many tokens a rewind can take back with none missing from the window then."""
        return self.seen if self.oldest <= layout.first else max(0, self.seen - layout.window - self.oldest)
