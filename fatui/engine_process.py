"""Run of a plan in a worker process, restarted after a crash and always terminated."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Final

import msgspec
import psutil
from msgspec import structs

from attention.core import events as on
from attention.core.errors import truncated
from attention.core.plan import AnyPlan, Assignment, Plan, StreamPlan
from attention.core.results import Peaks
from attention.core.workload import FineTuning, Generation
from attention.engine.record import record_of
from fatui import __version__
from fatui.untrusted_text import MAX_SHOWN, escape_all

LINE_LIMIT: Final = 2**26
PATIENCE_S: Final = 0.5
"""Seconds that a worker may take to exit before it is killed."""
POLL_S: Final = 0.1
STDERR_BYTES: Final = 2**16
"""Bytes kept from the end of a worker's stderr."""
SILENCE_S: Final = 30.0
BUILD_SILENCE_S: Final = 300.0
"""Longer than SILENCE_S, since a compiler reports nothing while it works."""
HUNG_S: Final = 600.0
"""Seconds of silence after which a worker counts as hung, unless its case is large enough to explain a slow call."""
SLOW_FLOPS_PER_S: Final = 3e7
"""A lower bound on the rate of any implementation."""
SLOW_MODEL_FLOPS_PER_S: Final = 1e8
"""A lower bound on the rate of a model's matrix products: a tenth of what MLX's slowest ones reach on one core."""
SLOW_WEIGHTS_PER_S: Final = 1e7
"""A lower bound on the rate at which weights are made or read, in bytes per second."""
LATE: Final = 4
"""Multiple of a model case's estimated time that a silence in it may last."""
RUN_MARK: Final = "FATUI_RUN"
"""Environment variable that marks a worker's processes, in any session."""
Listener = Callable[[on.AnyEvent], None]


class Silence:
    """Time since the worker's last event, and whether its current step accounts for it.

    Attributes:
        last_event_s: clock reading at the last event.
        step: the current step, as text.
        building: the implementation being compiled, or an empty string.
        expected_s: the worker's estimate of the current case; None before there is one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last_event_s = clock()
        self.step = self.building = ""
        self.expected_s: float | None = None

    def record_event(self, event: on.AnyEvent) -> None:
        """Handle an event."""
        self.last_event_s = self._clock()
        if isinstance(event, on.CaseStarted):
            self.step = self.building = ""
            self.expected_s = None
        elif isinstance(event, on.CaseTimeEstimated):
            self.expected_s = event.seconds
        elif isinstance(event, on.StepStarted):
            # In the rounds all take their turns.
            self.step = event.step if event.step == "rounds" else f"{event.implementation}: {event.step}"
            self.building = event.implementation if event.step == "build" else ""

    @property
    def seconds(self) -> float:
        """Seconds since the worker's last event."""
        return self._clock() - self.last_event_s

    @property
    def unexplained(self) -> bool:
        """Whether the silence is longer than the current step accounts for."""
        return self.seconds >= (BUILD_SILENCE_S if self.building else SILENCE_S)


