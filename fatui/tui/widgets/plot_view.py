"""A plot of lines on axes."""

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from fatui.tui.view_models.braille import NOBODY, Cells
from fatui.tui.view_models.plot import CURSOR, NOTED, Plot, drawn

COLOURS = 6
PARTS = {NOBODY: "axis", CURSOR: "cursor", NOTED: "note"}


class PlotView(Widget):
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
            return Strip([Segment(text, self.style_of(NOBODY))]).adjust_cell_length(self.size.width, self.rich_style)
        key = (self.plot, self.size)
        if self._drawn[0] != key:
            self._drawn = key, drawn(self.plot, *self.size)
        cells = self._drawn[1]
        parts = [Segment(glyph, self.style_of(number)) for glyph, number in cells[y]] if y < len(cells) else []
        return Strip(parts).simplify().adjust_cell_length(self.size.width, self.rich_style)

    def style_of(self, number: int) -> Style:
        """Return the style of a series, or of what is not one."""
        part = f"line-{number % COLOURS}" if number >= 0 else PARTS.get(number, "roof")
        return self.get_component_rich_style(f"plot--{part}")
