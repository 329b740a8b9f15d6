"""Charts drawn in Braille: trends, each with its label and figures beside it, and plots of lines on axes."""

from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.strip import Strip

from fatui.formatting import short_name
from fatui.tui.painting import KeepsStyles
from fatui.tui.view_models.plot import (
    ACROSS,
    CURSOR,
    DOWN,
    NOBODY,
    NOTED,
    Axis,
    Canvas,
    Cells,
    Plot,
    area,
    drawn,
    stretched,
)
from fatui.tui.view_models.trends import Scale, Trend
from fatui.untrusted_text import clip, one_line

LABEL_WIDTH: Final = 10
FIGURE_WIDTH: Final = 11
MAX_TREND_ROWS: Final = 6
"""Maximum rows of one trend, however large the terminal."""
EDGE: Final = 4
"""Every so many dots of the edges of a band and of a level are drawn, so that both are seen without colour."""
Drawn = list[list[tuple[str, bool]]]
"""Rows of (text, whether it is shaded)."""
Row = list[tuple[str, str]]
"""A row of (text, part)."""
SHADED: Final = "shaded"
"""The part of a line on the band."""
COLOURS = 6
PARTS = {NOBODY: "axis", CURSOR: "cursor", NOTED: "note"}


class TrendChart(KeepsStyles):
    """Chart of trends over the time since the case began."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("trend--head", "trend--label", "trend--line", "trend--band", "trend--figure", "trend--note"),
    }

    def __init__(self, scale: Scale, *, id: str) -> None:
        super().__init__(id=id)
        self.scale = scale
        self.trends: tuple[Trend, ...] = ()
        self._drawn: dict[int, tuple[object, Trend, Drawn]] = {}
        self._rows: list[Row] = []
        self._composed_for = Size()

    def show(self, scale: Scale, trends: tuple[Trend, ...]) -> None:
        """Set the scale and the trends, and repaint the rows that changed."""
        if (scale, trends) == (self.scale, self.trends):
            return
        self.scale, self.trends = scale, trends
        before = self._rows
        self._compose_rows()
        if len(before) != len(self._rows):
            self.refresh()
            return
        changed = [y for y, row in enumerate(self._rows) if row != before[y]]
        if changed:
            self.refresh(*(Region(0, y, self.room.width, 1) for y in changed))

    @property
    def _line_width(self) -> int:
        return max(4, self.room.width - LABEL_WIDTH - 2 * FIGURE_WIDTH - 2)

    @property
    def _rows_each(self) -> int:
        return min(MAX_TREND_ROWS, max(1, (self.room.height - 1) // max(1, len(self.trends))))

    def _compose_rows(self) -> None:
        """Compose the heading, and the rows of all trends, for the room there is."""
        rows, self._composed_for = range(self._rows_each), self.room
        self._rows = [[self._head()], *(self._trend(index, row) for index in range(len(self.trends)) for row in rows)]

    def render_line(self, y: int) -> Strip:
        """Draw the heading, or one row of one trend."""
        if self.room != self._composed_for:
            self._compose_rows()
        if y >= len(self._rows):
            return Strip.blank(self.room.width, self.part_style())
        parts = [Segment(text, self._style_of(part)) for text, part in self._rows[y]]
        return Strip(parts).adjust_cell_length(self.room.width, self.part_style())

    def _style_of(self, part: str) -> Style:
        if part == SHADED:
            return self.part_style("trend--line") + Style(bgcolor=self.part_style("trend--band").bgcolor)
        return self.part_style(f"trend--{part}")

    def _head(self) -> tuple[str, str]:
        scale = self.scale
        words = " · ".join(filter(None, (scale.title, scale.words)))
        if not scale.words:
            return words, "head"
        now, best = scale.columns
        room = LABEL_WIDTH + 2 + self._line_width + FIGURE_WIDTH - len(now)
        return f"{clip(words, room - 1):<{room}}{now}{best:>{FIGURE_WIDTH}}", "head"

    def _trend(self, index: int, row: int) -> Row:
        """Return one row of a trend, counted from its top; the last one has the label and the figures."""
        trend, rows = self.trends[index], self._rows_each
        words = row == rows - 1
        head = f"{short_name(one_line(trend.label), LABEL_WIDTH) if words else '':<{LABEL_WIDTH}} ", "label"
        if not trend.points:
            return [head, (clip(trend.note, self.room.width - LABEL_WIDTH - 1) if words else "", "note")]
        parts = [(text, SHADED if shaded else "line") for text, shaded in self._lines(index)[row]]
        if words:
            parts.append((f" {trend.now:>{FIGURE_WIDTH}}{trend.best:>{FIGURE_WIDTH}}", "figure"))
        elif row == rows - 2 and trend.note:
            parts.append((f" {trend.note:>{2 * FIGURE_WIDTH}}", "note"))
        return [head, *parts]

    def _lines(self, index: int) -> Drawn:
        """Return the rows of a trend's graph, drawn again once it differs by a dot."""
        trend, room = self.trends[index], (self._line_width, self._rows_each, self.scale.highest)
        before = self._drawn.get(index)
        if before is not None and before[0] == room and _looks_like(before[1], trend, self._line_width * ACROSS):
            return before[2]
        size = self._line_width, self._rows_each
        drawn = _draw_line(trend, *size) if trend.low else _draw_area(trend, self.scale.highest, *size)
        self._drawn[index] = room, trend, drawn
        return drawn


