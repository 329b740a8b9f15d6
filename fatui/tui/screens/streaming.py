"""The Streaming screen: time, memory and loss of each token of a stream, beside full attention."""

from typing import Any, ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual.binding import BindingType
from textual.strip import Strip
from textual.widget import Widget

from attention.core.errors import UsageError
from attention.core.plan import ModelPlan, StreamPlan
from attention.core.results import StreamCase
from attention.core.stream import ATTENTION_ROWS, STREAM_ROWS, Stream
from attention.mlx_lm.configuration import bundled_names, check_mlx_lm, find_model
from fatui.report.stream_curves import (
    GAP,
    Cells,
    StreamChart,
    axis_words,
    drawn,
    legend,
    loss_chart,
    memory_chart,
    time_chart,
)
from fatui.reproduce import stream_command
from fatui.tui import actions
from fatui.tui.painting import KeepsStyles
from fatui.tui.screens.models import ROOMY, ModelScreen
from fatui.tui.view_models import kv_format
from fatui.tui.view_models.session import ModelSession
from fatui.tui.widgets.choice import Choice

LABEL_WIDTH: Final = 10
ROWS_AROUND: Final = 2
"""Rows besides the plot and the legend: title and axis."""
MIN_PLOT_ROWS: Final = 3
ROW_NAMES: Final = tuple(STREAM_ROWS)
IDLE: Final = "{run} runs the setup above: attention alone on random inputs, or a model on the bundled text."
ALONE: Final = "none"
"""The choice of no model: attention alone."""
WIDE: Final = 110
"""Columns from which a second chart stands beside the first."""


