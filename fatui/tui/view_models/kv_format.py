"""Formats of keys and values as choices: "16", "8", "4:32", "8+4", "mxfp4", each chosen by arrows or typed."""

from collections.abc import Iterable
from typing import Final

from attention.core.errors import UsageError
from attention.core.kv_format import AFFINE_GROUPS, DEFAULT_GROUP, DENSE, FIXED, parse_kv_format
from attention.core.workload import ITEM_BYTES, DType

BITS: Final = (8, 6, 4, 3, 2)
PREFIX: Final = "int"
LETTERS: Final = "mxfpnv"
"""The letters of the names that can follow a plus."""


def options(widths: Iterable[int]) -> tuple[str, ...]:
    """Return the formats to choose from, in groups that divide the widths of keys and values if one does."""
    widths = [*widths]
    fitting = [size for size in (DEFAULT_GROUP, *AFFINE_GROUPS) if all(width % size == 0 for width in widths)]
    group = "" if DEFAULT_GROUP in fitting or not fitting else f":{fitting[0]}"
    return (DENSE, *(f"{PREFIX}{bits}{group}" for bits in BITS), *FIXED)


def say(kv_format: str, dtype: DType) -> str:
    """Return a format in few letters: "4:32" for int4:32, "8+4" for int8+int4, and for none the bits of the dtype."""
    if kv_format == DENSE:
        return str(8 * ITEM_BYTES[dtype])
    return "+".join(part.removeprefix(PREFIX) for part in kv_format.split("+"))


def typed(present: str, text: str) -> str | None:
    """Return the format that a typed text stands for, or None while it is incomplete.

    Args:
        present: the format chosen before; a text that starts with a plus or a colon continues it.
        text: as `say` returns it: "8", "4:32", "8+4", "+mxfp4".
    """
    if text in ("16", "32"):
        return DENSE
    whole = f"{present.partition('+')[0]}{text}" if text[:1] in ("+", ":") else text
    parts = [PREFIX + part if part[:1].isdigit() else part for part in whole.split("+")]
    try:
        formats = parse_kv_format("+".join(parts))
    except UsageError:
        return None
    return formats.text if formats else None


def continues(text: str, character: str) -> bool:
    """Return whether a character can follow a typed text, or begin one if that is empty."""
    if character in "+:0123456789":
        return True
    return bool(text) and character in LETTERS and text[-1] in f"+{LETTERS}"
