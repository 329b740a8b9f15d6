"""The case on the sliders on chips that are not here: their roofs, predictions, and what other figures would do."""

from functools import partial
from typing import ClassVar, Final

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from attention.core.results import Case
from attention.core.workload import MAX_SIZES
from fatui.quantities import STOPS, format_number, parse_number
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.screens.base import AppScreen
from fatui.tui.terminal import literal
from fatui.tui.view_models import chips
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.tui.widgets.charts import PlotView
from fatui.tui.widgets.choice import Choice
from fatui.tui.widgets.slider import Slider
from fatui.tui.widgets.workload_pane import LABELS, shown_workload

AXES: Final = ("batch", "seq", "head_dim", "heads")
ROOMY: Final = 30
"""Minimum terminal rows at which the roofs are drawn."""
NO_CASE: Final = "The values on the sliders make no case."
DEFAULT_CHIPS: Final = ("h200", "m4-max")
SHOWN: Final = ("poc", "mlx")
"""Implementations that are predicted if none of those selected can be."""


class Chips(AppScreen, Screen[None]):
    """Screen of the shown case on chips; sliders move the case, and the first chip's figures."""

    CSS_PATH: ClassVar = ["list.tcss", "chips.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.CHIPS), actions.closing("chips")]
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._keys = list(DEFAULT_CHIPS)
        self._percent = dict.fromkeys(chips.FACTORS, 100)

    def compose(self) -> ComposeResult:
        """Yield the roofs, the sliders and what limits the case."""
        yield StatusLine()
        with Vertical(classes="pane", id="chart-pane"):
            yield PlotView(id="chart")
        with Horizontal(id="below"):
            with Vertical(classes="pane", id="controls-pane") as pane:
                pane.border_title = "What if"
                yield Choice("chip", chips.known_keys(), id="chip-0")
                yield Choice("beside", (chips.NONE, *chips.known_keys()), id="chip-1")
                for name, label in chips.FACTORS.items():
                    yield Slider(label, chips.PERCENT, parse=_parse_percent, say=_percent, id=f"factor-{name}")
                for name in AXES:
                    parse = partial(_parse, name)
                    yield Slider(LABELS[name], STOPS[name], parse=parse, say=format_number, id=f"axis-{name}")
            with VerticalScroll(classes="pane", id="words-pane") as pane:
                pane.border_title = "What limits it"
                yield Static(id="words", markup=False)
        yield KeyBar()

    def on_mount(self) -> None:
        """Draw the initial state."""
        for index, key in enumerate(self._keys):
            self.query_one(f"#chip-{index}", Choice).show((key,))
        self._draw()
        self.query_one("#chip-0").focus()

    def on_resize(self) -> None:
        """Leave the roofs out where they would have no room."""
        self.set_class(self.app.size.height < ROOMY, "-short")

    def action_back(self) -> None:
        """Close the screen."""
        self.dismiss()

    def action_reset(self) -> None:
        """Set the first chip's figures back."""
        self._percent = dict.fromkeys(chips.FACTORS, 100)
        self._draw()

    @on(Choice.Changed)
    def _choose(self, event: Choice.Changed) -> None:
        self._keys[int((event.choice.id or "")[-1])] = event.values[0]
        self._draw()

    @on(Slider.Changed)
    def _move(self, event: Slider.Changed) -> None:
        kind, _, name = (event.slider.id or "").partition("-")
        if kind == "factor":
            self._percent[name] = event.values[0]
        else:
            self.app.set_draft(self.app.draft.set_axis(name, event.values))
        self._draw()

    @on(Slider.Refused)
    def _refuse(self, event: Slider.Refused) -> None:
        self.app.tell(event.reason, "warning")

    def _draw(self) -> None:
        draft = self.app.draft
        for name, value in self._percent.items():
            self.query_one(f"#factor-{name}", Slider).show((value,))
        for name in AXES:
            self.query_one(f"#axis-{name}", Slider).show(draft.axes[name][:1])
        workload = shown_workload(draft)
        self.query_one(KeyBar).show(actions.bar(actions.CHIPS, self.app.keys))
        status, chart = self.query_one(StatusLine), self.query_one(PlotView)
        if workload is None:
            status.show("Chips", "")
            chart.empty = NO_CASE
            chart.show(None)
            self.query_one("#words", Static).update("")
            return
        selected = tuple(name for name in draft.implementations if name in chips.PREDICTABLE)
        names = selected[: chips.MAX_NAMES] or SHOWN
        made = chips.predict_chips(workload, names, self._keys, self._percent)
        cases = self._cases()
        status.show("Chips · predicted, not measured", workload.label)
        chart.empty = "No source states the rate and the bandwidth of these chips."
        chart.show(chips.plot(workload, made, self.app.peaks, cases, names))
        pane = self.query_one("#chart-pane")
        pane.border_title = literal(chips.title(workload, made))
        pane.border_subtitle = literal(chips.legend(made, cases, names))
        self.query_one("#words", Static).update(
            "\n".join(chips.description_lines(workload, made, self.app.peaks, cases))
        )

    def _cases(self) -> tuple[Case, ...]:
        """Return what was measured where the engine runs: the shown report if it is of a run there."""
        report = self.app.report
        return report.cases if report and report.environment.machine == self.app.device_name else ()


def _percent(value: int) -> str:
    return f"{value} %"


def _parse_percent(text: str) -> tuple[int, ...]:
    digits = text.replace("%", "").strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 6 and 1 <= int(digits) <= 10_000):
        raise ValueError(f"takes a whole number of percent from 1 to 10,000, not '{text.strip()}'")
    return (int(digits),)


def _parse(name: str, text: str) -> tuple[int, ...]:
    return (parse_number(text, MAX_SIZES[name]),)
