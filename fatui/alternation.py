"""Commands of two versions of the code that measure in turns, round by round (`attention/engine/turns.py`)."""

import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from attention.engine.turns import TURNS

POLL_S: Final = 0.1
STDERR_BYTES: Final = 2000
"""Bytes kept from the end of a command's stderr."""


class Ended(RuntimeError):
    """A command ended without a result; the message is the end of its stderr.

    Attributes:
        code: its exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_in_turns(folders: Sequence[Path], arguments: Sequence[str], files: Sequence[Path]) -> None:
    """Run `fatui bench` in each of the folders, in turns, and let each write its run to its file.

    The first prepares before the second starts, and so on; the rounds alternate. A version whose engine takes no turns
    runs alone, before or after the others.

    Args:
        folders: where the commands run, the versions of the code.
        arguments: those of `fatui bench`.
        files: where each run is written.

    Raises:
        Ended: a command wrote no run.
    """
    with tempfile.TemporaryDirectory(prefix="fatui-turns-") as scratch, socket.socket(socket.AF_UNIX) as listening:
        path = Path(scratch) / "turns"
        listening.bind(str(path))
        listening.listen(len(folders) + 1)
        environment = {**os.environ, TURNS: str(path), "XDG_DATA_HOME": scratch}
        started: list[_Side] = []
        try:
            for folder, file in zip(folders, files, strict=True):
                side = _Side(folder, arguments, file, environment, Path(scratch) / f"{len(started)}.err")
                started.append(side)
                side.wait_for_worker(listening)
            _hand_out_turns(listening, started)
        finally:
            for side in started:
                side.end()
        for side in started:
            if not side.file.exists():
                raise Ended(f"{side.folder}: no run was measured{side.problem}", side.code)


class _Side:
    """The command of one version, and its worker's socket while it has one."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], file: Path, environment: Mapping[str, str], errors: Path
    ) -> None:
        self.folder, self.file, self._errors = folder, file, errors
        self.worker: socket.socket | None = None
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fatui", "bench", *arguments, "--json", str(file.resolve())]
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
            )

    @property
    def running(self) -> bool:
        """Whether the command runs."""
        return self._process.poll() is None

    @property
    def code(self) -> int:
        """The exit code of a command that has ended."""
        return self._process.returncode or 0

    @property
    def problem(self) -> str:
        """The last line of its stderr, after a colon."""
        lines = self._errors.read_bytes()[-STDERR_BYTES:].decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f": {last.removeprefix('fatui: ')}" if last else ""

    def wait_for_worker(self, listening: socket.socket) -> None:
        """Wait until its worker is ready for the first turn, or the command has ended."""
        while self.worker is None and self.running:
            self.worker = _accepted(listening, POLL_S)

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
        """End the command, if it still runs, and the connection."""
        if self.worker is not None:
            self.worker.close()
        if self.running:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=30)
            self._process.kill()
        self._process.wait()


def _hand_out_turns(listening: socket.socket, sides: Sequence[_Side]) -> None:
    """Give each side its turns until all commands have ended.

    A command whose worker has ended may start another, as after a crash; that takes the side's place.
    """
    while any(side.worker is not None or side.running for side in sides):
        for side in sides:
            side.take_turn()
        waiting = [side for side in sides if side.worker is None and side.running]
        if waiting:
            idle = all(side.worker is None for side in sides)
            found = _accepted(listening, POLL_S if idle else 0.0)
            if found is not None:
                waiting[0].worker = found


def _accepted(listening: socket.socket, seconds: float) -> socket.socket | None:
    """Return the next connection, if there is one within some seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return listening.accept()[0]
