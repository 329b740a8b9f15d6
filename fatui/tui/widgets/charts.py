"""Charts of a sweep: a heat map of speedups, and lines of rates."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Final

from msgspec import Struct
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from attention.core.results import Row
from fatui import formatting
from fatui.quantities import format_number
from fatui.report.scaling import RatePoint, Value

CELL = 9
HEAD = 10


class HeatData(Struct, frozen=True):
    """The two axes and the row of each cell."""

    across: tuple[str, tuple[Value, ...]]
    down: tuple[str, tuple[Value, ...]]
    rows: Mapping[tuple[Value, Value], Row]


def format_value(value: Value) -> str:
    """Format a value of an axis."""
    return format_number(value) if isinstance(value, int) else value


def cell_text(row: Row | None) -> str:
    """Format a cell: the speedup, or the row's status."""
    if row is None:
        return "·"
    if row.status != "ok":
        return row.status[:CELL]
    if row.speedup is None:
        return formatting.UNKNOWN
    if row.speedup.low == row.speedup.high == 1:
        return "1"
    return f"{formatting.three(row.speedup.value)}x" if row.speedup.significant else "≈ 1"


class HeatMap(Widget):
    """Grid of speedups; the shade repeats the figure."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("heat--head", "heat--none", "heat--slower", "heat--same", "heat--faster", "heat--much-faster"),
    }

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.data: HeatData | None = None

    def show(self, data: HeatData | None) -> None:
        """Set the data."""
        self.data = data
        self.styles.height = len(data.down[1]) + 2 if data else 1
        self.refresh()

    def _style(self, row: Row | None) -> Style:
        part = "none"
        if row is not None and row.status == "ok" and row.speedup is not None:
            ratio = row.speedup
            part = "same" if not ratio.significant else "slower" if ratio.value < 1 else "faster"
            part = "much-faster" if part == "faster" and ratio.value >= 2 else part
        return self.get_component_rich_style(f"heat--{part}")

    def render_line(self, y: int) -> Strip:
        """Draw a heading row, or one row of cells."""
        head = self.get_component_rich_style("heat--head")
        if self.data is None:
            return Strip([Segment("A heat map needs a sweep over two axes.", head)])
        data = self.data
        if y == 0:
            parts = [Segment(f"{data.down[0]:<{HEAD}}{data.across[0]} →", head)]
        elif y == 1:
            parts = [Segment(" " * HEAD + "".join(f"{format_value(each):>{CELL}}" for each in data.across[1]), head)]
        elif y - 2 < len(data.down[1]):
            down = data.down[1][y - 2]
            parts = [Segment(f"{format_value(down):<{HEAD}}", head)]
            for across in data.across[1]:
                row = data.rows.get((across, down))
                parts.append(Segment(f"{cell_text(row):>{CELL}}", self._style(row)))
        else:
            parts = []
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)


LEFT: Final = 9
MARKS: Final = "●■▲◆✚✖○□△◇"
COLOURS: Final = 6
Cells = list[list[tuple[str, int]]]
"""Rows of (glyph, line number), -1 for no line."""


class ChartData(Struct, frozen=True):
    """The axis with its values, and the points of each name."""

    axis: str
    values: tuple[Value, ...]
    lines: Mapping[str, Sequence[RatePoint]]
    logarithmic: bool = False
    format: Callable[[float], str] = formatting.rate
    """Formats the ends of the scale."""


class LineChart(Widget):
    """Chart with a mark at each value and dots between; an interval is a bar if it is taller than its mark."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"chart--axis", *(f"chart--line-{index}" for index in range(COLOURS))}

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.data: ChartData | None = None
        self._drawn: tuple[object, Cells] = (None, [])

    def show(self, data: ChartData | None) -> None:
        """Set the data."""
        self.data = data
        self.refresh()

    @property
    def logarithmic(self) -> bool:
        """Whether the scale is logarithmic."""
        return self.data is not None and self.data.logarithmic

    @property
    def _plot(self) -> tuple[int, int]:
        return max(10, self.size.width - LEFT - 2), max(3, self.size.height - 3)

    def _scale(self, data: ChartData) -> tuple[float, float]:
        rates = [point.high for points in data.lines.values() for point in points]
        lows = [point.low for points in data.lines.values() for point in points]
        high = max(rates, default=1.0)
        return (min(lows, default=0.1) * 0.9 if data.logarithmic else 0.0), high * 1.02

    def _row(self, rate: float, data: ChartData) -> int:
        """Return the row of a rate, counted from the top."""
        low, high = self._scale(data)
        part = (rate - low) / (high - low)
        if data.logarithmic:
            part = math.log(max(rate, low) / low) / math.log(high / low)
        height = self._plot[1]
        return min(max(round((1 - part) * (height - 1)), 0), height - 1)

    def _column(self, index: int, count: int) -> int:
        return round((index + 0.5) / count * (self._plot[0] - 1))

    def _draw(self, data: ChartData) -> Cells:
        key = (data, self.size)
        if self._drawn[0] == key:
            return self._drawn[1]
        width, height = self._plot
        cells = [[(" ", -1)] * width for _ in range(height)]
        for number, points in enumerate(data.lines.values()):
            self._draw_line(cells, data, number, points)
        self._drawn = key, cells
        return cells

    def _draw_line(self, cells: Cells, data: ChartData, number: int, points: Sequence[RatePoint]) -> None:
        places = [(self._column(data.values.index(point.at), len(data.values)), point) for point in points]
        for (x0, first), (x1, second) in pairwise(places):
            for x in range(x0 + 1, x1):
                rate = first.rate + (second.rate - first.rate) * (x - x0) / (x1 - x0)
                self._put(cells, self._row(rate, data), x, "·", number)
        for x, point in places:
            for y in range(self._row(point.high, data), self._row(point.low, data) + 1):
                self._put(cells, y, x, "│", number)
            row = cells[self._row(point.rate, data)]
            free = next((each for each in range(x, min(x + len(MARKS), len(row))) if row[each][0] not in MARKS), x)
            row[free] = MARKS[number % len(MARKS)], number  # beside a mark already there, so that both are visible

    @staticmethod
    def _put(cells: Cells, y: int, x: int, glyph: str, number: int) -> None:
        if cells[y][x][0] in " ·":
            cells[y][x] = glyph, number

    def render_line(self, y: int) -> Strip:
        """Draw one row of the plot, the axis, its values, or the legend."""
        axis = self.get_component_rich_style("chart--axis")
        data = self.data
        if data is None or not data.lines:
            text = "A line chart needs a sweep over an axis." if y == 0 else ""
            return Strip([Segment(text, axis)]).adjust_cell_length(self.size.width, self.rich_style)
        width, height = self._plot
        if y < height:
            cells = self._draw(data)[y]
            parts = [Segment(f"{self._rate_at(y, data):>{LEFT}}┤" if y in (0, height - 1) else " " * LEFT + "│", axis)]
            parts += [Segment(glyph, self._line_style(number)) for glyph, number in cells]
        elif y == height:
            parts = [Segment(" " * LEFT + "└" + "─" * width, axis)]
        elif y == height + 1:
            parts = [Segment(self._value_row(data), axis)]
        else:
            parts = self._names(data)
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)

    def _rate_at(self, y: int, data: ChartData) -> str:
        low, high = self._scale(data)
        return data.format(high if y == 0 else low) if y == 0 or low else "0"

    def _line_style(self, number: int) -> Style:
        part = "chart--axis" if number < 0 else f"chart--line-{number % COLOURS}"
        return self.get_component_rich_style(part)

    def _value_row(self, data: ChartData) -> str:
        row = [" "] * (self.size.width + 12)
        for index, value in enumerate(data.values):
            text = format_value(value)
            start = max(0, LEFT + 1 + self._column(index, len(data.values)) - len(text) // 2)
            if all(cell == " " for cell in row[max(0, start - 1) : start + len(text)]):
                row[start : start + len(text)] = text
        return "".join(row)[: self.size.width]

    def _names(self, data: ChartData) -> list[Segment]:
        head = [Segment(f"{data.axis:>{LEFT}}  ", self.get_component_rich_style("chart--axis"))]
        return head + [
            Segment(f"{MARKS[number % len(MARKS)]} {name}   ", self._line_style(number))
            for number, name in enumerate(data.lines)
        ]
