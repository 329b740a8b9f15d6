"""Progress of a run on stderr: a bar in a terminal, one line per case elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from attention.core import events as on
from attention.core.plan import AnyPlan
from attention.implementations.autotune.tuning_events import log_line
from fatui import formatting
from fatui.cli.messages import print_line
from fatui.engine_process import Silence
from fatui.tui.view_models.journal import estimate_line

if TYPE_CHECKING:
    from rich.progress import Progress

REDRAW_S: Final = 0.25
"""Minimum seconds between redraws; drawing more often would take time from the measurement."""
BAR_WIDTH: Final = 30
MAX_QUIET_S: Final = 10.0
"""Without a bar, the current step is printed after this long without a line."""


class ProgressPrinter:
    """Reporter of a run's progress on stderr, from its events."""

    def __init__(self, plan: AnyPlan) -> None:
        self._plan = plan
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("starting", total=1.0, left="…") if self._bar else None
        self._drawn = 0.0
        self._progress: on.Progress | None = None
        self._progress_at = 0.0
        self._told = ""
        self._told_at = time.monotonic()
        self._silence_told_s = 0.0

    def __enter__(self) -> Self:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar, and leave stderr without a trace of it."""
        if self._bar:
            self._bar.stop()

    def listen(self, event: on.AnyEvent) -> None:
        """Handle one event."""
        match event:
            case on.Progress():
                self._progress, self._progress_at = event, time.monotonic()
                self._draw()
            case on.CaseStarted() if self._bar is None:
                label = self._plan.cases[event.case].label
                self._print_once(f"case {event.case + 1} of {len(self._plan.cases)}: {label}")
            case on.CaseTimeEstimated():
                self._print_once(estimate_line(event))
            case on.StepStarted(step="training") if self._bar is None:
                self._print_once(f"{event.implementation}: training")
            case on.RowEnded() if self._bar is None:
                self._print_once(f"{event.implementation}: {event.status}")  # the reason is printed below the table
            case on.Tuned() | on.Switched():
                self._print_once(log_line(event))
            case on.Message():
                self._print_once(event.text if event.level == "info" else f"{event.level}: {event.text}")

    def tick(self, silence: Silence) -> None:
        """Update the time left; warn that the engine is silent, and again each time the silence has doubled."""
        self._draw()
        if self._bar is None and time.monotonic() - self._told_at >= MAX_QUIET_S:
            self._print_once(self._progress.now if self._progress else "starting the engine")
        if not silence.unexplained:
            self._silence_told_s = 0.0
        elif silence.seconds >= 2 * self._silence_told_s:
            self._silence_told_s = silence.seconds
            at = f" ({silence.step})" if silence.step else ""
            lasted = formatting.duration(silence.seconds)
            self._print_once(f"the engine has been silent for {lasted}{at}; ctrl+c stops it and keeps the results")

    def _draw(self) -> None:
        now, event = time.monotonic(), self._progress
        if self._bar is None or self._task is None or event is None or now - self._drawn < REDRAW_S:
            return
        self._drawn = now
        left = formatting.time_left(event.remaining_s - (now - self._progress_at))
        self._bar.update(self._task, completed=event.done, description=event.now, left=left)
        self._bar.refresh()

    def _print_once(self, text: str) -> None:
        """Print a line unless it repeats the last one, as when a restarted engine begins its case again."""
        if text == self._told:
            return
        self._told, self._told_at = text, time.monotonic()
        if self._bar:
            self._bar.console.print(f"fatui: {text}", markup=False, highlight=False)
        else:
            print_line(text)


def _bar() -> "Progress":
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    from fatui.cli.printing import console

    return Progress(
        BarColumn(BAR_WIDTH),
        TaskProgressColumn(),
        TextColumn("· {task.fields[left]} ·"),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console(sys.stderr),
        auto_refresh=False,
        transient=True,
    )
