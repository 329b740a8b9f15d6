"""What `fatui remote` starts on the other machine: one service, which ends with the connection.

A thread passes stdin on and ends the process when stdin closes, as with the connection, or when no line has come for
`ORPHAN_S`, as on a link that is dead without being closed. Everything printed goes to stderr; stdout is the service's.
"""

import asyncio
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final, get_args

import msgspec

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.plan import Assignment
from fatui.engine_process import Engine
from fatui.remote import ORPHAN_S, Beat, Service, own_greeting
from fatui.telemetry import Reading, Telemetry
from fatui.worker_process import kill_marked

BEAT_S: Final = 0.5
BEATS_PER_READING: Final = 4
LOST: Final = 1


def serve(words: Sequence[str]) -> int:
    """Run a service and return the exit code; the words are its name, and for "command" a command of fatui.

    Raises:
        UsageError: there is no such service.
    """
    service, *arguments = words or [""]
    if service not in get_args(Service):
        raise UsageError(f"--serve: got '{service}'; it takes {', '.join(get_args(Service))}")
    sys.stdout.buffer.write(msgspec.json.encode(own_greeting()) + b"\n")
    sys.stdout.buffer.flush()
    watch = LinkWatch()
    match service:
        case "engine":
            return _serve_engine(watch)
        case "advise" | "diagnose":
            from fatui.tui import advisor

            advisor.main() if service == "advise" else advisor.diagnose()
        case "command":
            from fatui.cli.main import main

            return main(arguments)
    return 0


class LinkWatch:
    """The thread that passes on stdin, without empty lines, and ends this process with the connection.

    Attributes:
        ending: called before the process ends.
    """

    def __init__(self) -> None:
        self.ending: Callable[[], None] = lambda: None
        self._own = os.dup(0)
        reading, self._feed = os.pipe()
        os.dup2(reading, 0)
        os.close(reading)
        threading.Thread(target=self._pass_on, daemon=True).start()

    def _pass_on(self) -> None:
        rest = b""
        while select.select([self._own], [], [], ORPHAN_S)[0]:
            chunk = os.read(self._own, 2**16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            content = b"".join(line + b"\n" for line in lines if line.strip())
            with contextlib.suppress(BrokenPipeError):
                while content:
                    content = content[os.write(self._feed, content) :]
        self.end()

    def end(self) -> None:
        """End this process, after what it started."""
        with contextlib.suppress(Exception):
            self.ending()
        os._exit(LOST)


def _serve_engine(watch: LinkWatch) -> int:
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    line = sys.stdin.buffer.readline()
    if line:
        asyncio.run(_run(msgspec.json.decode(line, type=Assignment), watch, stream))
    return 0


async def _run(assignment: Assignment, watch: LinkWatch, stream: BinaryIO) -> None:
    """Run the rest of a plan, and write its events."""

    def write(line: bytes) -> None:
        try:
            stream.write(line)
            stream.flush()
        except OSError:  # the connection is cut
            watch.end()

    engine = Engine(assignment.plan, lambda event: write(on.encode(event)), assignment.peaks, assignment=assignment)

    def end() -> None:
        engine.kill()
        kill_marked(engine.mark)

    watch.ending = end
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        loop.add_signal_handler(number, watch.end)
    beating = asyncio.create_task(_beat(engine, write))
    try:
        await engine.run()
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def _beat(engine: Engine, write: Callable[[bytes], None]) -> None:
    """Report every BEAT_S what runs, and now and then how the machine is."""
    telemetry, count = Telemetry(), 0
    while True:
        reading: Reading | None = None
        if count % BEATS_PER_READING == 0:
            reading = await asyncio.to_thread(telemetry.read, engine.process_id)
        write(msgspec.json.encode(Beat(running=engine.running, reading=reading)) + b"\n")
        count += 1
        await asyncio.sleep(BEAT_S)
