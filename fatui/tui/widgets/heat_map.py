"""Map of a sweep over two axes."""

from typing import ClassVar, Final

from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget

from fatui.tui.view_models.sweep import NO_CASE, HeatData, format_value

CELL: Final = 11
HEAD: Final = 10


class HeatMap(Widget):
    """Grid of texts; the shade repeats what they say."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("heat--head", "heat--none", "heat--slower", "heat--same", "heat--faster", "heat--much-faster"),
    }

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.data: HeatData | None = None

    def show(self, data: HeatData) -> None:
        """Set the data."""
        self.data = data
        self.styles.height = len(data.down[1]) + 2
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw a heading row, or one row of cells."""
        head = self.get_component_rich_style("heat--head")
        data, parts = self.data, []
        if data is not None and y == 0:
            parts = [Segment(f"{data.down[0]:<{HEAD}}{data.across[0]} →", head)]
        elif data is not None and y == 1:
            parts = [Segment(" " * HEAD + "".join(f"{format_value(each):>{CELL}}" for each in data.across[1]), head)]
        elif data is not None and y - 2 < len(data.down[1]):
            down = data.down[1][y - 2]
            parts = [Segment(f"{format_value(down):<{HEAD}}", head)]
            for across in data.across[1]:
                cell = data.cells.get((across, down), NO_CASE)
                style = self.get_component_rich_style(f"heat--{cell.tone}")
                parts += [Segment(" ", self.rich_style), Segment(f"{cell.text[: CELL - 1]:>{CELL - 1}}", style)]
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)
