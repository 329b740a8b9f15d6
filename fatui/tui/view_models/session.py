"""One run as seen by the app: its engine, phase, rows and trends."""

import asyncio
import contextlib
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from msgspec import structs

from attention.core import events as on
from attention.core.plan import AnyPlan, ModelPlan, Plan
from attention.core.results import Case, FineTuningCase, ModelCase, Report, Run, StreamCase
from attention.engine.record import INTERRUPTED, AnyRecord, Record
from fatui import formatting
from fatui.engine_process import Listener, Silence
from fatui.report.document import counted
from fatui.tui.view_models.journal import NOTHING_LEFT, Log, event_line

Phase = Literal["starting", "running", "stopping", "done", "stopped", "refused", "failed"]
ENDED: Final = ("done", "stopped", "refused", "failed")
KILL_AFTER_S: Final = 0.6
"""Seconds after a stop until an engine that has not stopped is killed."""


MAX_POINTS: Final = 512


class Series:
    """A time series of a measured value in a bounded buffer; when it is full, its resolution halves.

    Attributes:
        points: the series so far, oldest first; each point is the mean of `per_point` values.
        last, highest: the latest and the highest single value; None before the first.
    """

    def __init__(self, most: int = MAX_POINTS) -> None:
        self.points: list[float] = []
        self.per_point = 1
        self.last: float | None = None
        self.highest: float | None = None
        self._max_points = most
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self.last = value
        self.highest = value if self.highest is None else max(self.highest, value)
        self._sum += value
        self._count += 1
        if self._count >= self.per_point:
            self.points.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.points) >= self._max_points:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=False)]
            self.per_point *= 2


class Drives(Protocol):
    """The interface of an engine that the app uses."""

    record: AnyRecord
    process_id: int | None

    async def run(self) -> None:
        """Run to the end."""

    def stop(self) -> None:
        """Stop the run."""


MakeEngine = Callable[[AnyPlan, Listener], Drives]
BESIDE_ROWS: Final = (on.Progress, on.Message)
"""Events that change neither rows nor trends; a worker sends the first several times a second."""
P = TypeVar("P", bound=AnyPlan)
C = TypeVar("C")