class StreamCurves(KeepsStyles):
    """Curves of the rows of a stream on common axes, measured and extrapolated, with a legend."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"curves--axis", *(f"curves--{name}" for name in ROW_NAMES)}

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
        width = max(10, self.room.width - LABEL_WIDTH - 2)
        words = len(legend(self.chart, width)) if self.chart else 1
        return width, max(MIN_PLOT_ROWS, self.room.height - ROWS_AROUND - words)

    def render_line(self, y: int) -> Strip:
        """Draw the title, one row of the plot, the axis, or the legend."""
        axis = self.part_style("curves--axis")
        chart, (width, height) = self.chart, self._plot
        if y == 0:
            parts = [Segment(self._title, axis)]
        elif chart is None or not chart.curves:
            parts = [Segment("not measured yet" if y == 1 else "", axis)]
        elif y <= height:
            parts = [Segment(self._end(y - 1, chart), axis)]
            parts += [Segment(mark, self._style(number, chart)) for mark, number in self._cells(chart)[y - 1]]
        elif y == height + 1:
            parts = [Segment(" " * (LABEL_WIDTH + 1) + axis_words(chart, width), axis)]
        else:
            lines = legend(chart, width)
            words = lines[y - height - 2] if y - height - 2 < len(lines) else []
            parts = [Segment(" " * (LABEL_WIDTH + 1), axis)]
            parts += [Segment(f"{text}{GAP}", self._style(number, chart)) for text, number in words]
        return Strip(parts).adjust_cell_length(self.room.width, self.part_style())

    def _cells(self, chart: StreamChart) -> Cells:
        key = (chart, self._plot)
        if self._drawn[0] != key:
            self._drawn = key, drawn(chart, *self._plot)
        return self._drawn[1]

    def _end(self, row: int, chart: StreamChart) -> str:
        if row == 0:
            return f"{chart.format(chart.high):>{LABEL_WIDTH}}┤"
        if row == self._plot[1] - 1:
            return f"{chart.format(chart.low) if chart.low else '0':>{LABEL_WIDTH}}┤"
        return " " * LABEL_WIDTH + "│"

    def _style(self, number: int, chart: StreamChart) -> Style:
        name = chart.curves[number].name if number >= 0 else ""
        return self.part_style(f"curves--{name}" if name in ROW_NAMES else "curves--axis")


class Streaming(ModelScreen):
    """Screen that follows a stream of tokens through a bounded cache."""

    CSS_PATH: ClassVar = ["list.tcss", "model_screen.tcss", "streaming.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.STREAMING), actions.closing("streaming")]
    TITLE_TEXT = "Streaming"
    NAME = "streaming"
    ROWS = tuple(STREAM_ROWS)
    IDLE_TEXT = IDLE
    DRAWS_OFTEN = False

    def _model_choice(self, chosen: dict[str, tuple[str, ...]]) -> Choice:
        known = tuple(dict.fromkeys((ALONE, *bundled_names(), *chosen.get("model", ()))))
        return Choice("model", known, id="model")

    def choices(self) -> list[Choice]:
        """Return the choices of tokens, window, first tokens, shape, dtype and K/V; others can be typed."""
        return [
            Choice("tokens", ("100000", "10000", "1000000"), id="tokens", typed_option=str),
            Choice("window", ("1024", "252", "2048", "4096", "32768"), id="window", typed_option=str),
            Choice("first", ("4", "0", "1", "8"), id="first", typed_option=str),
            Choice("heads", ("8", "4", "16", "32"), id="heads", typed_option=str),
            Choice("dim", ("64", "32", "128"), id="head_dim", typed_option=str),
            Choice("type", ("bfloat16", "float16", "float32"), id="dtype"),
            Choice("K/V", ("none", "int8", "int4"), id="kv_format", typing=kv_format),
        ]

    def charts(self) -> list[Widget]:
        """Return the charts of time and loss, and that of memory for wide terminals."""
        return [
            StreamCurves("time per token", id="stream-times"),
            StreamCurves("loss per token", id="stream-losses"),
            StreamCurves("resident memory", id="stream-memory"),
        ]

    def check_available(self) -> None:
        """Raise NoBackendError if a model is chosen, and mlx-lm is not installed."""
        if self.chosen("model") != ALONE and self.app.remote is None:
            check_mlx_lm()

    def plan(self) -> StreamPlan:
        """Build the plan from the choices; heads and head dim are those of a model, if one is chosen."""
        tokens, window, first = (self.numbers(name)[0] for name in ("tokens", "window", "first"))
        model = self.chosen("model")
        shape: dict[str, Any]
        if model == ALONE:
            shape = {"heads": self.numbers("heads")[0], "head_dim": self.numbers("head_dim")[0]}
        else:
            found = find_model(model)
            shape = {"model": model, "heads": found.heads, "kv_heads": found.kv_heads, "head_dim": found.head_dim}
        case = Stream(
            tokens=tokens,
            window=window,
            first=first,
            dtype=self.chosen("dtype"),  # type: ignore[arg-type]  # checked as it is made
            kv_format=self.chosen("kv_format"),
            **shape,
        )
        rows = tuple(name for name in self.implementations if case.model or name in ATTENTION_ROWS)
        if not rows:
            raise UsageError(*self.notes())
        return StreamPlan(cases=(case,), implementations=rows)

    def notes(self) -> list[str]:
        """Name the rows that are left out without a model."""
        left_out = [name for name in self.implementations if name not in ATTENTION_ROWS]
        if self.chosen("model") != ALONE or not left_out:
            return []
        return [f"{' and '.join(left_out)}: only with a model"]

    def command(self, plan: ModelPlan) -> str:
        """Return the command that runs a plan."""
        assert isinstance(plan, StreamPlan)
        return stream_command(plan)

    def draw(self, session: ModelSession) -> None:
        """Draw the curves of a run."""
        self._draw_case(session.record.case(0))

    @property
    def draws_curves(self) -> bool:
        """Whether curves are drawn below the rows, as there is no room for the charts."""
        return self.app.size.height < ROOMY and not (self.session and self.session.active)

    def _show(self) -> None:
        super()._show()
        self.set_class(self.app.size.width >= WIDE, "-wide")
        report = self.report
        if self.session is None and report is not None and report.streams and self.app.size.height >= ROOMY:
            self.query_one("#live-pane").set_class(False, "-idle")
            self.query_one("#progress").display = False
            self._draw_case(report.streams[0])

    def _draw_case(self, case: StreamCase) -> None:
        losses = loss_chart(case)
        self.query_one("#stream-times", StreamCurves).show(time_chart(case))
        self.query_one("#stream-losses", StreamCurves).show(losses)
        self.query_one("#stream-losses").display = bool(losses.curves)
        self.query_one("#stream-memory", StreamCurves).show(memory_chart(case))
