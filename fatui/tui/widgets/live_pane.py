"""The live view of a run: progress, tokens/s of each implementation, memory, and the machine's state."""

import math

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from attention.core.results import Report
from fatui import formatting
from fatui.tui.terminal import literal
from fatui.tui.view_models import estimate
from fatui.tui.view_models.session import AnySession, Series, Session
from fatui.tui.view_models.table_lines import step_text
from fatui.tui.view_models.telemetry import Reading, reading_text
from fatui.tui.widgets.charts import Scale, Trend, TrendChart

IDLE = "No run yet. Press r to run; tokens/s, memory and progress are shown here during the run."
MEMORY = ("MLX active", "MLX peak", "process", "device")
BAR = 24
AROUND = 8
"""Rows of the pane besides the trends: borders, progress, the headings of two charts, the telemetry line."""


class LivePane(Vertical, can_focus=True):
    """Pane with the trends of a session."""

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.border_title = "3 Live"
        self._least: int | None = None
        self._devices = 0

    def compose(self) -> ComposeResult:
        """Yield the progress, two charts and the telemetry line."""
        yield Static(IDLE, id="progress", markup=False)
        yield TrendChart(Scale("tokens/s"), id="rates")
        yield TrendChart(Scale("memory", columns=("now", "peak")), id="memory")
        yield Static(id="devices", markup=False)
        yield Static(id="telemetry", markup=False)

    def show(self, session: Session | None, opened: Report | None = None) -> None:
        """Draw the run; without one, say which past run is open, or that none is."""
        self.set_class(session is None, "-idle")
        if session is None:
            self._set_least(None)
            self.query_one("#progress", Static).update(opened_line(opened) if opened else IDLE, layout=False)
            self.query_one("#telemetry", Static).update("", layout=False)
            self._show_devices([])
            self.border_title = "3 Live"
            return
        self.query_one("#progress", Static).update(progress_line(session), layout=False)
        trends = rate_trends(session)
        rates, memory = self.query_one("#rates", TrendChart), self.query_one("#memory", TrendChart)
        highest = max((series.highest or 0.0 for series in session.rates.values()), default=0.0)
        rates.show(Scale("tokens/s", ceiling(highest), formatting.rate(ceiling(highest))), trends)
        drawn = memory_trends(session)
        top = ceiling_bytes(max((series.highest or 0.0 for series in session.memory.values()), default=0.0))
        memory.show(Scale("memory", top, formatting.size(top), ("now", "peak")), drawn)
        self._fit(rates, len(trends))
        self._fit(memory, len(drawn))
        devices = device_lines(session)
        self._show_devices(devices)
        needed = len(trends) + len(drawn) + len(devices) + AROUND
        self._set_least(min(needed, self.app.size.height - AROUND))
        label = session.plan.cases[session.case_number].label if session.case_number is not None else ""
        self.border_title = literal(f"3 Live · {label}" if label else "3 Live")

    def _show_devices(self, lines: list[str]) -> None:
        """Draw a line for each rank's device; none in a run on one."""
        shown = self.query_one("#devices", Static)
        shown.display = bool(lines)
        shown.update("\n".join(lines), layout=len(lines) != self._devices)
        self._devices = len(lines)

    def _fit(self, chart: TrendChart, rows: int) -> None:
        share = max(1, rows) + 1
        if chart.styles.height is None or chart.styles.height.value != share:
            chart.styles.height = f"{share}fr"

    def _set_least(self, rows: int | None) -> None:
        """Set the pane's minimum height to fit all trends; a minimum on one chart would push the others out."""
        if self.screen.has_class("-wide"):  # the grid gives it its height
            rows = None
        if rows != self._least:
            self._least = rows
            self.styles.min_height = rows

    def show_reading(self, reading: Reading) -> None:
        """Draw the telemetry line."""
        self.query_one("#telemetry", Static).update(reading_text(reading), layout=False)


