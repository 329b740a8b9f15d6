"""How a sweep scales: a figure over an axis with the crossovers on it, a map over two axes, and the rows of a point."""

from typing import ClassVar, Final

from rich.segment import Segment
from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from attention.core.plan import REFERENCE
from attention.core.results import Case, Report
from fatui import formatting
from fatui.draft import UNNAMED
from fatui.report import counterparts, scaling
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.screens.base import AppScreen
from fatui.tui.terminal import literal
from fatui.tui.view_models import sweep, table_lines
from fatui.tui.view_models.plot import LEFT, Plot, mark_of
from fatui.tui.view_models.sweep import NO_CASE, HeatData, format_value
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.tui.widgets.charts import PlotView
from fatui.tui.widgets.row_table import RowTable

CELL_WIDTH: Final = 11
HEAD_WIDTH: Final = 10
NO_SWEEP: Final = "This run has one case. {sweep} on the main screen starts a sweep; the preset 'scaling' is one."
NO_RUN: Final = "No sweep yet. One is drawn here once it has run or is opened from the history."
DENSITY: Final = "density"
ROOMY: Final = 34
"""Minimum terminal rows at which the rows of a point and the map are visible at once."""
MAX_WORDS: Final = 4
"""Maximum findings below the chart."""


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
            parts = [Segment(f"{data.down[0]:<{HEAD_WIDTH}}{data.across[0]} →", head)]
        elif data is not None and y == 1:
            parts = [
                Segment(
                    " " * HEAD_WIDTH + "".join(f"{format_value(each):>{CELL_WIDTH}}" for each in data.across[1]), head
                )
            ]
        elif data is not None and y - 2 < len(data.down[1]):
            down = data.down[1][y - 2]
            parts = [Segment(f"{format_value(down):<{HEAD_WIDTH}}", head)]
            for across in data.across[1]:
                cell = data.cells.get((across, down), NO_CASE)
                style = self.get_component_rich_style(f"heat--{cell.tone}")
                parts += [
                    Segment(" ", self.rich_style),
                    Segment(f"{cell.text[: CELL_WIDTH - 1]:>{CELL_WIDTH - 1}}", style),
                ]
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)


class CurveChart(PlotView, can_focus=True):
    """The curves; left and right move the cursor from value to value, up and down the row, enter opens it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "The value before", show=False),
        Binding("right", "move(1)", "The next value", show=False),
        Binding("up,k", "row(-1)", "The row above", show=False),
        Binding("down,j", "row(1)", "The row below", show=False),
        Binding("enter", "open", "Details of the row", show=False),
    ]

    class Moved(Message):
        """Posted when the cursor is to move by a number of values, or to a part of the width."""

        def __init__(self, values: int = 0, place: float | None = None) -> None:
            super().__init__()
            self.values, self.place = values, place

    class RowMoved(Message):
        """Posted when the cursor of the table is to move."""

        def __init__(self, rows: int) -> None:
            super().__init__()
            self.rows = rows

    class Opened(Message):
        """Posted when the row under the cursor is to be opened."""

    def action_move(self, count: int) -> None:
        """Move the cursor."""
        self.post_message(self.Moved(count))

    def action_row(self, count: int) -> None:
        """Move to another row of the point."""
        self.post_message(self.RowMoved(count))

    def action_open(self) -> None:
        """Open the row."""
        self.post_message(self.Opened())

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to the value nearest to the click."""
        self.focus()
        self.post_message(self.Moved(place=(event.x - LEFT - 1) / max(1, self.size.width - LEFT - 2)))


