"""How a sweep scales: a heat map of speedups over two axes, tokens/s over one, and the crossovers."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from attention.core.results import Report
from fatui import formatting
from fatui.report import counterparts, scaling
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.terminal import literal
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.tui.widgets.charts import ChartData, HeatData, HeatMap, LineChart, format_value

NO_SWEEP = "This run has one case. {sweep} on the main screen starts a sweep; the preset 'scaling' is one."
NO_RUN = "No run yet. A sweep is drawn here once it has run or is opened from the history."


class Scaling(Screen[None]):
    """Screen of the shown report's scaling; keys cycle through axes, implementations and slices."""

    CSS_PATH: ClassVar = ["list.tcss", "scaling.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.SCALING), actions.closing("scaling")]
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._turns = {"axis": 0, "name": 0, "part": 0}
        self._logarithmic: bool | None = None

    def compose(self) -> ComposeResult:
        """Yield the heat map, the chart and the crossovers."""
        yield StatusLine()
        with VerticalScroll(id="scaling-body", can_focus=False):
            with Vertical(classes="pane", id="map-pane"):
                yield HeatMap(id="map")
            with Vertical(classes="pane", id="chart-pane"):
                yield LineChart(id="chart")
            with Vertical(classes="pane", id="words-pane") as pane:
                pane.border_title = "Crossovers"
                yield Static(id="words", markup=False)
        yield KeyBar(keys=actions.bar(actions.SCALING, self.app.keys))

    def on_mount(self) -> None:
        """Draw the initial state."""
        self._draw()

    def action_turn(self, what: str) -> None:
        """Show the next axis, implementation or slice."""
        self._turns[what] += 1
        self._draw()

    def action_logarithmic(self) -> None:
        """Switch between a linear and a logarithmic scale."""
        self._logarithmic = not self.query_one(LineChart).logarithmic
        self._draw()

    def action_back(self) -> None:
        """Close the screen."""
        self.dismiss()

    def _draw(self) -> None:
        report = self.app.report
        axes = scaling.swept_axes(report) if report else ()
        status = self.query_one(StatusLine)
        if report is None or not axes:
            status.show("Scaling", "")
            self.query_one("#words", Static).update(NO_SWEEP.format(sweep=self.app.keys["sweep"]) if report else NO_RUN)
            self.query_one("#words-pane").border_title = "Scaling"
            self.query_one("#map-pane").display = self.query_one("#chart-pane").display = False
            return
        status.show(f"Scaling · {report.run.preset or 'unnamed'}", f"{len(report.cases)} cases over {_axes_text(axes)}")
        if _densities(report, scaling.slices(report, ("mask",))[0]):
            axes = ("density", *axes)
        axis = axes[self._turns["axis"] % len(axes)]
        swept = tuple(each for each in axes if each != "density")
        if axis == "density":
            self._draw_densities(report)
        else:
            self._draw_chart(report, axis)
        self._draw_map(report, "mask" if axis == "density" else axis, swept)

    def _draw_chart(self, report: Report, axis: str) -> None:
        parts = scaling.slices(report, (axis,))
        part = parts[self._turns["part"] % len(parts)]
        values = tuple(each for each in scaling.values_on(report, axis) if _in_part(report, axis, part, each))
        lines = scaling.curves(report, axis, part)
        logarithmic = scaling.spans_much(lines) if self._logarithmic is None else self._logarithmic
        self.query_one(LineChart).show(ChartData(axis.rstrip("_"), values, lines, logarithmic))
        scale = "logarithmic" if logarithmic else "from 0"
        self.query_one("#chart-pane").border_title = literal(
            f"tokens/s over {_axes_text((axis,))}{' · ' + part if part else ''} · {scale}"
        )
        words = [*_crossover_words(lines, axis), *_quantized_words(report, axis, part)]
        self.query_one("#words", Static).update("\n".join(words))

    def _draw_densities(self, report: Report) -> None:
        parts = scaling.slices(report, ("mask",))
        part = parts[self._turns["part"] % len(parts)]
        cases, names = scaling.cases_of(report, ("mask",), part), _names(report)
        values, lines = counterparts.density_curves(cases, names)
        logarithmic = bool(self._logarithmic)
        chart = ChartData("density", values, lines, logarithmic, formatting.three)
        self.query_one(LineChart).show(chart)
        scale = "logarithmic" if logarithmic else "from 0"
        self.query_one("#chart-pane").border_title = literal(
            f"time of random blocks / own dense time, over density{' · ' + part if part else ''} · {scale}"
        )
        found = [counterparts.density_break_even_text(name, counterparts.density_points(cases, name)) for name in names]
        words = [text for text in found if text] or ["No break-even with dense is supported by these densities."]
        self.query_one("#words", Static).update("\n".join(words))

    def _draw_map(self, report: Report, axis: str, axes: tuple[str, ...]) -> None:
        pane = self.query_one("#map-pane")
        pane.display = len(axes) > 1
        if len(axes) < 2:
            return
        other = axes[(axes.index(axis) + 1) % len(axes)]
        names = [line.implementation for line in report.summary if line.implementation != report.cases[0].reference]
        name = names[self._turns["name"] % len(names)] if names else report.summary[0].implementation
        parts = scaling.slices(report, (axis, other))
        part = parts[self._turns["part"] % len(parts)]
        rows = scaling.grid(report, name, axis, other, part)
        across = tuple(each for each in scaling.values_on(report, axis) if any(each == key[0] for key in rows))
        down = tuple(each for each in scaling.values_on(report, other) if any(each == key[1] for key in rows))
        self.query_one(HeatMap).show(HeatData((axis.rstrip("_"), across), (other.rstrip("_"), down), rows))
        pane.border_title = literal(f"Speedup of {name} over {report.cases[0].reference}{' · ' + part if part else ''}")


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


def _in_part(report: Report, axis: str, part: str, value: scaling.Value) -> bool:
    return any(scaling.value(case.workload, axis) == value for case in scaling.cases_of(report, (axis,), part))


def _axes_text(axes: tuple[str, ...]) -> str:
    return ", ".join(axis.rstrip("_") for axis in axes)


def _crossover_words(lines: dict[str, list[scaling.RatePoint]], axis: str) -> list[str]:
    found = scaling.crossovers(lines)
    name = axis.rstrip("_")
    if not found:
        return [f"No implementation clearly overtakes another over {name}."]
    return [
        f"{each.faster_after} overtakes {each.faster_before} between {name} {format_value(each.between[0])}"
        f" and {format_value(each.between[1])}"
        for each in found
    ]
