"""Table columns: cells as text, and names shortened to fit."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from rich.cells import cell_len

from attention.report import Row
from fatui import figures

LONGEST_NAME: Final = 14
IMPLEMENTATION: Final = ""
"""The heading of the first column."""


class Column(Struct):
    """One column, with its cells as text."""

    head: str
    cells: list[str]
    width: int = 0
    """Width without wrapping, in this case and in those above it in the same table."""

    def __post_init__(self) -> None:
        """Default the width to that of the widest text."""
        self.width = self.width or max(cell_len(text) for text in (self.head, *self.cells))


def starred(row: Row, best: Sequence[str]) -> str:
    """Format tokens/s, with a star if it is the best."""
    mark = f"{figures.STAR} " if row.implementation in best else ""
    return mark + figures.tokens_per_second(row.tokens_per_second)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """Shorten a name to its column; of "folder/mine.py:Mine" keep the end, which identifies it."""
    short = name.rpartition("/")[2]
    return short if len(short) <= longest else "…" + short[1 - longest :]
