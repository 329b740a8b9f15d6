"""Text from outside (result files, presets, plugins, the system) made harmless for a terminal, a page, a spreadsheet.

A terminal obeys escape codes, Rich and Textual read "[...]" as markup, Markdown has its own signs, and a spreadsheet
runs a cell that begins with "=". Everything that fatui shows and did not write itself goes through here.
"""

import re
import unicodedata
from html import escape
from typing import Any, Final, TypeVar, cast

from msgspec import Struct, structs

T = TypeVar("T")
MAX_SHOWN: Final = 4_000
"""Characters of one text that a message or a cell of a table has room for."""
UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, of those that hide, reorder or join others, and of lone surrogates."""
FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
MARKDOWN_SIGNS: Final = re.compile(r"([\\`*_<>\[\]#|~&])")


def clean(text: str, limit: int | None = None) -> str:
    r"""Replace what a terminal would obey by its escape, such as "\x1b" or "\u202e", and cut a text to `limit`.

    Line feeds stay, a tab becomes a blank. The result holds no control character but line feeds, no bidi control and
    no lone surrogate, and can be encoded as UTF-8.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(_visible(each) for each in text)


def one_line(text: str, limit: int | None = None) -> str:
    """Clean a text as clean() does, and join its lines with blanks."""
    made = clean(text, limit)
    return " ".join(made.split("\n")) if "\n" in made else made


def is_safe(character: str) -> bool:
    """Whether a character is no control character, and neither hides nor reorders others."""
    return unicodedata.category(character) not in UNSAFE


def _visible(character: str) -> str:
    if character == "\n" or is_safe(character):
        return character
    return " " if character == "\t" else character.encode("unicode_escape").decode("ascii")


def cleaned(value: T, limit: int | None = None) -> T:
    """Clean every text inside structs, tuples, lists and dicts; what holds none comes back as it is."""
    made: Any = value
    if isinstance(value, str):
        made = clean(value, limit)
    elif isinstance(value, Struct):
        changed = {
            name: new
            for name in value.__struct_fields__
            if (new := cleaned(old := getattr(value, name), limit)) is not old
        }
        made = structs.replace(value, **changed) if changed else value
    elif isinstance(value, tuple | list) and not (value and isinstance(value[0], float)):
        parts = [cleaned(part, limit) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            made = type(value)(parts)
    elif isinstance(value, dict):
        made = {cleaned(key, limit): cleaned(part, limit) for key, part in value.items()}
    return cast("T", made)


def html(text: str) -> str:
    """Escape a text for an HTML page, in elements and in attributes."""
    return escape(clean(text))


def markdown(text: str) -> str:
    """Escape a text for a line of Markdown, so that its characters mean themselves."""
    return MARKDOWN_SIGNS.sub(r"\\\1", one_line(text))


def markdown_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return " ".join(markdown(text).split())


def markdown_code(text: str) -> str:
    """Put a text into an inline code span, whatever backticks it holds."""
    shown = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    blank = " " if "`" in shown else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """Put lines into a fenced code block, whatever backticks they hold."""
    shown = clean(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"


def spreadsheet(text: str) -> str:
    """Clean a text for a cell of a CSV file; an apostrophe goes before one that a spreadsheet would run."""
    return f"'{clean(text)}" if text.startswith(FORMULA_STARTS) else clean(text)
