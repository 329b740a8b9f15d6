"""A worker process with pipes of its own: its events, the end of its stderr, and how it ended."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Final, Self

import msgspec
import psutil

from attention.core import events as on
from attention.engine.resume import exit_reason
from fatui.untrusted_text import MAX_SHOWN, escape_all

LINE_LIMIT: Final = 2**26
PATIENCE_S: Final = 0.5
"""Seconds that a worker may take to exit before it is killed."""
POLL_S: Final = 0.1
STDERR_BYTES: Final = 2**16
"""Bytes kept from the end of a worker's stderr."""
RUN_MARK: Final = "FATUI_RUN"
"""Environment variable that marks a worker's processes, in any session."""
WORKER: Final = (sys.executable, "-m", "attention.engine.worker")


class Worker:
    """A process that writes events to its stdout.

    Attributes:
        process: the process; in a session of its own.
    """

    def __init__(self, process: asyncio.subprocess.Process, events: int, errors: int) -> None:
        """Read the events and the stderr of a process from the given ends of pipes."""
        self.process = process
        self._events = events
        self._tail = PipeTail(errors)

    @classmethod
    async def start(cls, command: Sequence[str], run: str, pass_fds: Sequence[int] = ()) -> Self:
        """Start a command whose processes are marked with a run.

        The pipes are not asyncio's own: with those, a process counts as running while any of its children, even a
        detached one, holds a pipe open.
        """
        events, events_end = os.pipe()
        errors, errors_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=events_end,
                stderr=errors_end,
                pass_fds=pass_fds,
                start_new_session=True,
                env={**os.environ, RUN_MARK: run},
            )
        except BaseException:
            os.close(events)
            os.close(errors)
            raise
        finally:
            os.close(events_end)
            os.close(errors_end)
        return cls(process, events, errors)

    def send(self, line: bytes) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self.process.stdin.write(line + b"\n")

    async def read(self, take: Callable[[on.AnyEvent], None]) -> None:
        """Hand on its events until it closes its stdout."""
        too_long = on.Message(level="warning", text="a line of the engine was too long, and is ignored")
        await self.read_lines(lambda line: take(decode_event(line)), lambda: take(too_long))

    async def read_lines(self, take: Callable[[bytes], None], too_long: Callable[[], None]) -> None:
        """Hand on the lines of its stdout until it closes it; of a line that is too long there is only a call."""
        reader = asyncio.StreamReader(limit=LINE_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        pipe, self._events = os.fdopen(self._events, "rb", 0), -1
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        try:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:
                    too_long()
                    continue
                if not line:
                    return
                take(line)
        finally:
            transport.close()

    async def wait(self, every_s: float = POLL_S) -> None:
        """Wait for the process to end, even if its pipes are still open, which asyncio's own wait may wait for."""
        while self.process.returncode is None:
            await asyncio.sleep(every_s)

    def signal(self, number: int) -> None:
        """Signal the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    async def end(self) -> None:
        """Wait for the process to exit; kill it and its children if it does not. Close the pipes."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.wait()
        finally:
            self.signal(signal.SIGKILL)
            self._tail.close()
            if self._events >= 0:
                os.close(self._events)

    def reason(self) -> str:
        """Return how it ended, after it has."""
        return exit_reason(self.process.returncode or 0, self._tail.lines)


def decode_event(line: bytes) -> on.AnyEvent:
    """Return the event of a line, harmless to show; of a line that is none, a warning."""
    try:
        return escape_all(on.decode(line), MAX_SHOWN)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return on.Message(level="warning", text=f"a line of the engine could not be read: {error}")


def kill_marked(run: str) -> None:
    """Kill the processes of a run that left the worker's session; what they start inherits the mark.

    A process whose environment cannot be read, another user's say, is none of them.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN_MARK) == run:
                process.kill()


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
