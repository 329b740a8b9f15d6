"""The live view of a run: progress, trends of each implementation and of memory, the roofline, and the machine."""

from typing import ClassVar, Final, Literal

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Static

from attention.core.results import Case, Peaks, Report
from attention.core.workload import Workload
from fatui.telemetry import Reading, reading_text
from fatui.tui.painting import TextLines, set_subtitle, set_text, set_title
from fatui.tui.view_models.plot import NOTED, mark_of
from fatui.tui.view_models.session import Session
from fatui.tui.view_models.trends import (
    VIEWS,
    Scale,
    View,
    device_lines,
    energy_text,
    memory_chart,
    opened_line,
    progress_line,
    rate_chart,
)
from fatui.tui.widgets.charts import PlotView, TrendChart

Tab = Literal["trends", "roofline"]
IDLE: Final = "No run yet. {run} runs what is set up; tokens/s, memory and progress are shown here during the run."
SAYS: Final[dict[View, str]] = {
    "common": "on a common scale",
    "own": "each on its own scale",
    "ratio": "ratio to the reference by round",
}
AROUND: Final = 8
"""Rows of the pane besides the trends: borders, progress, the headings of two charts, telemetry and energy."""


class LivePane(Vertical, can_focus=True):
    """Pane with the trends of a session, or the roofline of what is set up.

    Attributes:
        view: how the trends of rates are drawn.
        opened: the tab, "trends" or "roofline".
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,right", "screen.live_tab", "The other tab", show=False),
        Binding("enter", "screen.maximise", "Maximise", show=False),
    ]

    class Turned(Message):
        """Posted when another tab or view is shown."""

    def __init__(self, *, id: str, view: str = "common") -> None:
        super().__init__(id=id, classes="pane")
        self.border_title = "3 Live"
        self.view: View = next((each for each in VIEWS if each == view), "common")
        self.opened: Tab = "trends"
        self._progress = TextLines(id="progress")
        self._rates = TrendChart(Scale("tokens/s"), id="rates")
        self._memory = TrendChart(Scale("memory"), id="memory")
        self._plot = PlotView(id="roofline")
        self._plot_words, self._device_lines, self._energy, self._telemetry = (
            Static(id=name, markup=False) for name in ("roofline-words", "devices", "energy", "telemetry")
        )
        self._said = ""
        self._rates_of: object = None
        self._memory_of: object = None
        """What the trends were drawn for."""
        self._turned = False
        """Whether a tab was chosen by key."""
        self._least: int | None = None
        self._devices = 0
        self._runs = False
        self._watts: float | None = None

    def compose(self) -> ComposeResult:
        """Yield the progress, two charts, the roofline and the telemetry lines."""
        yield self._progress
        yield self._rates
        yield self._memory
        yield self._plot
        yield self._plot_words
        yield self._device_lines
        yield self._energy
        yield self._telemetry

    def turn_view(self) -> None:
        """Draw the trends in the next view; from the roofline, go back to them."""
        self._turned = True
        if self.opened == "roofline":
            self.opened = "trends"
        else:
            self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]
        self.post_message(self.Turned())

    def turn_tab(self) -> None:
        """Open the other tab."""
        self._turned = True
        self.opened = "trends" if self.opened == "roofline" else "roofline"
        self.post_message(self.Turned())

    @property
    def draws_roofline(self) -> bool:
        """Whether the roofline is visible: as the open tab, or below the trends of a run that has ended."""
        wide = self.screen.has_class("-wide") and not self.screen.has_class("-home")
        return self.opened == "roofline" or (wide and not self._runs)

    def offer(self, tab: Tab) -> None:
        """Open a tab, unless one was chosen by key."""
        if not self._turned:
            self.opened = tab

    def show(
        self,
        session: Session | None,
        opened: Report | None,
        keys: dict[str, str],
        *,
        memory: bool = True,
        reference: str | None = None,
    ) -> None:
        """Draw the run; without one, say which past run is open, or that none is.

        Args:
            session: the run.
            opened: a past run.
            keys: the key of each action.
            memory: whether the trends of memory are drawn again, which change slowly.
            reference: the implementation that ratios are to; None: the reference of the case.
        """
        idle = IDLE.format(run=keys["run"])
        line = progress_line(session) if session else opened_line(opened) if opened else idle
        if session is not None and session.active and "\n" not in line:
            line += "\n"  # two lines throughout a run: each change of their number lays the screen out again
        self._progress.show(line)
        self._runs = session is not None and session.active
        self.set_class(session is None, "-idle")
        self.set_class(self.opened == "roofline", "-roofline")
        self.set_class(self.draws_roofline and self.opened == "trends", "-both")
        self._say_tabs(keys)
        if session is None:
            self._watts = None
            self._fit(None)
            set_text(self._telemetry, "")
            self._say_energy("")
            self._show_devices([])
            set_title(self, "3 Live")
            return
        if self.opened == "trends":
            self._show_trends(session, memory, reference)
        if not session.active:
            set_text(self._telemetry, "")
        devices = device_lines(session)
        self._show_devices(devices)
        self._say_energy(energy_text(session, self._watts))
        label = session.plan.cases[session.case_number].label if session.case_number is not None else ""
        set_title(self, f"3 Live · {label}" if label else "3 Live")

    def _show_trends(self, session: Session, memory: bool, reference: str | None) -> None:
        drawn = (session, session.changes, session.active, self.view, reference, self.app.size, self._devices)
        rates, memory = drawn != self._rates_of, memory and drawn != self._memory_of
        if not rates and not memory:
            return  # most ticks of long rounds bring nothing new
        if rates:
            self._rates.show(*rate_chart(session, self.view, reference))
            self._rates_of = drawn
        if memory:
            self._memory.show(*memory_chart(session))
            self._memory_of = drawn
        many, few = len(self._rates.trends), len(self._memory.trends)
        for chart, share in ((self._rates, 2 * max(1, many) + 1), (self._memory, max(1, few) + 1)):
            if chart.styles.height is None or chart.styles.height.value != share:
                chart.styles.height = f"{share}fr"
        height = self.app.size.height
        self._fit(max(many + few + AROUND, min(2 * many + few + AROUND, height // 2 - 1)))

    def _say_tabs(self, keys: dict[str, str]) -> None:
        view, tab = keys["live_view"], keys["live_tab"]
        names = {"trends": "Trends", "roofline": "Roofline"}
        tabs = " ".join(f"[{title}]" if name == self.opened else f" {title} " for name, title in names.items())
        words = f"{tabs} {tab} · {view} {SAYS[self.view]}" if self.opened == "trends" else f"{tabs} {tab}"
        if self._said != words:
            self._said = words
            set_subtitle(self, words)

    def show_roofline(self, workload: Workload | None, peaks: Peaks, cases: tuple[Case, ...], run_key: str) -> None:
        """Draw what limits a workload, and what was measured."""
        from fatui.tui.view_models import roofline

        plot, words = self._plot, self._plot_words
        names = tuple(dict.fromkeys(row.implementation for case in cases for row in case.rows))
        found = roofline.roofline(workload, peaks, cases, names) if workload else None
        self.set_class(found is not None, "-plotted")
        plot.show(found)
        if workload is None or found is None:
            legend = Text(roofline.UNMEASURED.format(run=run_key))
        else:
            legend = Text("FLOP/s over FLOP/byte   ")
            legend.append(f"{roofline.PREDICTED} at best   ", plot.style_of(NOTED))
            for number, name in enumerate(names):
                legend.append(f"{mark_of(number)} {name}   ", plot.style_of(number))
            for line in roofline.limit_words(workload, peaks, cases):
                legend.append(f"\n{line}")
        if words.content != legend:  # an update lays the whole screen out again
            words.update(legend)

    def _say_energy(self, text: str) -> None:
        line = self._energy
        line.display = bool(text)
        set_text(line, text)

    def _show_devices(self, lines: list[str]) -> None:
        """Draw a line for each rank's device; none in a run on one."""
        shown = self._device_lines
        shown.display = bool(lines)
        set_text(shown, "\n".join(lines))
        self._devices = len(lines)

    def _fit(self, rows: int | None) -> None:
        """Set the pane's minimum height to fit all trends; a minimum on one chart would push the others out."""
        if self.screen.has_class("-wide"):  # the grid gives it its height
            rows = None
        if rows is not None:
            rows += self._devices
        if rows != self._least:
            self._least = rows
            self.styles.min_height = rows

    def show_reading(self, reading: Reading) -> None:
        """Draw the telemetry line; a reading that comes after the run's end is not shown."""
        if not self._runs:
            return
        self._watts = reading.gpu.power_w if reading.gpu else reading.power_w
        set_text(self._telemetry, reading_text(reading))
