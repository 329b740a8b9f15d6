"""The log of the app: timestamped lines in a bounded buffer, the engine's and the app's own."""

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
        """The line as it is exported."""
        level = "" if self.level == "info" else f"{self.level}: "
        return f"{self.at}  {level}{self.text}"


class Journal:
    """The latest lines, and how many there ever were.

    Attributes:
        count: all lines ever written; those before `count - len(journal)` are gone.
        errors: all lines ever written at level error.
    """

    def __init__(self, now: Callable[[], datetime] = datetime.now, most: int = MOST_LINES) -> None:
        self.count = 0
        self.errors = 0
        self._now = now
        self._lines: deque[Line] = deque(maxlen=most)

    def write(self, text: str, level: Level = "info") -> None:
        """Add a message; each line of it becomes a line of the log."""
        at = f"{self._now():%H:%M:%S}"
        self.errors += level == "error"
        for part in text.splitlines() or [""]:
            self._lines.append(Line(at, level, clean(part)))
            self.count += 1

    def __len__(self) -> int:
        """Lines that are still there."""
        return len(self._lines)

    def since(self, number: int) -> Iterator[Line]:
        """The lines from the one with that number on, counted from 0 over all ever written."""
        gone = self.count - len(self._lines)
        return islice(self._lines, max(0, number - gone), None)

    def text(self) -> str:
        """All lines that are still there, as a file has them."""
        return "".join(f"{line}\n" for line in self._lines)