class RunSession(Generic[P, C]):
    """A run from its start until another replaces it.

    Attributes:
        phase: the current phase.
        rates: tokens/s of each implementation on the current case.
        memory: bytes by name: "MLX active", "MLX peak", "process", and "device" if there is one.
        case_number: the case that the trends belong to, or None.
        id: the run's id in the history.
        finding: one line with the result; empty until the run has ended.
        rounds_s: seconds that the complete cases spent in their rounds.
        once_s: seconds before cases were restarted: provisional rounds and compilation, not repeated by the next run.
        expected_s: estimated maximum seconds from the start of the run to the end of its case, from earlier runs or a
            timed call; None without such an estimate, and once the case is complete.
        changes: how often rows, steps or trends have changed.
        least_left_s: the least time left that was estimated at a tick of the screen.
    """

    def __init__(
        self,
        plan: P,
        journal: Log,
        make_engine: MakeEngine,
        *,
        command: str,
        preset: str | None = None,
        expected_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.plan = plan
        self.preset = preset
        self.expected_s = expected_s
        self.command = command
        self.phase: Phase = "starting"
        self.rates: dict[str, Series] = {}
        self.memory: dict[str, Series] = {}
        self.case_number: int | None = None
        self.finding = ""
        self.engine = make_engine(plan, self._listen)
        self.id = secrets.token_hex(4)
        self._started = now().astimezone().isoformat(timespec="seconds")
        self._journal = journal
        self._clock = clock
        self._routes: set[str] = set()
        self._final: dict[int, C] = {}
        self.changes = 0
        self._provisional: dict[tuple[int, bool], C] = {}
        """Cases of the run as it goes on, computed since the last event that changes rows."""
        self._complete: asyncio.Queue[int] = asyncio.Queue()
        self._start_clock()

    def _start_clock(self) -> None:
        """Reset everything that is timed."""
        self._began = self._event_at = self._step_began = self._case_began = self._progress_at = self._clock()
        self._rounds_began: float | None = None
        self._ended: float | None = None
        self.rounds_s = self.once_s = 0.0
        self.least_left_s = math.inf
        self._silence = Silence(self._clock)

    @property
    def since_progress_s(self) -> float:
        """Seconds since the worker's last progress event."""
        return self._clock() - self._progress_at

    @property
    def record(self) -> AnyRecord:
        """Everything the engine has reported."""
        return self.engine.record

    @property
    def active(self) -> bool:
        """Whether the engine may still be running."""
        return self.phase not in ENDED

    @property
    def incomplete(self) -> str:
        """How many cases of a finished run are complete, if not all are: "1 of 2 cases complete"; else empty."""
        cases = self.record.cases
        complete = sum(case.stopped_by not in NOTHING_LEFT for case in cases)
        if not self.record.done or complete == len(cases):
            return ""
        return f"{complete} of {counted(len(cases), 'case')} complete"

    @property
    def phase_text(self) -> str:
        """The phase in words; of a run with cases in which nothing was measured, how many are complete."""
        return self.phase if self.phase != "done" else self.incomplete or self.phase

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, up to the end."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def building(self) -> str:
        """The implementation being compiled, or an empty string."""
        return self._silence.building

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's last event; 0 when it has ended."""
        return self._silence.seconds if self.active else 0.0

    @property
    def silent(self) -> bool:
        """Whether the engine has been silent for longer than its current step explains."""
        return self.active and self._silence.unexplained

    @property
    def building_s(self) -> float:
        """Seconds that the compilation has taken so far."""
        return self._clock() - self._step_began if self.building and self.active else 0.0

    async def run(self) -> None:
        """Run the engine to its end; exceptions are logged in the journal, and what was measured is kept."""
        finishing = asyncio.create_task(self._finish_cases())
        failed = False
        try:
            await self.engine.run()
        except Exception as error:
            failed = True
            self._journal.write(f"the engine's driver failed: {type(error).__name__}: {error}", "error")
        finally:
            finishing.cancel()
            self._ended = self._clock()
        with contextlib.suppress(asyncio.CancelledError):
            await finishing
        await asyncio.to_thread(self._finish_rest)
        self._conclude(failed)

    def _conclude(self, failed: bool) -> None:
        record = self.record
        stopped = self.phase == "stopping"
        self.phase = "failed" if failed else "refused" if record.refused else "done" if record.done else "stopped"
        if self._final:
            from fatui.verdict import finding

            self.finding = finding(self.report())
        elif record.refused:
            from fatui.formatting import problem_text

            self.finding = f"nothing could run: {problem_text(record.refused)}"
        elif stopped:
            self.finding = "stopped before anything was measured"

    def stop(self) -> None:
        """Stop the run; an engine that does not respond is killed."""
        if not self.active:
            return
        self.phase = "stopping"
        self.engine.stop()
        asyncio.get_running_loop().call_later(KILL_AFTER_S, self.kill)

    def kill(self) -> None:
        """Kill the engine's process and its children."""
        if self.active and self.engine.process_id is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.engine.process_id, signal.SIGKILL)

    def record_memory(self, name: str, value: float | None) -> None:
        """Record a memory figure, in bytes."""
        if value is not None:
            self.changes += 1
            self.memory.setdefault(name, Series()).add(value)

    def case(self, index: int) -> C:
        """Return the rows of one case: final once it is complete, provisional while it runs."""
        if index in self._final:
            return self._final[index]
        key = index, self.active
        if key not in self._provisional:
            self._provisional[key] = self._incomplete(self.record.case(index))
        return self._provisional[key]

    def _incomplete(self, case: Any) -> Any:
        """Return the case of a run that goes on, whose rows are not interrupted but incomplete."""
        if not self.active:
            return case
        unfinished = (
            structs.replace(row, stopped_by=None) if row.stopped_by == INTERRUPTED else row for row in case.rows
        )
        return structs.replace(case, rows=tuple(unfinished))

    def is_final(self, index: int) -> bool:
        """Whether the rows of a case are final."""
        return index in self._final

    @property
    def any_rows(self) -> bool:
        """Whether the finished run has any rows."""
        return bool(self._final)

    def report(self) -> Report:
        """Return the report of the run so far, as stored in the history and in exports."""
        cases = [self.case(index) for index in range(len(self.record.cases))]
        return self.record.report(self._run_info(), cases)

    def _run_info(self) -> Run:
        """Return the description of the run for the report."""
        return Run(
            id=self.id,
            started=self._started,
            seconds=self.elapsed_s,
            command=self.command,
            preset=self.preset,
            interrupted=self.phase != "done",
        )

    def _listen(self, event: on.AnyEvent) -> None:
        if not isinstance(event, BESIDE_ROWS):
            self._provisional.clear()
            self.changes += 1
        self._silence.record_event(event)
        self._event_at = self._silence.last_event_s
        if self.phase == "starting":
            self.phase = "running"
        self._log_event(event)
        if isinstance(event, on.CaseStarted):
            self._begin_case(event.case)
        elif isinstance(event, on.StepStarted):
            self._step_began = self._event_at
            if event.step == "rounds" and self._rounds_began is None:
                self._rounds_began = self._event_at
        elif isinstance(event, on.Progress):
            self._progress_at = self._event_at
        elif isinstance(event, on.CaseTimeEstimated):
            self.expected_s = self.elapsed_s - self.once_s + event.seconds
        elif isinstance(event, on.StreamAdvanced):
            self.expected_s = None  # the worker goes by the pace of the tokens from here on
        elif isinstance(event, on.RankAlive):
            self.record_memory(f"rank {event.rank}", event.active_bytes)
        elif isinstance(event, on.RoundsDone):
            self.expected_s = None  # the worker goes by the pace of the rounds from here on
            self._follow(event)
        elif isinstance(event, on.CaseDone):
            self.expected_s = None
            self.rounds_s += self._event_at - self._rounds_began if self._rounds_began is not None else 0.0
            self._complete.put_nowait(event.case)

    def _log_event(self, event: on.AnyEvent) -> None:
        """Log an event if it is worth a line; note a restarted case or incomplete ones, and do not repeat routes."""
        line = event_line(event, self.plan)
        if line is None:
            return
        if isinstance(event, on.RouteFound):
            if line[0] in self._routes:
                return
            self._routes.add(line[0])
        if isinstance(event, on.CaseStarted) and event.case == self.case_number:
            line = f"case {event.case + 1} is restarted, to measure all of them together", "info"
        if isinstance(event, on.RunDone):
            line = (self.incomplete, "warning") if self.incomplete else line
        self._journal.write(*line)

    def _begin_case(self, case: int) -> None:
        if case == self.case_number:
            self.once_s += self._event_at - self._case_began
        else:
            self._routes.clear()
        self.case_number, self._case_began = case, self._event_at
        self.rates, self._rounds_began = {}, None

    def _follow(self, event: on.RoundsDone) -> None:
        tokens = self.plan.cases[event.case].tokens
        for name, samples in event.samples.items():
            if name not in (on.REPEATED_REFERENCE, on.WITHOUT_ATTENTION):
                series = self.rates.setdefault(name, Series())
                for seconds in samples:
                    if seconds is not None:  # None: the implementation took no part in the round
                        series.add(tokens / seconds)
        self.record_memory("MLX active", event.active_bytes)
        self.record_memory("MLX peak", event.peak_bytes)

    async def _finish_cases(self) -> None:
        """Compute the final rows of each case when it completes, off the event loop."""
        while True:
            index = await self._complete.get()
            self._final[index] = await asyncio.to_thread(self.record.case, index)

    def _finish_rest(self) -> None:
        for index, case in enumerate(self.record.cases):
            if index not in self._final and case.started:
                made = self.record.case(index)
                if made.rows:
                    self._final[index] = made


