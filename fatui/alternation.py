"""Commands of two versions of the code that measure in turns, round by round (`attention/engine/turns.py`)."""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from attention.engine.turns import TURNS

POLL_S: Final = 0.02
PATIENCE_S: Final = 30.0
"""Time for a command to end by itself."""
STDERR_BYTES: Final = 2000
"""Bytes kept from the end of a command's stderr."""
NEXT: Final = "FATUI_TURNS_NEXT"
"""Environment variable of the socket at which a command asks for the file of its next run; without it there is one."""


class Ended(RuntimeError):
    """A command ended without a result; the message is the end of its stderr.

    Attributes:
        code: its exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Alternation:
    """Versions of the code whose runs are measured in turns, several pairs of them one after the other.

    What is compared is computed by a worker, a process of its own for each run. The command `fatui bench` that starts
    it stays for all runs; one of a version that does not know how is started again for each.
    """

    def __init__(self, folders: Sequence[Path], arguments: Sequence[str], scratch: Path) -> None:
        """Prepare; nothing is started yet.

        Args:
            folders: where the commands run, the versions of the code.
            arguments: those of `fatui bench`.
            scratch: an empty folder.
        """
        self._scratch, self._pairs = scratch, 0
        self._sides = [_Side(folder, arguments, scratch, number) for number, folder in enumerate(folders)]

    def measure(self, files: Sequence[Path], first: int = 0) -> None:
        """Measure a run of each version in turns, and let each write its run to its file.

        All load at once, and wait for each other; then the first prepares before the next does, and so on, and the
        rounds alternate. A version whose engine takes no turns runs before the others measure.

        Args:
            files: where each run is written.
            first: number of the version that begins.

        Raises:
            Ended: a command wrote no run.
        """
        self._pairs += 1
        folder = self._scratch / f"{self._scratch.name}-{self._pairs}"  # its name is kept: which runs are a pair
        folder.mkdir()
        ordered = [*self._sides[first:], *self._sides[:first]]
        for side in ordered:
            side.begin(files[self._sides.index(side)], folder)
        for side in ordered:
            side.wait_for_worker()
        _hand_out_turns(ordered)
        for side in ordered:
            if not side.file.exists():
                side.end()
                raise Ended(f"{side.folder}: no run was measured{side.problem}", side.code)

    def end(self) -> None:
        """End the commands."""
        for side in self._sides:
            side.end()


@contextmanager
def in_turns(folders: Sequence[Path], arguments: Sequence[str]) -> Iterator[Alternation]:
    """Yield an alternation of versions, and end its commands afterwards."""
    with tempfile.TemporaryDirectory(prefix="fatui-turns-") as scratch:
        made = Alternation(folders, arguments, Path(scratch))
        try:
            yield made
        finally:
            made.end()


def next_file() -> str | None:
    """Ask for the file of a command's next run, and wait for it; None if there is none. Its worker has other turns."""
    path = os.environ.get(NEXT)
    if not path:
        return None
    with socket.socket(socket.AF_UNIX) as asking, suppress(OSError):
        asking.connect(path)
        with asking.makefile("rb") as answer:
            line = answer.readline()
        if line:
            file, os.environ[TURNS] = json.loads(line)
            return str(file)
    return None


class _Side:
    """The command of one version, and its worker's socket while it has one.

    Each has a socket to connect to, since workers of different versions connect in any order.
    """

    file: Path

    def __init__(self, folder: Path, arguments: Sequence[str], scratch: Path, number: int) -> None:
        self.folder, self._arguments, self._errors = folder, arguments, scratch / f"{number}.err"
        self._number = number
        self._commands = _listening(scratch / f"next-{number}")
        self._environment = {**os.environ, NEXT: str(scratch / f"next-{number}"), "XDG_DATA_HOME": str(scratch)}
        self._workers: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asking: socket.socket | None = None
        self.worker: socket.socket | None = None

    @property
    def running(self) -> bool:
        """Whether the command runs, and has not asked for its next run."""
        return self._asking is None and self._process is not None and self._process.poll() is None

    @property
    def code(self) -> int:
        """The exit code of a command that has ended."""
        return (self._process.returncode if self._process else 0) or 0

    @property
    def problem(self) -> str:
        """The last line of its stderr, after a colon."""
        lines = self._errors.read_bytes()[-STDERR_BYTES:].decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f": {last.removeprefix('fatui: ')}" if last else ""

    def begin(self, file: Path, folder: Path) -> None:
        """Let the command measure its next run, or start it; its worker finds its turns in a folder."""
        self.file = file
        file.unlink(missing_ok=True)
        if self._workers is not None:
            self._workers.close()
        turns = folder / f"turns-{self._number}"
        self._workers = _listening(turns)
        if self._asking is not None:
            with self._asking, suppress(OSError):  # it has ended meanwhile
                self._asking.sendall(json.dumps([str(file.resolve()), str(turns)]).encode() + b"\n")
            self._asking = None
            if self.running:
                return
        command = [sys.executable, "-m", "fatui", "bench", *self._arguments, "--json", str(file.resolve())]
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self._environment, TURNS: str(turns)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def wait_for_worker(self) -> None:
        """Wait until its worker is ready for the first turn, or the run is over."""
        while self.worker is None and self.running:
            self.look(POLL_S)

    def look(self, seconds: float) -> None:
        """Look whether a worker connects, or the command asks for its next run, within some seconds."""
        assert self._workers is not None
        with selectors.DefaultSelector() as selector:
            for each in (self._workers, self._commands):
                selector.register(each, selectors.EVENT_READ)
            for key, _ in selector.select(seconds):
                if key.fileobj is self._workers:
                    self.worker = self._workers.accept()[0]
                else:
                    self._asking = self._commands.accept()[0]

    def take_turn(self) -> None:
        """Let its worker work until it gives the turn back, or ends."""
        if self.worker is None:
            return
        try:
            self.worker.sendall(b".")
            over = not self.worker.recv(1)
        except OSError:
            over = True
        if over:
            self.worker.close()
            self.worker = None

    def end(self) -> None:
        """End the command, if it still runs, and the connections; one that asks for its next run has none."""
        asked = self._asking is not None
        for each in (self._workers, self._commands, self._asking, self.worker):
            if each is not None:
                each.close()
        self._asking = self.worker = None
        if self._process is None:
            return
        if not asked and self._process.poll() is None:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=PATIENCE_S)
        self._process.kill()
        self._process.wait()


def _listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made


def _hand_out_turns(sides: Sequence[_Side]) -> None:
    """Give each side its turns until the runs of all are over.

    A command whose worker has ended may start another, as after a crash; that takes the side's place.
    """
    while any(side.worker is not None or side.running for side in sides):
        for side in sides:
            side.take_turn()
        idle = all(side.worker is None for side in sides)
        for side in sides:
            if side.worker is None and side.running:
                side.look(POLL_S if idle else 0.0)
