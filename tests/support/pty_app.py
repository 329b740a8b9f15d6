"""A program in a pty, timed by its output."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIZE = 120, 40


class PtyApp:
    """A program started in a pty; closing it ends its processes."""

    def __init__(self, *command):
        self.began = time.monotonic()
        environment = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, environment)
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def read(self, seconds, until=None):
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

    def press(self, keys):
        os.write(self._file, keys.encode())

    def ended(self, seconds=5.0):
        """Whether the program exits by itself within a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read(0.05)
            if self.pid == 0 or os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = 0
                return True
        return False

    def leave(self):
        """Stop a run and quit the app, as a user would."""
        self.press("x")
        self.read(1.5)
        self.press("q")
        assert self.ended()

    def close(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
