"""Counters of the calls that reach a patch."""

import threading
from collections import Counter


class Counts:
    """Counters of calls computed by an implementation, by path, and of calls passed on to MLX, by reason.

    Only calls in Python count: a function compiled by `mx.compile` runs again without one.

    Attributes:
        taken: calls computed by the implementation, by path.
        handed: calls passed on to MLX's own function, by reason.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, path: str) -> None:
        """Count a call computed by the implementation."""
        with self._lock:
            self.taken[path] += 1

    def hand(self, reason: str) -> None:
        """Count a call passed on to MLX's own function."""
        with self._lock:
            self.handed[reason] += 1

    @property
    def calls_taken(self) -> int:
        """Number of calls computed by the implementation."""
        return self.taken.total()

    @property
    def calls_handed(self) -> int:
        """Number of calls passed on to MLX's own function."""
        return self.handed.total()

    def lines(self, name: str) -> list[str]:
        """Return the counts as lines of text, the most frequent first."""
        if not (self.taken or self.handed):
            return [f"{name}: no call of mlx-lm's attention was seen"]
        taken = [f"{name} took {count:,} as {path}" for path, count in self.taken.most_common()]
        handed = [f"MLX's own got {count:,}: {reason}" for reason, count in self.handed.most_common()]
        total = f"{name} took {self.calls_taken:,} of {self.calls_taken + self.calls_handed:,} calls of attention"
        return [total, *taken, *handed]
