"""A heat map of speedups over two axes, with the figure in each cell."""

from collections.abc import Mapping
from typing import ClassVar

from msgspec import Struct
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from attention.report import Row
from fatui import figures
from fatui.scaling import Value
from fatui.stops import say

CELL = 9
HEAD = 10


class HeatData(Struct, frozen=True):
    """The two axes and the row of each cell."""

    across: tuple[str, tuple[Value, ...]]
    down: tuple[str, tuple[Value, ...]]
    rows: Mapping[tuple[Value, Value], Row]


def say_value(value: Value) -> str:
    """Format a value of an axis."""
    return say(value) if isinstance(value, int) else value


def cell_text(row: Row | None) -> str:
    """Format a cell: the speedup, or the row's status."""
    if row is None:
        return "·"
    if row.status != "ok":
        return row.status[:CELL]
    if row.speedup is None:
        return figures.UNKNOWN
    if row.speedup.low == row.speedup.high == 1:
        return "1"
    return f"{figures.three(row.speedup.value)}x" if row.speedup.significant else "≈ 1"


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
            parts = [Segment(" " * HEAD + "".join(f"{say_value(each):>{CELL}}" for each in data.across[1]), head)]
        elif y - 2 < len(data.down[1]):
            down = data.down[1][y - 2]
            parts = [Segment(f"{say_value(down):<{HEAD}}", head)]
            for across in data.across[1]:
                row = data.rows.get((across, down))
                parts.append(Segment(f"{cell_text(row):>{CELL}}", self._style(row)))
        else:
            parts = []
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)
