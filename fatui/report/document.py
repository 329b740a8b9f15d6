"""What a written report is made of, before it is HTML or Markdown."""

from collections.abc import Sequence

from msgspec import Struct


class Paragraph(Struct, frozen=True):
    """Text that holds whatever was measured."""

    text: str


class Finding(Struct, frozen=True):
    """A claim that what was measured supports, with its figures in it."""

    text: str


class Missing(Struct, frozen=True):
    """What cannot be said for want of data, and the command that would measure it."""

    text: str
    command: str | None = None


class Table(Struct, frozen=True):
    """Rows of text; the first column names the row, others are figures unless they are among `words`."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()
    """Heads of the columns that hold words, and stand left."""

    def is_figures(self, column: int) -> bool:
        """Whether a column stands right."""
        return column > 0 and self.heads[column] not in self.words


class Chart(Struct, frozen=True):
    """A picture as SVG, and what it shows in words; the words alone where it could not be drawn."""

    title: str
    svg: str


class Code(Struct, frozen=True):
    """Something to type or to paste."""

    text: str
    language: str


Block = Paragraph | Finding | Missing | Table | Chart | Code


class Section(Struct, frozen=True):
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


class Document(Struct, frozen=True):
    """The whole report."""

    title: str
    sections: tuple[Section, ...]


def section(title: str, *parts: Block | Sequence[Block]) -> Section:
    """A section of single blocks and of runs of them, in order."""
    blocks: list[Block] = []
    for part in parts:
        blocks += part if isinstance(part, Sequence) else [part]
    return Section(title, tuple(blocks))


def joined(words: Sequence[str]) -> str:
    """Words as a sentence lists them: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def counted(number: int, word: str) -> str:
    """A number and its noun: "1 case", "6 cases"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
