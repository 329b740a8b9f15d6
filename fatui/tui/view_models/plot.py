"""Plots of lines with intervals on linear or logarithmic axes, drawn in Braille with ticks, marks and words."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from msgspec import Struct

from fatui import formatting

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
    return [points[a] if b - a < 2 else sum(points[a:b]) / (b - a) for a, b in pairwise(edges)]


def area(points: Sequence[float], high: float, columns: int, rows: int) -> list[str]:
    """Return rows of characters, from the top, filled from zero up to each value; what is above `high` is cut off."""
    steps = rows * DOWN
    scale = steps / high if high > 0 else 0.0
    heights = [round(value * scale) or value > 0 < scale for value in stretched(points, columns * ACROSS)]
    if heights and max(heights) > steps:
        heights = [min(height, steps) for height in heights]
    lowest, highest = min(heights, default=0), max(heights, default=0)
    drawn = []
    for bottom in range(steps - DOWN, -1, -DOWN):
        if highest <= bottom:
            drawn.append(FILLED[0][0] * columns)
        elif lowest >= bottom + DOWN:
            drawn.append(FILLED[DOWN][DOWN] * columns)
        else:
            filled = [min(max(height - bottom, 0), DOWN) for height in range(steps + 1)]
            levels = [filled[height] for height in heights]
            drawn.append("".join([FILLED[left][right] for left, right in zip(levels[::2], levels[1::2], strict=True)]))
    return drawn


LEFT: Final = 9
"""Characters of the labels of the vertical axis."""
BELOW: Final = 2
"""Rows below the plot: the horizontal axis and its labels."""
MARKS: Final = "●■▲◆✚✖○□△◇"
CROSSING: Final = "╳"
GRID: Final = 6
"""Every so many dots of a grid line are drawn."""
CURSOR: Final = -2
"""Number of what belongs to the cursor."""
CURSOR_SIGN: Final = "┃"
"""The cursor on the horizontal axis: neither a mark of a series nor a tick, in ASCII too."""
NOTED: Final = -3
"""Number of crossings and their words."""
MAX_TICKS: Final = 6


class Axis(Struct, frozen=True):
    """One axis: its ends, its scale, and the ticks with their words."""

    low: float
    high: float
    logarithmic: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high end; values beyond are put at the ends."""
        if self.high <= self.low:
            return 0.5
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Point(Struct, frozen=True):
    """A point with its interval."""

    x: float
    y: float
    low: float
    high: float


class Line(Struct, frozen=True):
    """Points of one series, joined by a line."""

    number: int
    """Gives its style and mark."""
    points: tuple[Point, ...]
    marked: bool = True
    """Whether each point has the mark of the series."""
    joined: bool = True
    every: int = 1
    """Every so many dots of the line are drawn: more than 1 for a dotted one."""


class Note(Struct, frozen=True):
    """A sign at a place in the plot, with words beside it."""

    x: float
    y: float
    sign: str
    words: str = ""
    number: int = NOTED


