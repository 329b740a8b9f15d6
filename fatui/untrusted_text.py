"""Escaping of foreign text (result files, presets, plugins, the system) for terminals, web pages and spreadsheets.

Terminals execute escape codes, Rich and Textual read "[...]" as markup, Markdown has its own syntax, and spreadsheets
evaluate cells that begin with "=". All text shown that fatui did not write itself passes through here.
"""

import re
import unicodedata
from html import escape
from typing import Any, Final, TypeVar, cast

from msgspec import Struct, structs

T = TypeVar("T")
MAX_SHOWN: Final = 4_000
"""Maximum characters of one text in a message or a table cell."""
UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, of those that hide, reorder or join others, and of lone surrogates."""
FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
MARKDOWN_SIGNS: Final = re.compile(r"([\\`*_<>\[\]#|~&])")


def escape_controls(text: str, limit: int | None = None) -> str:
    r"""Replace unsafe characters by their escapes, such as "\x1b" or "\u202e", and cut a text to `limit`.

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
    made = escape_controls(text, limit)
    return " ".join(made.split("\n")) if "\n" in made else made


def clip(text: str, width: int) -> str:
    """Return the text as a single line without control characters, cut with an ellipsis if too long."""
    text = one_line(text)
    return text if len(text) <= width else text[: max(0, width - 1)] + "…" if width > 0 else ""


def is_safe(character: str) -> bool:
    """Whether a character is neither a control character nor one that hides or reorders others."""
    return unicodedata.category(character) not in UNSAFE


def _visible(character: str) -> str:
    if character == "\n" or is_safe(character):
        return character
    return " " if character == "\t" else character.encode("unicode_escape").decode("ascii")


def escape_all(value: T, limit: int | None = None) -> T:
    """Clean every text inside structs, tuples, lists and dicts; values without unsafe text are returned as they are."""
    made: Any = value
    if isinstance(value, str):
        made = escape_controls(value, limit)
    elif isinstance(value, Struct):
        changed = {
            name: new
            for name in value.__struct_fields__
            if (new := escape_all(old := getattr(value, name), limit)) is not old
        }
        made = structs.replace(value, **changed) if changed else value
    elif isinstance(value, tuple | list) and not (value and isinstance(value[0], float)):
        parts = [escape_all(part, limit) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            made = type(value)(parts)
    elif isinstance(value, dict):
        made = {escape_all(key, limit): escape_all(part, limit) for key, part in value.items()}
    return cast("T", made)


def html(text: str) -> str:
    """Escape a text for HTML, in elements and attributes."""
    return escape(escape_controls(text))


def markdown(text: str) -> str:
    """Escape a text for a line of Markdown, so that it is shown literally."""
    return MARKDOWN_SIGNS.sub(r"\\\1", one_line(text))


def markdown_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return " ".join(markdown(text).split())


def markdown_code(text: str) -> str:
    """Format a text as an inline code span, even if it contains backticks."""
    shown = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    blank = " " if "`" in shown else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """Format lines as a fenced code block, even if they contain backticks."""
    shown = escape_controls(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"


def spreadsheet(text: str) -> str:
    """Clean a text for a CSV cell; one that a spreadsheet would evaluate is prefixed with an apostrophe."""
    return f"'{escape_controls(text)}" if text.startswith(FORMULA_STARTS) else escape_controls(text)
