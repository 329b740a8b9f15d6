"""Chart of a stream's curves over the position of its tokens."""

from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from attention.core.stream import STREAM_ROWS
from fatui.report.stream_curves import GAP, Cells, StreamChart, axis_words, drawn, legend

LEFT: Final = 10
AROUND: Final = 2
"""Rows besides the plot and the legend: title and axis."""
MIN_ROWS: Final = 3
ORDER: Final = tuple(STREAM_ROWS)


class StreamCurves(Widget):
    """Curves of the rows of a stream on common axes, measured and extrapolated, with a legend."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"curves--axis", *(f"curves--{name}" for name in ORDER)}

    def __init__(self, title: str, *, id: str) -> None:
        super().__init__(id=id)
        self._title = title
        self.chart: StreamChart | None = None
        self._drawn: tuple[object, Cells] = (None, [])

    def show(self, chart: StreamChart) -> None:
        """Set the curves."""
        if chart != self.chart:
            self.chart = chart
            self.refresh()

    @property
    def _plot(self) -> tuple[int, int]:
        width = max(10, self.size.width - LEFT - 2)
        words = len(legend(self.chart, width)) if self.chart else 1
        return width, max(MIN_ROWS, self.size.height - AROUND - words)

    def render_line(self, y: int) -> Strip:
        """Draw the title, one row of the plot, the axis, or the legend."""
        axis = self.get_component_rich_style("curves--axis")
        chart, (width, height) = self.chart, self._plot
        if y == 0:
            parts = [Segment(self._title, axis)]
        elif chart is None or not chart.curves:
            parts = [Segment("not measured yet" if y == 1 else "", axis)]
        elif y <= height:
            parts = [Segment(self._end(y - 1, chart), axis)]
            parts += [Segment(mark, self._style(number, chart)) for mark, number in self._cells(chart)[y - 1]]
        elif y == height + 1:
            parts = [Segment(" " * (LEFT + 1) + axis_words(chart, width), axis)]
        else:
            lines = legend(chart, width)
            words = lines[y - height - 2] if y - height - 2 < len(lines) else []
            parts = [Segment(" " * (LEFT + 1), axis)]
            parts += [Segment(f"{text}{GAP}", self._style(number, chart)) for text, number in words]
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)

    def _cells(self, chart: StreamChart) -> Cells:
        key = (chart, self._plot)
        if self._drawn[0] != key:
            self._drawn = key, drawn(chart, *self._plot)
        return self._drawn[1]

    def _end(self, row: int, chart: StreamChart) -> str:
        if row == 0:
            return f"{chart.format(chart.high):>{LEFT}}┤"
        if row == self._plot[1] - 1:
            return f"{chart.format(chart.low) if chart.low else '0':>{LEFT}}┤"
        return " " * LEFT + "│"

    def _style(self, number: int, chart: StreamChart) -> Style:
        name = chart.curves[number].name if number >= 0 else ""
        return self.get_component_rich_style(f"curves--{name}" if name in ORDER else "curves--axis")
