"""Draws with ASCII characters only, each in place of one that looks or means alike."""

from typing import Final

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

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


class AsciiFilter(LineFilter):
    """Replaces every character that is not ASCII as a line goes to the terminal."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Transforms one line."""
        return [Segment(plain(text), style, control) for text, style, control in segments]
