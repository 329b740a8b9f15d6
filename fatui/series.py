"""Values over time in a bounded buffer: when it is full, neighbours are merged and it goes on at half the detail."""

from typing import Final

MOST_POINTS: Final = 512


class Series:
    """A trend of what was measured.

    Attributes:
        points: the trend so far, oldest first; each the mean of `per_point` values.
        last, highest: the latest and the highest single value, None before the first.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self.points: list[float] = []
        self.per_point = 1
        self.last: float | None = None
        self.highest: float | None = None
        self._most = most
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Take in one value."""
        self.last = value
        self.highest = value if self.highest is None else max(self.highest, value)
        self._sum += value
        self._count += 1
        if self._count >= self.per_point:
            self.points.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.points) >= self._most:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=False)]
            self.per_point *= 2