def opened_line(report: Report) -> str:
    """Format the line shown instead of the progress while a past run is open."""
    run = report.run
    when = run.started[:16].replace("T", " ")
    broken_off = ", interrupted" if run.interrupted else ""
    name = f"{run.preset or 'unnamed'}, {run.id} of {when}"
    return f"A past run is open: {name}; it took {formatting.duration(run.seconds)}{broken_off}."


def progress_line(session: AnySession) -> str:
    """Format the progress of the run and its current step."""
    progress = session.record.progress
    if not session.active:
        return f"{session.phase} after {formatting.duration(session.elapsed_s)}"
    if session.phase == "stopping":
        return "stopping the engine; what was measured is kept"
    if progress is None:
        return "starting the engine"
    if session.building:
        return (
            f"compiling {session.building}, {formatting.duration(session.building_s)} so far; cached for the next run"
        )
    left = estimate.remaining(session)
    done = left.done if left else 0.0
    filled = round(done * BAR)
    many = len(session.plan.cases)
    case = f"case {(session.case_number or 0) + 1} of {many} · " if many > 1 else ""
    bar = "█" * filled + "░" * (BAR - filled)
    return f"{bar} {done:>4.0%}  {f'{left.words} · ' if left else ''}{case}{progress.now}"


def device_lines(session: AnySession) -> list[str]:
    """Return a line for each rank: its device, what it does, and its time, waiting and bytes in the latest calls."""
    record, index = session.record, session.case_number
    rows = record.cases[index].rows if index is not None else {}
    several = len({state.started.host for state in record.ranks.values() if state.started}) > 1
    lines = []
    for rank, state in sorted(record.ranks.items()):
        alive, started = state.alive, state.started
        running = alive.running if alive else None
        where = (
            f"{started.device} of {started.host}" if started and several else started.device if started else "starting"
        )
        found = rows[running].per_rank if running in rows else ()
        own = next((each for each in found if each.rank == rank), None)
        doing = f"{running}: {formatting.rank_words(own)}" if own else running or "waits"
        parts = [f"rank {rank}  {state.failed or doing}"]
        if alive and not state.failed:
            parts.append(f"{formatting.size(alive.active_bytes)} active")
        parts.append(where)
        lines.append(" · ".join(parts))
    return lines


def rate_trends(session: AnySession) -> tuple[Trend, ...]:
    """Return one trend per implementation of the plan, with a note where there are no points."""
    index = session.case_number
    rows = session.record.cases[index].rows if index is not None else {}
    trends = []
    for name in session.plan.ordered:
        series, row = session.rates.get(name), rows.get(name)
        if row is not None and row.ended is not None:
            trends.append(Trend(name, note=f"{row.ended.status}: {row.ended.reason}"))
        elif series is None or not series.points:
            note = step_text(row.step) if row is not None and row.step else "waiting"
            trends.append(Trend(name, note=note if session.active else "no samples"))
        else:
            trends.append(_trend(name, series, formatting.rate))
    return tuple(trends)


def memory_trends(session: Session) -> tuple[Trend, ...]:
    """Return one trend per memory figure that the system reports."""
    known = [(name, session.memory[name]) for name in MEMORY if name in session.memory]
    return tuple(_trend(name, series, formatting.size) for name, series in known) or (Trend("", note="no figures yet"),)


def _trend(name: str, series: Series, say: "type[str] | object") -> Trend:
    assert callable(say)
    return Trend(name, tuple(series.points), now=say(series.last), best=say(series.highest))


def ceiling(highest: float) -> float:
    """Round up to 1, 1.2, 1.6, 2, 3, 4, 6 or 8 times a power of ten, so that the scale seldom changes."""
    if highest <= 0:
        return 0.0
    power: float = 10 ** math.floor(math.log10(highest))
    return next(step * power for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if step * power >= highest * 0.999)


def ceiling_bytes(highest: float) -> float:
    """Round up to a power of two."""
    return float(2 ** math.ceil(math.log2(highest))) if highest > 1 else highest