class Plot(Struct, frozen=True):
    """Lines on common axes."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    notes: tuple[Note, ...] = ()
    cursor: float | None = None
    """Where a vertical line stands on the horizontal axis."""


UNITS: Final = tuple(float(factor) for factor, _ in reversed(formatting.BINARY))
"""Bytes of the units of sizes, from the smallest."""


def decades(low: float, high: float, say: Callable[[float], str] = formatting.rate) -> Axis:
    """Return a logarithmic axis with a tick at each power of ten, or at 1, 2 and 5 times it if there is but one."""
    low, high = low / 1.15, high * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    shown = [tick for power in powers if low <= (tick := 10.0**power) <= high]
    if say is formatting.size:
        shown = [tick for unit in UNITS for step in (1, 10, 100) if low <= (tick := step * unit) <= high]
    if len(shown) < 2:
        shown = [tick for power in powers for step in (1, 2, 5) if low <= (tick := step * 10.0**power) <= high]
    shown = shown[:: -(-len(shown) // MAX_TICKS) or 1]
    return Axis(low, high, True, tuple((tick, tick_text(tick, say)) for tick in shown))


def from_zero(high: float, say: Callable[[float], str] = formatting.rate) -> Axis:
    """Return a linear axis from zero with ticks that are round in the unit in which they are written."""
    high = high * 1.05 or 1.0
    unit = max((unit for unit in UNITS if unit <= high), default=1.0) if say is formatting.size else 1.0
    step = unit * 10.0 ** math.floor(math.log10(high / unit))
    step = next(part * step for part in (0.2, 0.5, 1, 2, 5) if high / (part * step) <= MAX_TICKS - 1)
    count = int(high / step)
    return Axis(0.0, high, False, tuple((at * step, tick_text(at * step, say)) for at in range(count + 1)))


def tick_text(value: float, say: Callable[[float], str]) -> str:
    """Format a tick, without digits that are only zeros: "100 K", "0"."""
    if value == 0:
        return "0"
    number, _, unit = say(value).partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".rstrip()


def drawn(plot: Plot, width: int, height: int) -> Cells:
    """Draw a plot with its axes in a grid of characters; a glyph's number is that of its series, or one of the above.

    The lines are drawn in their order, so that the last one is on top; a mark moves beside one that is there already.
    """
    columns, rows = max(10, width - LEFT - 1), max(3, height - BELOW)
    canvas = Canvas(columns, rows)

    def across(value: float) -> int:
        return round(plot.x.place(value) * (canvas.width - 1))

    def down(value: float) -> int:
        return round((1 - plot.y.place(value)) * (canvas.height - 1))

    for tick, _ in plot.y.ticks:
        canvas.line((0, down(tick)), (canvas.width - 1, down(tick)), every=GRID)
    if plot.cursor is not None:
        canvas.line((across(plot.cursor), 0), (across(plot.cursor), canvas.height - 1), CURSOR, every=2)
    for line in plot.lines:
        for first, second in pairwise(line.points if line.joined else ()):
            start, end = (across(first.x), down(first.y)), (across(second.x), down(second.y))
            canvas.line(start, end, line.number, every=line.every)
    for line in plot.lines:
        for point in line.points if line.marked else ():
            x = across(point.x)
            canvas.line((x, down(point.low)), (x, down(point.high)), line.number)
            _mark(canvas, x // ACROSS, down(point.y) // DOWN, line.number)
    places = [_sign(canvas, across(note.x) // ACROSS, down(note.y) // DOWN, note) for note in plot.notes]
    for (column, row), note in zip(places, plot.notes, strict=True):
        _words(canvas, column, row, note)
    return _with_axes(plot, canvas, {down(tick) // DOWN: words for tick, words in plot.y.ticks}, across)


def mark_of(number: int) -> str:
    """Return the mark of a series."""
    return MARKS[number % len(MARKS)]


def _mark(canvas: Canvas, column: int, row: int, number: int) -> None:
    canvas.put(_free(canvas, column, row), row, mark_of(number), number)


def _free(canvas: Canvas, column: int, row: int) -> int:
    """Return the first column from one on without a mark, so that marks at one place stand side by side."""
    places = range(column, min(column + len(MARKS), canvas.columns))
    return next((place for place in places if canvas.is_free(place, row)), column)


def _sign(canvas: Canvas, column: int, row: int, note: Note) -> tuple[int, int]:
    """Put the sign of a note, and return where; all signs come before words, which give way to them."""
    if note.sign.strip():
        column = _free(canvas, column, row)
        canvas.put(column, row, note.sign, note.number)
    return column, row


def _words(canvas: Canvas, column: int, row: int, note: Note) -> None:
    """Put the words of a note beside its sign, where there is room."""
    start = column + 2
    if start + len(note.words) > canvas.columns:
        start = column - 1 - len(note.words)
    for other in (row, row - 1, row + 1, row - 2, row + 2):
        places = range(start, start + len(note.words))
        around = range(start - 1, places.stop + 1)  # two notes side by side have a gap between them
        if 0 <= other < canvas.rows and start >= 0 and all(canvas.is_free(place, other) for place in around):
            for place, letter in zip(places, note.words, strict=True):
                canvas.put(place, other, letter, note.number)
            return


def _with_axes(plot: Plot, canvas: Canvas, ticks: dict[int, str], across: Callable[[float], int]) -> Cells:
    made: Cells = []
    for row, cells in enumerate(canvas.cells()):
        words = ticks.get(row)
        head = f"{words:>{LEFT}}┤" if words is not None else " " * LEFT + "│"
        made.append([*((letter, NOBODY) for letter in head), *cells])
    axis = ["─"] * canvas.columns
    labels = [" "] * canvas.columns
    for at, words in plot.x.ticks:
        column = across(at) // ACROSS
        start = min(max(0, column - len(words) // 2), max(0, canvas.columns - len(words)))
        if all(label == " " for label in labels[max(0, start - 1) : start + len(words) + 1]):
            labels[start : start + len(words)] = words
            axis[column] = "┴"
    cursor = across(plot.cursor) // ACROSS if plot.cursor is not None else None
    made.append([(letter, NOBODY) for letter in " " * LEFT + "└" + "".join(axis)])
    made.append([(letter, NOBODY) for letter in " " * (LEFT + 1) + "".join(labels)[: canvas.columns]])
    if cursor is not None:
        made[-2][LEFT + 1 + cursor] = CURSOR_SIGN, CURSOR
    return made
