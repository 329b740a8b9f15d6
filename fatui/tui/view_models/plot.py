"""Plots of lines with intervals on linear or logarithmic axes, drawn in Braille with ticks, marks and words."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from msgspec import Struct

from fatui import formatting
from fatui.tui.view_models.braille import ACROSS, DOWN, NOBODY, Canvas, Cells

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
    for note in plot.notes:
        _note(canvas, across(note.x) // ACROSS, down(note.y) // DOWN, note)
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


def _note(canvas: Canvas, column: int, row: int, note: Note) -> None:
    if note.sign.strip():
        column = _free(canvas, column, row)
        canvas.put(column, row, note.sign, note.number)
    start = column + 2
    if start + len(note.words) > canvas.columns:
        start = column - 1 - len(note.words)
    for other in (row, row - 1, row + 1, row - 2, row + 2):
        places = range(start, start + len(note.words))
        if 0 <= other < canvas.rows and start >= 0 and all(canvas.is_free(place, other) for place in places):
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
        made[-2][LEFT + 1 + cursor] = "▲", CURSOR
    return made
