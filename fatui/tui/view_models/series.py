"""A time series in a bounded buffer; when it is full, neighbours are merged and the resolution halves."""

from collections.abc import Sequence
from typing import Final

MAX_POINTS: Final = 512


class Series:
    """A time series of a measured value.

    Attributes:
        points: the series so far, oldest first; each point is the mean of `per_point` values.
        last, highest: the latest and the highest single value; None before the first.
    """

    def __init__(self, most: int = MAX_POINTS) -> None:
        self.points: list[float] = []
        self.per_point = 1
        self.last: float | None = None
        self.highest: float | None = None
        self._max_points = most
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self.last = value
        self.highest = value if self.highest is None else max(self.highest, value)
        self._sum += value
        self._count += 1
        if self._count >= self.per_point:
            self.points.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.points) >= self._max_points:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=False)]
            self.per_point *= 2


BLOCKS: Final = " ▁▂▃▄▅▆▇█"


def histogram(samples: Sequence[float], *, width: int, height: int) -> list[str]:
    """Return rows of blocks from the top down; the fullest bin reaches the top, and no sample is invisible."""
    low, high = min(samples), max(samples)
    counts = [0] * width
    for sample in samples:
        place = (sample - low) / (high - low) if high > low else 0.5
        counts[min(int(place * width), width - 1)] += 1
    steps = height * (len(BLOCKS) - 1)
    filled = [-(-count * steps // max(counts)) for count in counts]
    rows = range(height - 1, -1, -1)
    return ["".join(BLOCKS[min(max(level - row * 8, 0), 8)] for level in filled).rstrip() for row in rows]
