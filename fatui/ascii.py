"""Filters of terminal output: one removes control characters, one reduces the output to ASCII."""

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
    """Return the text with each non-ASCII character replaced by an ASCII one of the same width."""
    return text if text.isascii() else "".join(_letter(each) for each in text)


def _letter(glyph: str) -> str:
    if glyph.isascii():
        return glyph
    return TABLE.get(ord(glyph), "?")


def literal(text: str) -> Content:
    """Return a title as one line without markup."""
    return Content(one_line(text))


class ControlFilter(LineFilter):
    """Filter that removes control characters, so that no escape code in foreign text reaches the terminal.

    Only characters without width are left here: others are made visible before lines are laid out.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Filter one line."""
        if all(control or text.isprintable() for text, _, control in segments):
            return segments
        return [
            Segment(text if control else "".join(filter(is_safe, text)), style, control)
            for text, style, control in segments
        ]


class AsciiFilter(LineFilter):
    """Filter that replaces every character that is not ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Filter one line."""
        return [Segment(plain(text), style, control) for text, style, control in segments]
