"""The parts of a written report, before it is rendered as HTML or Markdown."""

from collections.abc import Sequence

from msgspec import Struct


class Paragraph(Struct, frozen=True):
    """A text that makes no claim about measurements."""

    text: str


class Claim(Struct, frozen=True):
    """A claim supported by measurements, with its figures."""

    text: str


class MissingData(Struct, frozen=True):
    """A statement that cannot be made for lack of data, and the command that would measure it."""

    text: str
    command: str | None = None


class Table(Struct, frozen=True):
    """Rows of text; the first column names the row, others hold figures unless listed in `words`."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()
    """Headings of the columns that hold words, left-aligned."""

    def is_figures(self, column: int) -> bool:
        """Whether a column holds figures, right-aligned."""
        return column > 0 and self.heads[column] not in self.words


class Chart(Struct, frozen=True):
    """A chart as SVG, with its title."""

    title: str
    svg: str


class Code(Struct, frozen=True):
    """A command or snippet to copy."""

    text: str
    language: str


Block = Paragraph | Claim | MissingData | Table | Chart | Code


class Section(Struct, frozen=True):
    """A heading and its blocks."""

    title: str
    blocks: tuple[Block, ...]


class Document(Struct, frozen=True):
    """The whole report."""

    title: str
    sections: tuple[Section, ...]


def section(title: str, *parts: Block | Sequence[Block]) -> Section:
    """Build a section of single blocks and sequences of blocks, in order."""
    blocks: list[Block] = []
    for part in parts:
        blocks += part if isinstance(part, Sequence) else [part]
    return Section(title, tuple(blocks))


def joined(words: Sequence[str]) -> str:
    """Join words as in a sentence: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def counted(number: int, word: str) -> str:
    """Format a number with its noun: "1 case", "6 cases"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