class Scaling(AppScreen, Screen[None]):
    """Screen of the shown report's scaling; keys go through figures, axes, implementations and slices."""

    CSS_PATH: ClassVar = ["list.tcss", "scaling.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.SCALING), actions.closing("scaling")]
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._turns = {"axis": 0, "name": 0, "part": 0, "figure": 0}
        self._choices = {"axis": 0, "name": 0, "part": 0, "figure": 0}
        self._logarithmic: bool | None = None
        self._drawn_logarithmic = False
        self._at = 0
        self._values: tuple[scaling.Value, ...] = ()
        self._cases: list[Case] = []
        self._places: list[float] = []

    def compose(self) -> ComposeResult:
        """Yield the chart, the rows of its cursor, the map and the findings."""
        yield StatusLine()
        with Vertical(classes="pane", id="chart-pane"):
            yield CurveChart(id="chart")
            yield Static(id="chart-legend", markup=False)
        with Vertical(classes="pane", id="point-pane"):
            yield RowTable(table_lines.COLUMNS, id="point")
        with Vertical(classes="pane", id="map-pane"):
            yield HeatMap(id="map")
        with Vertical(classes="pane", id="words-pane") as pane:
            pane.border_title = "Crossovers"
            yield Static(id="words", markup=False)
        yield KeyBar()

    def on_mount(self) -> None:
        """Draw the initial state."""
        self.query_one("#point", RowTable).can_focus = False
        self._draw()
        self.query_one("#chart").focus()

    def on_resize(self) -> None:
        """Lay the panes out again."""
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave out keys that have nothing to turn to."""
        return self._choices[str(parameters[0])] > 1 if action == "turn" else True

    def action_turn(self, what: str) -> None:
        """Show the next figure, axis, implementation or slice."""
        self._turns[what] += 1
        self._draw()

    def action_logarithmic(self) -> None:
        """Switch between a linear and a logarithmic scale."""
        self._logarithmic = not self._drawn_logarithmic
        self._draw()

    def action_back(self) -> None:
        """Close the screen."""
        self.dismiss()

    @on(CurveChart.Moved)
    def _move(self, event: CurveChart.Moved) -> None:
        if not self._values:
            return
        self._at = min(max(self._at + event.values, 0), len(self._values) - 1)
        if event.place is not None and self._places:
            place = event.place
            self._at = min(range(len(self._places)), key=lambda index: abs(self._places[index] - place))
        self._draw()

    @on(CurveChart.RowMoved)
    def _move_row(self, event: CurveChart.RowMoved) -> None:
        self.query_one("#point", RowTable).action_move(event.rows)

    @on(CurveChart.Opened)
    def _open_row(self) -> None:
        key = self.query_one("#point", RowTable).key
        report = self.app.shown_report
        if key is None or report is None:
            return
        from fatui.tui.screens.dialogs import RowDetails

        index, name = table_lines.split_key(key)
        case = report.cases[index]
        row = scaling.row_of(case, name)
        if row is not None:
            self.app.push_screen(RowDetails(case, row, report.run.command))

    def _turn(self, what: str, count: int) -> int:
        self._choices[what] = count
        return self._turns[what] % count if count else 0

    def _draw(self) -> None:
        report = self.app.shown_report
        axes = scaling.swept_axes(report) if report else ()
        status = self.query_one(StatusLine)
        panes = [self.query_one(f"#{name}-pane") for name in ("map", "chart", "point")]
        if report is None or not axes:
            status.show("Scaling", "")
            self.query_one("#words", Static).update(NO_SWEEP.format(sweep=self.app.keys["sweep"]) if report else NO_RUN)
            self.query_one("#words-pane").border_title = "Scaling"
            for pane in panes:
                pane.display = False
            self.query_one(KeyBar).show(actions.bar((actions.BACK,), self.app.keys))
            return
        status.show(f"Scaling · {report.run.preset or UNNAMED}", f"{len(report.cases)} cases over {_axes_text(axes)}")
        swept = axes
        if _densities(report, scaling.slices(report, ("mask",))[0]):
            axes = (DENSITY, *axes)
        axis = axes[self._turn("axis", len(axes))]
        if axis == DENSITY:
            self._draw_densities(report)
        else:
            self._draw_curves(report, axis)
        self._draw_map(report, "mask" if axis == DENSITY else axis, swept)
        alive = [each for each in actions.SCALING if self.check_action(*_call(each.does)) is not False]
        self.query_one(KeyBar).show(actions.bar(tuple(alive), self.app.keys))

    def _draw_curves(self, report: Report, axis: str) -> None:
        parts = scaling.slices(report, (axis,))
        part = parts[self._turn("part", len(parts))]
        cases = scaling.sorted_cases(report, axis, part)
        self._cases, self._values = cases, tuple(dict.fromkeys(_value(case, axis) for case in cases))
        self._at = min(self._at, len(self._values) - 1)
        figure = sweep.FIGURES[self._turn("figure", len(sweep.FIGURES))]
        lines = sweep.figure_curves(cases, axis, figure)
        roof = sweep.roof_curve(cases, axis, report.peaks) if figure == "FLOP/s" else []
        logarithmic = scaling.spans_much({**lines, "": roof}) if self._logarithmic is None else self._logarithmic
        plot = sweep.curve_plot(
            self._values,
            lines,
            logarithmic=logarithmic,
            say=sweep.FORMATS[figure],
            roof=roof,
            cursor=self._values[self._at],
            crossing=figure in ("tokens/s", "FLOP/s"),
        )
        self._show_plot(f"{sweep.MEANS[figure]} over {_axes_text((axis,))}", part, lines, plot, logarithmic)
        self._show_point(report, axis)
        crossed = _crossover_words(scaling.curves_of(cases, axis), axis)
        self._say([*crossed, *_quantized_words(report, axis, part)])

    def _draw_densities(self, report: Report) -> None:
        parts = scaling.slices(report, ("mask",))
        part = parts[self._turn("part", len(parts))]
        self._turn("figure", 1)
        cases, names = scaling.cases_of(report, ("mask",), part), _names(report)
        values, lines = counterparts.density_curves(cases, names)
        self._cases, self._values = [], ()
        logarithmic = bool(self._logarithmic)
        plot = sweep.curve_plot(values, lines, logarithmic=logarithmic, say=formatting.three)
        title = "time of random blocks / own dense time, over density"
        self._show_plot(title, part, lines, plot, logarithmic)
        self.query_one("#point-pane").display = False
        found = [counterparts.density_break_even_text(name, counterparts.density_points(cases, name)) for name in names]
        self._say([text for text in found if text] or ["No break-even with dense is supported by these densities."])

    def _show_plot(self, title: str, part: str, lines: sweep.Curves, plot: Plot | None, logarithmic: bool) -> None:
        self._drawn_logarithmic = logarithmic
        chart = self.query_one(CurveChart)
        chart.empty = "No row has this figure."
        chart.show(plot)
        self._places = [plot.x.place(at) for at, _ in plot.x.ticks] if plot else []
        legend = Text()
        for number, name in enumerate(lines):
            legend.append(f"{mark_of(number)} {name}   ", chart.style_of(number))
        if plot and plot.notes:
            legend.append("╳ crossover", chart.style_of(plot.notes[0].number))
        self.query_one("#chart-legend", Static).update(legend)
        scale = "logarithmic" if logarithmic else "from 0"
        pane = self.query_one("#chart-pane")
        pane.border_title = literal(f"{title}{' · ' + part if part else ''} · {scale}")

    def _show_point(self, report: Report, axis: str) -> None:
        """Draw the rows of the case under the cursor."""
        pane = self.query_one("#point-pane")
        at = self._values[self._at]
        case = next(case for case in self._cases if _value(case, axis) == at)
        index = report.cases.index(case)
        pane.display = True
        over = f" · over {case.reference}" if case.reference not in (None, REFERENCE) else ""
        title = f"{axis.rstrip('_')} {sweep.format_value(at)} · {case.workload.label}{over}"
        pane.border_title = literal(title)
        lines = table_lines.case_lines(index, case)
        words = [table_lines.legend(lines), "← → the value", "↑ ↓ the row", "enter opens it"]
        pane.border_subtitle = literal(" · ".join(filter(None, words)))
        self.query_one("#point", RowTable).show(lines)
        pane.styles.height = len(case.rows) + 3

    def _say(self, words: list[str]) -> None:
        more = [f"and {len(words) - MAX_WORDS} more"] if len(words) > MAX_WORDS else []
        self.query_one("#words", Static).update("\n".join([*words[:MAX_WORDS], *more]))

    def _draw_map(self, report: Report, axis: str, axes: tuple[str, ...]) -> None:
        pane = self.query_one("#map-pane")
        pane.display = len(axes) > 1
        if len(axes) < 2:
            self._turn("name", 1)
            return
        other = axes[(axes.index(axis) + 1) % len(axes)]
        reference, other_references = sweep.references_of(report)
        names: list[str | None] = [None, *(name for name in _names(report) if name != reference)]
        short = self.app.size.height < ROOMY
        turn = self._turn("name", len(names) + short) - short
        if short:  # the map stands in the place of the point's rows, once it is turned to
            pane.display = turn >= 0
            self.query_one("#point-pane").display = turn < 0 and bool(self._values)
        name = names[max(turn, 0)]
        parts = scaling.slices(report, (axis, other))
        part = parts[self._turns["part"] % len(parts)]
        self._choices["part"] = max(self._choices["part"], len(parts))
        self.query_one(HeatMap).show(sweep.heat_map(report, name, axis, other, part))
        letters = ", ".join(f"{letter} {each}" for each, letter in sweep.letters_of(_names(report)).items())
        what = f"Fastest, with its speedup over {reference}: {letters}" if name is None else ""
        title = what or f"Speedup of {name} over {reference}"
        if other_references:
            title += f" ({sweep.ELSE_OVER} over {', '.join(other_references)})"
        pane.border_title = literal(f"{title}{' · ' + part if part else ''}")


def _call(does: str) -> tuple[str, tuple[object, ...]]:
    """Return the name and the argument of an action: "screen.turn('axis')" is turn and axis."""
    name, _, rest = does.rpartition(".")[2].partition("(")
    return name, (rest.strip("')"),)


def _value(case: Case, axis: str) -> scaling.Value:
    return scaling.value(case.workload, axis)


def _names(report: Report) -> list[str]:
    return [line.implementation for line in report.summary]


def _densities(report: Report, part: str) -> tuple[str, ...]:
    """Return the densities of random blocks in one slice of a run, if there are several."""
    return counterparts.density_curves(scaling.cases_of(report, ("mask",), part), _names(report))[0]


def _quantized_words(report: Report, axis: str, part: str) -> list[str]:
    """Return the findings on quantized keys and values: which formats gain, or the length from which one does."""
    by_length = counterparts.length_break_even_text
    find = {"kv_format": counterparts.formats_text, "seq": by_length, "kv_seq": by_length}
    cases = scaling.cases_of(report, (axis,), part)
    found = [find[axis](name, counterparts.format_points(cases, name)) for name in _names(report) if axis in find]
    return [text for text in found if text]


def _axes_text(axes: tuple[str, ...]) -> str:
    return ", ".join(axis.rstrip("_") for axis in axes)


def _crossover_words(lines: dict[str, list[scaling.RatePoint]], axis: str) -> list[str]:
    found = scaling.crossovers(lines)
    name = axis.rstrip("_")
    if not found:
        return [f"No implementation clearly overtakes another over {name}."]
    return [
        f"{each.faster_after} overtakes {each.faster_before} between {name} {sweep.format_value(each.between[0])}"
        f" and {sweep.format_value(each.between[1])}"
        for each in found
    ]