class Engine:
    """One run of a plan.

    Attributes:
        record: the run's record, updated as events arrive.
        stopped: whether stop() was called.
        process_id: the worker's, or None while there is none.
        silence: how long the worker has been silent.
    """

    def __init__(self, plan: AnyPlan, listener: Listener = lambda event: None, peaks: Peaks | None = None) -> None:
        """Prepare a run of a plan; `peaks` are the machine's rates if already measured."""
        self.record = record_of(plan)
        self.record.peaks = peaks or Peaks()
        self.stopped = False
        self.process_id: int | None = None
        self._assignment = Assignment(plan=plan, peaks=peaks)
        self._listener = listener
        self._run = uuid.uuid4().hex
        self._process: asyncio.subprocess.Process | None = None
        self._culprit: str | None = None
        self._stopping = asyncio.Event()
        self._hung: str | None = None
        self.silence = Silence()

    async def run(self) -> None:
        """Run until all cases are complete, nothing can run, or stop() is called; leave no process running."""
        fruitless = 0
        while not (self.stopped or self.record.done or self.record.refused):
            before = self._assignment
            reason = await self._run_worker()
            if self.stopped or self.record.done or self.record.refused:
                return
            self._resume_after(reason)
            fruitless = fruitless + 1 if self._assignment == before else 0
            if fruitless == 2:
                what = "the engine cannot start"
                if self._culprit:
                    what = f"implementation: '{self._culprit}' cannot be loaded"
                self._dispatch(on.RunRefused(kind="cannot start", reason=f"{what}: {reason}"))

    def stop(self) -> None:
        """End the worker, by force after PATIENCE_S; what was measured stays in the record."""
        self.stopped = True
        self._stopping.set()
        if self._process is not None:
            _signal_group(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the worker and its children at once."""
        self.stop()
        if self._process is not None:
            _signal_group(self._process, signal.SIGKILL)

    def _dispatch(self, event: on.AnyEvent) -> None:
        if isinstance(event, on.RunStarted):
            event.environment = structs.replace(event.environment, fatui=__version__)
        self.record.apply(event)
        self._listener(event)

    async def _run_worker(self) -> str:
        """Run one worker to its end, and return a description of how it ended."""
        mark = _mark_file()
        events, events_end = os.pipe()
        errors, errors_end = os.pipe()
        tail = PipeTail(errors)
        self._hung = None
        try:
            try:
                process = await self._start(mark, events_end, errors_end)
            finally:
                os.close(events_end)
                os.close(errors_end)
            try:
                await self._follow(process, events)
            finally:
                await _end(process)
                _kill_marked(self._run)
                self._process = self.process_id = None
            self._culprit = _marked(mark, self.record.plan.ordered)
        finally:
            tail.close()
            os.close(mark)
        return self._hung or _exit_reason(process.returncode or 0, tail.lines)

    async def _start(self, mark: int, events: int, errors: int) -> asyncio.subprocess.Process:
        """Start a worker that writes its events to one pipe and its stderr to another.

        The pipes are not asyncio's own: with those, a process counts as running while any of its children, even a
        detached one, holds a pipe open.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "attention.engine.worker", "--mark", str(mark)),
            stdin=asyncio.subprocess.PIPE,
            stdout=events,
            stderr=errors,
            pass_fds=(mark,),
            start_new_session=True,
            env={**os.environ, RUN_MARK: self._run},
        )
        self._process, self.process_id = process, process.pid
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._assignment) + b"\n")
        return process

    async def _follow(self, process: asyncio.subprocess.Process, events: int) -> None:
        """Read events until the worker closes its stdout, ends, hangs, or is stopped."""
        reader = asyncio.StreamReader(limit=LINE_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(events, "rb", 0))
        self.silence = Silence()
        reading = asyncio.create_task(self._read_events(reader))
        ended = asyncio.create_task(_wait_for(process))
        others = (ended, asyncio.create_task(self._stopping.wait()), asyncio.create_task(self._wait_for_hang()))
        try:
            await asyncio.wait({reading, *others}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():  # the rest of the pipe is still to be read; a child may hold it open
                await asyncio.wait({reading}, timeout=PATIENCE_S)
            if reading.done():
                reading.result()
        finally:
            for task in (reading, *others):
                task.cancel()
            await asyncio.gather(reading, *others, return_exceptions=True)
            transport.close()

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        while not self.stopped:
            try:
                line = await reader.readline()
            except ValueError:
                self._dispatch(on.Message(level="warning", text="a line of the engine was too long, and is ignored"))
                continue
            if not line:
                return
            try:
                event = escape_all(on.decode(line), MAX_SHOWN)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                event = on.Message(level="warning", text=f"a line of the engine could not be read: {error}")
            self.silence.record_event(event)
            self._dispatch(event)

    async def _wait_for_hang(self) -> None:
        """Return once the silence is so long that the worker must have hung."""
        while self.silence.seconds < self._longest_silence_s() or self.silence.building:
            await asyncio.sleep(1)
        self._hung = f"was silent for {self.silence.seconds:.0f} s, and was terminated"

    def _longest_silence_s(self) -> float:
        """Seconds of silence that the current case accounts for: a round of very slow calls, or a model's pass."""
        plan, case = self.record.plan, self.record.current_case
        if case is None:
            return HUNG_S
        if isinstance(plan, Plan):
            calls = 2 * (len(plan.ordered) + 1)
            return max(HUNG_S, calls * plan.cases[case].flops / SLOW_FLOPS_PER_S)
        if self.silence.expected_s is not None:
            return max(HUNG_S, LATE * self.silence.expected_s)
        if isinstance(plan, StreamPlan):
            return HUNG_S
        weights = self.record.cases[case].weights_bytes or 0
        pass_s = _model_flops(plan.cases[case], weights) / SLOW_MODEL_FLOPS_PER_S
        return max(HUNG_S, weights / SLOW_WEIGHTS_PER_S + pass_s)

    def _resume_after(self, reason: str) -> None:
        """Fail the row that was running, and create the assignment of the next worker."""
        case = self.record.current_case
        if case is None:
            return
        if self.record.cases[case].stopped_by is not None:
            case += 1
        elif self._culprit:
            self._fail(case, self._culprit, reason)
        if case == len(self.record.cases):
            self._dispatch(on.RunDone())
            return
        rows = self.record.cases[case].rows.values()
        failed = tuple(row.implementation for row in rows if row.ended and row.ended.status == "failed")
        peaks = self.record.peaks if self.record.peaks.matmul_flops_per_s else None
        self._assignment = Assignment(plan=self.record.plan, first_case=case, skip={case: failed}, peaks=peaks)

    def _fail(self, case: int, name: str, reason: str) -> None:
        if self.record.cases[case].rows[name].ended is None:
            self._dispatch(on.RowEnded(case=case, implementation=name, status="failed", reason=reason))
        self._dispatch(on.Message(level="info", text=f"{name} crashed the engine; it is restarted without it"))


def _model_flops(work: Generation | FineTuning, weights_bytes: int) -> float:
    """Return at least the FLOPs of a model's pass over its prompts, or of a training step, at two bytes a weight."""
    if isinstance(work, FineTuning):
        return 3.0 * work.tokens * weights_bytes
    return float(work.batch * work.prompt * weights_bytes)


def _marked(mark: int, names: tuple[str, ...]) -> str | None:
    """Return the implementation that the worker was running; it writes its number, from 1, before each step."""
    number = int.from_bytes(os.pread(mark, 1, 0), "little")
    return names[number - 1] if number else None


def _signal_group(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _kill_marked(run: str) -> None:
    """Kill the processes of a run that left the worker's session; what they start inherits the mark.

    A process whose environment cannot be read, another user's say, is none of them.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN_MARK) == run:
                process.kill()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for the worker to exit; kill it and its children if it does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _wait_for(process)
    except TimeoutError:
        _signal_group(process, signal.SIGKILL)
        await _wait_for(process)
    finally:
        _signal_group(process, signal.SIGKILL)


async def _wait_for(process: asyncio.subprocess.Process) -> None:
    """Wait for a process to end, even if its pipes are still open, which asyncio's own wait may wait for."""
    while process.returncode is None:
        await asyncio.sleep(POLL_S)


class PipeTail:
    """Reader of a pipe while the event loop runs; keeps the last STDERR_BYTES.

    Lines may be of any length; other processes that hold the pipe open are not waited for.
    """

    def __init__(self, pipe: int) -> None:
        """Read from the given end of a pipe, which close() closes."""
        self._pipe, self._kept = pipe, bytearray()
        os.set_blocking(pipe, False)
        asyncio.get_running_loop().add_reader(pipe, self._read)

    def close(self) -> None:
        """Read what is left in the pipe, and close it."""
        asyncio.get_running_loop().remove_reader(self._pipe)
        for _ in range(STDERR_BYTES // 4096):  # a child that keeps writing must not keep this loop going
            if not self._read():
                break
        os.close(self._pipe)

    @property
    def lines(self) -> list[str]:
        """The last lines."""
        return bytes(self._kept).decode(errors="replace").splitlines()

    def _read(self) -> bool:
        """Read one chunk; return whether there may be more."""
        try:
            chunk = os.read(self._pipe, STDERR_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._pipe)
        self._kept += chunk
        del self._kept[:-STDERR_BYTES]
        return bool(chunk)


def _mark_file() -> int:
    """Create a file of one byte, in memory where possible: a full disk must not lose the mark."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fatui-mark")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _exit_reason(code: int, stderr: list[str]) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({name}){hint}"
    last = next((line for line in reversed(stderr) if line.strip()), "")
    return f"the engine ended with code {code}" + (f": {truncated(last)}" if last else "")
