"""Filters of the lines that go to the terminal: without control characters, or with ASCII alone."""

from typing import Final

from rich.segment import Segment
from textual.color import Color
from textual.content import Content
from textual.filter import LineFilter

from fatui.foreign_text import is_safe, one_line

PAIRS: Final = {
    "▁▂▃▄▅▆▇█": "__.-=+*#",
    "░▒▓": ".:%",
    "─━═╌┄▔▀": "-------",
    "│┃║▏▎▍▌▋▊▉▕▐": "||||||||||||",
    "┌┐└┘╭╮╰╯├┤┬┴┼┏┓┗┛╺╸╶╴": "++++++++++++++++++++",
    "●◉○•·": "oO*.-",
    "★✓✗▸‹›→←↑↓▼▲…": "*x!><>><^vv^.",
    "±≈×µ°⏎": "~~xu'<",
    "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏": "|/-\\|/-\\|/",
}


def _table() -> dict[int, str]:
    made: dict[int, str] = {}
    for glyphs, letters in PAIRS.items():
        for index, glyph in enumerate(glyphs):
            made[ord(glyph)] = letters[min(index, len(letters) - 1)]
    return made


TABLE: Final = _table()


def plain(text: str) -> str:
    """The text with each other character replaced by an ASCII one, of the same width."""
    return text if text.isascii() else "".join(_letter(each) for each in text)


def _letter(glyph: str) -> str:
    if glyph.isascii():
        return glyph
    return TABLE.get(ord(glyph), "?")


def literal(text: str) -> Content:
    """A title as one line whose brackets are no markup."""
    return Content(one_line(text))


class ControlFilter(LineFilter):
    """Drops control characters that a text still holds, so that no escape code of foreign text reaches the terminal.

    Those that it may hold have no width; they are made visible where texts come in, before lines are laid out.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Transform one line."""
        if all(control or text.isprintable() for text, _, control in segments):
            return segments
        return [
            Segment(text if control else "".join(filter(is_safe, text)), style, control)
            for text, style, control in segments
        ]


class AsciiFilter(LineFilter):
    """Replaces every character that is not ASCII as a line goes to the terminal."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Transform one line."""
        return [Segment(plain(text), style, control) for text, style, control in segments]
