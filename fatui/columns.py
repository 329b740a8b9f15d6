"""Columns of a table: their cells as text, and names that fit."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from rich.cells import cell_len

from attention.report import Row
from fatui import figures

LONGEST_NAME: Final = 14
IMPLEMENTATION: Final = ""
"""The head of the first column."""


class Column(Struct):
    """One column with its cells as text."""

    head: str
    cells: list[str]
    width: int = 0
    """Cells that it takes unwrapped, in this case and in those it stands under."""

    def __post_init__(self) -> None:
        """Take the width of the widest text, if none is given."""
        self.width = self.width or max(cell_len(text) for text in (self.head, *self.cells))


def starred(row: Row, best: Sequence[str]) -> str:
    """Tokens/s, with a star where that is the best."""
    mark = f"{figures.STAR} " if row.implementation in best else ""
    return mark + figures.tokens_per_second(row.tokens_per_second)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits its column: of "folder/mine.py:Mine" its end, which tells it from others."""
    short = name.rpartition("/")[2]
    return short if len(short) <= longest else "…" + short[1 - longest :]