def _looks_like(before: Trend, after: Trend, dots: int) -> bool:
    """Whether a trend with some more points is drawn as it was, but for less than the width of a dot."""
    more = len(after.points) - len(before.points)
    frame = (before.label, before.low, before.high, before.band, before.line)
    if frame != (after.label, after.low, after.high, after.band, after.line):
        return False
    return before.points == after.points if more == 0 else 0 < more * dots < len(after.points)


def _draw_area(trend: Trend, highest: float, columns: int, rows: int) -> Drawn:
    high = highest if trend.high is None else trend.high
    drawn = area(trend.points, high, columns, rows)
    if trend.line is None or high <= 0:
        return [[(row, False)] for row in drawn]
    level = round((1 - min(trend.line / high, 1.0)) * (rows * DOWN - 1))
    at = level // DOWN
    mark = Canvas(columns, rows)
    mark.line((0, level), (mark.width - 1, level), every=EDGE)
    dots = "".join(glyph for glyph, _ in mark.cells()[at])
    merged = (dot if cell == " " else cell for dot, cell in zip(dots, drawn[at], strict=True))
    return [[("".join(merged) if row == at else text, False)] for row, text in enumerate(drawn)]


def _draw_line(trend: Trend, columns: int, rows: int) -> Drawn:
    canvas = Canvas(columns, rows)
    scale = Axis(trend.low, trend.high or 0.0)

    def down(value: float) -> int:
        return round((1 - scale.place(value)) * (canvas.height - 1))

    values = [down(value) for value in stretched(trend.points, columns * ACROSS)]
    for x, y in enumerate(values):
        canvas.line((max(x - 1, 0), values[max(x - 1, 0)]), (x, y))
    edges = [down(edge) for edge in trend.band or ()]
    for y in {*edges, *([down(trend.line)] if trend.line is not None else [])}:
        canvas.line((0, y), (canvas.width - 1, y), every=EDGE)
    shaded = range(edges[1] // DOWN, edges[0] // DOWN + 1) if edges else range(0)
    return [[("".join(glyph for glyph, _ in row), number in shaded)] for number, row in enumerate(canvas.cells())]


class PlotView(KeepsStyles):
    """Widget that draws a plot, or words in its place."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("plot--axis", "plot--cursor", "plot--note", "plot--roof"),
        *(f"plot--line-{index}" for index in range(COLOURS)),
    }

    def __init__(self, empty: str = "", *, id: str) -> None:
        super().__init__(id=id)
        self.plot: Plot | None = None
        self.empty = empty
        self._drawn: tuple[object, Cells] = (None, [])

    def show(self, plot: Plot | None) -> None:
        """Set the plot."""
        if plot != self.plot:
            self.plot = plot
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw one row."""
        if self.plot is None:
            text = self.empty if y == 0 else ""
            return Strip([Segment(text, self.style_of(NOBODY))]).adjust_cell_length(self.room.width, self.part_style())
        key = (self.plot, self.room)
        if self._drawn[0] != key:
            self._drawn = key, drawn(self.plot, *self.room)
        cells = self._drawn[1]
        parts = [Segment(glyph, self.style_of(number)) for glyph, number in cells[y]] if y < len(cells) else []
        return Strip(parts).simplify().adjust_cell_length(self.room.width, self.part_style())

    def style_of(self, number: int) -> Style:
        """Return the style of a series, or of what is not one."""
        part = f"line-{number % COLOURS}" if number >= 0 else PARTS.get(number, "roof")
        return self.part_style(f"plot--{part}")
