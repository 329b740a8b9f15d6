"""The app's log: timestamped lines of the engine and the app, in a bounded buffer."""

from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from typing import Final, Literal

from msgspec import Struct

from fatui.foreign_text import clean

Level = Literal["info", "warning", "error"]
MOST_LINES: Final = 10_000


class Line(Struct, frozen=True):
    """One line of the log."""

    at: str
    """Local time, HH:MM:SS."""
    level: Level
    text: str

    def __str__(self) -> str:
        """Format the line as in an export."""
        level = "" if self.level == "info" else f"{self.level}: "
        return f"{self.at}  {level}{self.text}"


class Journal:
    """The latest lines of the log, and counts of all.

    Attributes:
        count: number of lines ever written; those before `count - len(journal)` have been dropped.
        errors: number of messages ever written at level error.
    """

    def __init__(self, now: Callable[[], datetime] = datetime.now, most: int = MOST_LINES) -> None:
        self.count = 0
        self.errors = 0
        self._now = now
        self._lines: deque[Line] = deque(maxlen=most)

    def write(self, text: str, level: Level = "info") -> None:
        """Add a message; each of its lines becomes a line of the log."""
        at = f"{self._now():%H:%M:%S}"
        self.errors += level == "error"
        for part in text.splitlines() or [""]:
            self._lines.append(Line(at, level, clean(part)))
            self.count += 1

    def __len__(self) -> int:
        """Number of lines still held."""
        return len(self._lines)

    def since(self, number: int) -> Iterator[Line]:
        """Iterate over the lines from a number on, counted from 0 over all ever written."""
        gone = self.count - len(self._lines)
        return islice(self._lines, max(0, number - gone), None)

    def text(self) -> str:
        """Format all lines still held, as in an export."""
        return "".join(f"{line}\n" for line in self._lines)
