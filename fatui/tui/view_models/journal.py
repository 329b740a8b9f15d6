"""The app's log: timestamped lines of the engine and the app, in a bounded buffer."""

from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from typing import Final, Literal

from msgspec import Struct

from attention.core import events as on
from attention.core.plan import AnyPlan
from fatui import formatting
from fatui.untrusted_text import escape_controls

Level = Literal["info", "warning", "error"]
MAX_LINES: Final = 10_000


class LogLine(Struct, frozen=True):
    """One line of the log."""

    at: str
    """Local time, HH:MM:SS."""
    level: Level
    text: str

    def __str__(self) -> str:
        """Format the line as in an export."""
        level = "" if self.level == "info" else f"{self.level}: "
        return f"{self.at}  {level}{self.text}"


class Log:
    """The latest lines of the log, and counts of all.

    Attributes:
        count: number of lines ever written; those before `count - len(journal)` have been dropped.
        errors: number of messages ever written at level error.
    """

    def __init__(self, now: Callable[[], datetime] = datetime.now, most: int = MAX_LINES) -> None:
        self.count = 0
        self.errors = 0
        self._now = now
        self._lines: deque[LogLine] = deque(maxlen=most)

    def write(self, text: str, level: Level = "info") -> None:
        """Add a message; each of its lines becomes a line of the log."""
        at = f"{self._now():%H:%M:%S}"
        self.errors += level == "error"
        for part in text.splitlines() or [""]:
            self._lines.append(LogLine(at, level, escape_controls(part)))
            self.count += 1

    def __len__(self) -> int:
        """Number of lines still held."""
        return len(self._lines)

    def since(self, number: int) -> Iterator[LogLine]:
        """Iterate over the lines from a number on, counted from 0 over all ever written."""
        gone = self.count - len(self._lines)
        return islice(self._lines, max(0, number - gone), None)

    def text(self) -> str:
        """Format all lines still held, as in an export."""
        return "".join(f"{line}\n" for line in self._lines)


LeveledText = tuple[str, Level] | None
UNLOGGED: Final = None
NOTHING_LEFT: Final = ("failed", "nothing to run")
"""Why a case ends that is not complete."""


def event_line(event: on.AnyEvent, plan: AnyPlan) -> LeveledText:
    """Return the log line of an event and its level, or None for events that are not logged."""
    match event:
        case on.RunStarted():
            where = event.environment
            parts = [where.machine or "device n/a", where.backend or "backend n/a", f"MLX {where.mlx or 'n/a'}"]
            return f"engine up: {', '.join(parts)}", "info"
        case on.PeaksMeasured():
            peaks = event.peaks
            best = formatting.flops(peaks.flops_per_s)
            return f"best rate {best}/s, copy {formatting.bytes_per_second(peaks.copy_bytes_per_s)}", "info"
        case on.Message():
            return event.text, event.level
        case on.RunRefused():
            return formatting.problem_text(event), "error"
        case on.RunDone():
            return "all cases complete", "info"
        case on.WorkerUnusable():
            return "the device is in an unknown state; the engine is restarted", "warning"
        case on.TrialStarted() | on.Tuned() | on.Switched():
            return on.tuning_log_line(event), "info"
        case on.RankStarted():
            return f"rank {event.rank}: {event.device} of {event.host}, process {event.process_id}", "info"
        case on.RankFailed():
            return f"rank {event.rank}: {event.reason}", "warning"
        case on.Progress() | on.RankAlive() | on.ConditionsMeasured():
            return UNLOGGED
        case _:
            return _case_line(event, plan)


def _case_line(event: on.CaseEvent, plan: AnyPlan) -> LeveledText:
    match event:
        case on.CaseStarted():
            return f"case {event.case + 1} of {len(plan.cases)}: {plan.cases[event.case].label}", "info"
        case on.RouteFound():
            return f"{event.implementation}: {event.route.path}; {event.route.reason}", "info"
        case on.CaseTimeEstimated():
            return formatting.estimate_text(event), "info"
        case on.RowEnded():
            level: Level = "error" if event.status == "failed" else "warning"
            return f"{event.implementation}: {event.status}: {event.reason}", level
        case on.FirstCall():
            return f"{event.implementation}: first call {formatting.seconds(event.seconds)}", "info"
        case on.AccuracyChecked() if not event.accurate:
            return f"{event.implementation}: inaccurate: {event.detail}", "error"
        case on.ReferenceChosen() if event.implementation != plan.ordered[0]:
            return f"speedups are relative to {event.implementation}", "info"
        case on.CaseDone() if event.stopped_by in NOTHING_LEFT:
            return f"case {event.case + 1} of {len(plan.cases)} ended: no implementation is left", "warning"
        case on.CaseDone():
            return f"case {event.case + 1} of {len(plan.cases)} complete, stopped by {event.stopped_by}", "info"
    return UNLOGGED