AnySession = RunSession[Any, Any]


class Session(RunSession[Plan, Case]):
    """A run over attention shapes."""

    def extend(self, last: "Session") -> None:
        """Count the rounds of an earlier run of the same cases too."""
        record, before = self.record, last.record
        assert isinstance(record, Record) and isinstance(before, Record)
        record.extend(before)


class ModelSession(RunSession[ModelPlan, ModelCase | FineTuningCase | StreamCase]):
    """A run of generation, fine-tuning, or over a stream.

    Attributes:
        losses: the training losses of each implementation so far.
        message: the worker's latest message: the expected time of a case, or how to shorten it.
    """

    losses: dict[str, Series]
    message: str

    def _start_clock(self) -> None:
        super()._start_clock()
        self.message = ""
        self.losses = {}

    def _begin_case(self, case: int) -> None:
        super()._begin_case(case)
        self.losses = {}

    def _listen(self, event: on.AnyEvent) -> None:
        super()._listen(event)
        if isinstance(event, on.Message):
            self.message = event.text
        elif isinstance(event, on.CaseTimeEstimated):
            self.message = formatting.estimate_text(event)
        if isinstance(event, on.IterationDone) and event.implementation != on.REPEATED_REFERENCE:
            tokens = self.plan.cases[event.case].tokens
            if event.number > 1:  # the first one compiles
                self.rates.setdefault(event.implementation, Series()).add(tokens / event.seconds)
            if event.loss is not None:
                self.losses.setdefault(event.implementation, Series()).add(event.loss)
            self.record_memory("MLX active", event.active_bytes)
            self.record_memory("MLX peak", event.peak_bytes)
