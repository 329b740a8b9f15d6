"""Turns of workers that measure in alternation: a round of one version of the code, then a round of the other.

The process that compares them serves a Unix socket, and names it in the environment. A worker connects when it has
loaded its code, and from then on works only while it has the turn: it waits for a byte, and gives the turn back with a
byte of its own after each round. So what slows the machine for longer than a round slows both versions alike. After its
last round it closes the socket, and with it its turn, as one that crashes does.
"""

import socket
import time
from contextlib import suppress
from typing import Final

TURNS: Final = "FATUI_TURNS"
"""Environment variable of the socket's path; without it nobody waits."""


class Turns:
    """A worker's place among those that take turns; without others nothing waits."""

    def __init__(self, path: str | None) -> None:
        """Connect to a socket, if there is one, and wait for the first turn."""
        self._waited_s = 0.0
        self._socket: socket.socket | None = None
        if path:
            self._socket = socket.socket(socket.AF_UNIX)
            with suppress(OSError):  # the process that assigns turns has ended
                self._socket.connect(path)
            self._wait()

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self._socket is None

    def pass_on(self) -> None:
        """Give the turn to the next worker, and wait until it comes back."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(b".")
            self._wait()

    def end(self) -> None:
        """Leave the turns to the others, and wait for none any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def clock(self) -> float:
        """Return seconds since an arbitrary start, less those that this worker waited for turns."""
        return time.perf_counter() - self._waited_s

    def _wait(self) -> None:
        began = time.perf_counter()
        try:
            over = self._socket is None or not self._socket.recv(1)
        except OSError:
            over = True
        if over:
            self.end()
        self._waited_s += time.perf_counter() - began
