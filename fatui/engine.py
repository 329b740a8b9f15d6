"""Runs a plan in a process of its own, begins anew when an implementation takes it down, and ends it for certain."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import structs

from attention import events as on
from attention.models.record import record_of
from attention.plan import AnyPlan, Assignment
from attention.report import Peaks
from fatui import __version__
from fatui.foreign_text import MAX_SHOWN, cleaned

LINE_LIMIT: Final = 2**26
PATIENCE_S: Final = 0.5
"""How long a worker may take to end by itself before it is killed."""
STDERR_LINES: Final = 20
Listener = Callable[[on.AnyEvent], None]


class Engine:
    """One run of a plan.

    Attributes:
        record: everything that is known of the run, changed as events arrive.
        stopped: whether stop() was called.
        process_id: the worker's, or None while there is none.
    """

    def __init__(self, plan: AnyPlan, listener: Listener = lambda event: None, peaks: Peaks | None = None) -> None:
        """Takes what to run, who listens, and the machine's rates where they were measured already."""
        self.record = record_of(plan)
        self.record.peaks = peaks or Peaks()
        self.stopped = False
        self.process_id: int | None = None
        self._assignment = Assignment(plan=plan, peaks=peaks)
        self._listener = listener
        self._process: asyncio.subprocess.Process | None = None
        self._culprit: str | None = None

    async def run(self) -> None:
        """Runs until all cases are complete, nothing can run, or stop() is called; leaves no process behind."""
        fruitless = 0
        while not (self.stopped or self.record.done or self.record.refused):
            before = self._assignment
            reason = await self._run_worker()
            if self.stopped or self.record.done or self.record.refused:
                return
            self._go_on_after(reason)
            fruitless = fruitless + 1 if self._assignment == before else 0
            if fruitless == 2:
                self._tell(on.RunRefused(kind="cannot start", reason=f"the engine cannot start: {reason}"))

    def stop(self) -> None:
        """Ends the worker at once; what was measured stays in the record."""
        self.stopped = True
        if self._process is not None:
            _signal_group(self._process, signal.SIGTERM)

    def _tell(self, event: on.AnyEvent) -> None:
        if isinstance(event, on.RunStarted):
            event.environment = structs.replace(event.environment, fatui=__version__)
        self.record.apply(event)
        self._listener(event)

    async def _run_worker(self) -> str:
        """Runs one worker to its end and returns in words how it ended."""
        with tempfile.TemporaryFile() as mark:
            process = await self._start(mark.fileno())
            stderr: deque[str] = deque(maxlen=STDERR_LINES)
            try:
                await asyncio.gather(self._read_events(process), _drain(process, stderr))
            finally:
                await _end(process)
                self._process = self.process_id = None
            self._culprit = _marked(mark.fileno(), self.record.plan.ordered)
        return _how_it_ended(process.returncode or 0, stderr)

    async def _start(self, mark: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "attention.worker", "--mark", str(mark)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(mark,),
            start_new_session=True,
            limit=LINE_LIMIT,
        )
        self._process, self.process_id = process, process.pid
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._assignment) + b"\n")
        return process

    async def _read_events(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if self.stopped:
                return
            try:
                event = cleaned(on.decode(line), MAX_SHOWN)
            except msgspec.DecodeError as error:
                event = on.Message(level="warning", text=f"a line of the engine could not be read: {error}")
            self._tell(event)

    def _go_on_after(self, reason: str) -> None:
        """Fails the row that was running, and makes the assignment for the next worker."""
        case = self.record.current_case
        if case is None:
            return
        if self.record.cases[case].stopped_by is not None:
            case += 1
        elif self._culprit:
            self._fail(case, self._culprit, reason)
        if case == len(self.record.cases):
            self._tell(on.RunDone())
            return
        rows = self.record.cases[case].rows.values()
        failed = tuple(row.implementation for row in rows if row.ended and row.ended.status == "failed")
        peaks = self.record.peaks if self.record.peaks.matmul_flops_per_s else None
        self._assignment = Assignment(plan=self.record.plan, first_case=case, skip={case: failed}, peaks=peaks)

    def _fail(self, case: int, name: str, reason: str) -> None:
        if self.record.cases[case].rows[name].ended is None:
            self._tell(on.RowEnded(case=case, implementation=name, status="failed", reason=reason))
        self._tell(on.Message(level="info", text=f"{name} ended the engine; it is started again without it"))


def _marked(mark: int, names: tuple[str, ...]) -> str | None:
    """The implementation that the worker was busy with; it writes its number, from 1, before each step."""
    number = int.from_bytes(os.pread(mark, 1, 0), "little")
    return names[number - 1] if number else None


def _signal_group(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Waits for the worker; kills it and all it started if it does not end by itself."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
    except TimeoutError:
        _signal_group(process, signal.SIGKILL)
        await process.wait()
    finally:
        _signal_group(process, signal.SIGKILL)


async def _drain(process: asyncio.subprocess.Process, lines: deque[str]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        lines.append(line.decode(errors="replace").rstrip())


def _how_it_ended(code: int, stderr: deque[str]) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({name}){hint}"
    last = next((line for line in reversed(stderr) if line.strip()), "")
    return f"the engine ended with code {code}" + (f": {last}" if last else "")
