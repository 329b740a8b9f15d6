"""A program in a pty, timed by its output and by the scheduler's figures of its process (Linux)."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
SIZE: Final = (120, 40)


class Scheduled(NamedTuple):
    """What the scheduler gave a process, all its threads together, in seconds."""

    cpu_s: float
    """On a core."""
    waited_s: float
    """Ready to run, while others had the cores."""

    def since(self, before: "Scheduled") -> "Scheduled":
        """Return the difference from an earlier reading."""
        return Scheduled(self.cpu_s - before.cpu_s, self.waited_s - before.waited_s)


def scheduled(pid: int) -> Scheduled:
    """Read the figures of a process."""
    figures = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return Scheduled(sum(int(each[0]) for each in figures) / 1e9, sum(int(each[1]) for each in figures) / 1e9)


def environment_for(root: Path) -> dict[str, str]:
    """Return the environment of a program that takes its packages from a checkout."""
    environment = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(paths)}


class PtyApp:
    """A program started in a pty; closing it ends its processes."""

    def __init__(self, *command: str, root: Path = ROOT) -> None:
        """Start a program with the packages of a checkout."""
        self.began = time.monotonic()
        environment = environment_for(root)
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.chdir(root)
            os.execvpe(command[0], command, environment)
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))

    def __enter__(self) -> "PtyApp":
        """Return the program."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()

    def read(self, seconds: float, until: str | None = None) -> float | None:
        """Read for a while, or until a text appears; return the seconds that took, or None if it did not appear."""
        began, seen = time.monotonic(), b""
        while (left := began + seconds - time.monotonic()) > 0:
            if not select.select([self._file], [], [], left)[0]:
                break
            try:
                seen += os.read(self._file, 65_536)
            except OSError:  # the program has ended
                break
            if until is not None and until.encode() in seen:
                return time.monotonic() - began
        return None

    def press(self, keys: str) -> None:
        """Send keys."""
        os.write(self._file, keys.encode())

    def ended(self, seconds: float = 5.0) -> bool:
        """Whether the program exits by itself within a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read(0.05)
            if self.pid == 0 or os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = 0
                return True
        return False

    def leave(self) -> None:
        """Stop a run and quit the app, as a user would.

        Raises:
            TimeoutError: it did not exit.
        """
        self.press("x")
        self.read(1.5)
        self.press("q")
        if not self.ended():
            raise TimeoutError("the app did not exit")

    def close(self) -> None:
        """Kill the program if it still runs."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
