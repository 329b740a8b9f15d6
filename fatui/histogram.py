"""A histogram drawn with block characters."""

from collections.abc import Sequence
from typing import Final

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
