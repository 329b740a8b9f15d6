"""Drawing in Braille characters, each of which has two columns of four dots.

The plot widgets for Textual need numpy, whose import takes a quarter of a second, and give all series of a cell one
colour without saying which; here each cell keeps the number of the series that was drawn last.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

ACROSS: Final = 2
DOWN: Final = 4
"""Dots of a character."""
BITS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot, by column and by row from the top."""
BLANK: Final = 0x2800
NOBODY: Final = -1
Cells = list[list[tuple[str, int]]]
"""Rows of (character, number of the series), NOBODY for none."""


class Canvas:
    """A grid of characters to draw in, with the origin at its top left corner; dots outside of it are dropped."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = max(1, columns), max(1, rows)
        self._bits = [[0] * self.columns for _ in range(self.rows)]
        self._owner = [[NOBODY] * self.columns for _ in range(self.rows)]
        self._glyphs: dict[tuple[int, int], tuple[str, int]] = {}

    @property
    def width(self) -> int:
        """Dots across."""
        return self.columns * ACROSS

    @property
    def height(self) -> int:
        """Dots down."""
        return self.rows * DOWN

    def dot(self, x: int, y: int, number: int = NOBODY) -> None:
        """Set a dot, of a series."""
        if 0 <= x < self.width and 0 <= y < self.height:
            column, row = x // ACROSS, y // DOWN
            self._bits[row][column] |= BITS[x % ACROSS][y % DOWN]
            if number != NOBODY:
                self._owner[row][column] = number

    def line(self, start: tuple[int, int], end: tuple[int, int], number: int = NOBODY, *, every: int = 1) -> None:
        """Draw a straight line; `every`: only each so many dots, for a dotted one."""
        (x0, y0), (x1, y1) = start, end
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(0, steps + 1, every):
            self.dot(x0 + round((x1 - x0) * step / steps), y0 + round((y1 - y0) * step / steps), number)

    def put(self, column: int, row: int, glyph: str, number: int = NOBODY) -> None:
        """Put another character into a cell, over its dots."""
        if 0 <= column < self.columns and 0 <= row < self.rows:
            self._glyphs[column, row] = glyph, number

    def is_free(self, column: int, row: int) -> bool:
        """Whether no other character is in a cell."""
        return (column, row) not in self._glyphs

    def cells(self) -> Cells:
        """Return the characters."""
        made = [
            [(chr(BLANK | bits) if bits else " ", owner) for bits, owner in zip(row, owners, strict=True)]
            for row, owners in zip(self._bits, self._owner, strict=True)
        ]
        for (column, row), found in self._glyphs.items():
            made[row][column] = found
        return made


def _filled(left: int, right: int) -> str:
    """Return the character whose columns are filled from the bottom to two heights."""
    bits = sum(BITS[side][DOWN - 1 - dot] for side, height in enumerate((left, right)) for dot in range(height))
    return chr(BLANK | bits) if bits else " "


FILLED: Final = [[_filled(left, right) for right in range(DOWN + 1)] for left in range(DOWN + 1)]


def stretched(points: Sequence[float], width: int) -> list[float]:
    """Return `width` values: means of equal stretches of the points, or each point repeated if they are fewer."""
    count = len(points)
    if not count:
        return []
    edges = [index * count // width for index in range(width + 1)]
    return [sum(points[a : max(b, a + 1)]) / max(b - a, 1) for a, b in pairwise(edges)]


def area(points: Sequence[float], high: float, columns: int, rows: int) -> list[str]:
    """Return rows of characters, from the top, filled from zero up to each value; what is above `high` is cut off."""
    steps = rows * DOWN
    values = stretched(points, columns * ACROSS)
    scale = steps / high if high > 0 else 0.0
    heights = [(round(min(value * scale, steps)) or 1) if value > 0 < scale else 0 for value in values]
    drawn = []
    for row in range(rows - 1, -1, -1):
        levels = [min(max(height - row * DOWN, 0), DOWN) for height in range(steps + 1)]
        cells = zip(heights[::2], heights[1::2], strict=True)
        drawn.append("".join(FILLED[levels[a]][levels[b]] for a, b in cells))
    return drawn
