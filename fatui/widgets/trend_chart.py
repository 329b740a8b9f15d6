"""Trends of several values on a common zero-based scale, each drawn in blocks with its figures beside it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Final

from msgspec import Struct
from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget

from fatui.widgets.row_table import clip

LABEL_WIDTH: Final = 10
FIGURE_WIDTH: Final = 9
LEVELS: Final = " ▁▂▃▄▅▆▇█"
TALLEST: Final = 4
"""Maximum rows of one trend, however large the terminal."""


class Trend(Struct, frozen=True):
    """One trend: its label, its points, and its formatted figures."""

    label: str
    points: tuple[float, ...] = ()
    now: str = ""
    best: str = ""
    note: str = ""
    """Shown instead of points: "waiting", "failed: killed by signal 9"."""


class Scale(Struct, frozen=True):
    """The heading of the chart: its title, and the value at the right end of the scale."""

    title: str
    highest: float = 0.0
    highest_text: str = ""
    columns: tuple[str, str] = ("now", "best")


def resample(points: Sequence[float], width: int) -> list[float]:
    """Average equal stretches, so that `width` columns show all points; fewer points are returned unchanged."""
    if len(points) <= width:
        return list(points)
    edges = [round(index * len(points) / width) for index in range(width + 1)]
    return [sum(points[a:b]) / (b - a) for a, b in pairwise(edges)]


class TrendChart(Widget):
    """Chart of trends of finite, non-negative values."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "trend--head",
        "trend--label",
        "trend--line",
        "trend--figure",
        "trend--note",
    }

    def __init__(self, scale: Scale, *, id: str) -> None:
        super().__init__(id=id)
        self.scale = scale
        self.trends: tuple[Trend, ...] = ()

    def show(self, scale: Scale, trends: tuple[Trend, ...]) -> None:
        """Set the scale and the trends."""
        if (scale, trends) != (self.scale, self.trends):
            self.scale, self.trends = scale, trends
            self.refresh()

    @property
    def _line_width(self) -> int:
        return max(4, self.size.width - LABEL_WIDTH - 2 * FIGURE_WIDTH - 2)

    @property
    def _rows_each(self) -> int:
        return min(TALLEST, max(1, (self.size.height - 1) // max(1, len(self.trends))))

    def render_line(self, y: int) -> Strip:
        """Draw the heading, or one row of one trend."""
        if y == 0:
            return self._strip(self._head())
        index, row = divmod(y - 1, self._rows_each)
        if index >= len(self.trends):
            return Strip.blank(self.size.width, self.rich_style)
        return self._strip(self._trend(self.trends[index], self._rows_each - 1 - row))

    def _strip(self, segments: list[Segment]) -> Strip:
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)

    def _head(self) -> list[Segment]:
        style = self.get_component_rich_style("trend--head")
        scale = self.scale
        if scale.highest <= 0:
            return [Segment(scale.title, style)]
        ruler = f"0 {'─' * max(0, self._line_width - len(scale.highest_text) - 3)} {scale.highest_text}"
        now, best = scale.columns
        text = f"{scale.title:<{LABEL_WIDTH}} {ruler} {now:>{FIGURE_WIDTH}}{best:>{FIGURE_WIDTH}}"
        return [Segment(text, style)]

    def _trend(self, trend: Trend, level: int) -> list[Segment]:
        """Draw one row of a trend; level 0 is the lowest, which has the label and the figures."""
        label, line, figure, note = (
            self.get_component_rich_style(f"trend--{part}") for part in ("label", "line", "figure", "note")
        )
        words = level == 0
        head = Segment(f"{trend.label if words else '':<{LABEL_WIDTH}.{LABEL_WIDTH}} ", label)
        if trend.note and not trend.points:
            return [head, Segment(clip(trend.note, self.size.width - LABEL_WIDTH - 1) if words else "", note)]
        drawn = self._blocks(trend.points, level)
        figures = f" {trend.now:>{FIGURE_WIDTH}}{trend.best:>{FIGURE_WIDTH}}" if words else ""
        return [head, Segment(f"{drawn:<{self._line_width}}", line), Segment(figures, figure)]

    def _blocks(self, points: Sequence[float], level: int) -> str:
        highest = self.scale.highest or 1.0
        steps = (len(LEVELS) - 1) * self._rows_each
        cells = []
        for point in resample(points, self._line_width):
            filled = max(1, round(point / highest * steps)) if point > 0 else 0
            cells.append(LEVELS[min(max(filled - level * (len(LEVELS) - 1), 0), len(LEVELS) - 1)])
        return "".join(cells)
