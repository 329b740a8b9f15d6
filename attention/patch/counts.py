"""What became of the calls that a patch saw."""

import threading
from collections import Counter


class Counts:
    """How many calls an implementation took, by path, and how many MLX's own got, by reason.

    A call is one in Python: what `mx.compile` has traced runs again without another.

    Attributes:
        taken: calls that the implementation took, by the path that ran.
        handed: calls that went to MLX's own, by the reason.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, path: str) -> None:
        """Counts a call that the implementation took."""
        with self._lock:
            self.taken[path] += 1

    def hand(self, reason: str) -> None:
        """Counts a call that went to MLX's own."""
        with self._lock:
            self.handed[reason] += 1

    @property
    def calls_taken(self) -> int:
        """All calls that the implementation took."""
        return self.taken.total()

    @property
    def calls_handed(self) -> int:
        """All calls that went to MLX's own."""
        return self.handed.total()

    def lines(self, name: str) -> list[str]:
        """The counts in words, the most frequent first."""
        if not (self.taken or self.handed):
            return [f"{name}: no call of mlx-lm's attention was seen"]
        taken = [f"{name} took {count:,} as {path}" for path, count in self.taken.most_common()]
        handed = [f"MLX's own got {count:,}: {reason}" for reason, count in self.handed.most_common()]
        total = f"{name} took {self.calls_taken:,} of {self.calls_taken + self.calls_handed:,} calls of attention"
        return [total, *taken, *handed]
