"""Formats of keys and values as choices: "16", "8", "4:32", "8+4", "mxfp4", each chosen by arrows or typed."""

from collections.abc import Iterable
from typing import Final

from attention.core.errors import UsageError
from attention.core.kv_format import AFFINE_BITS, AFFINE_GROUPS, DEFAULT_GROUP, DENSE, FIXED, parse_kv_format
from attention.core.workload import ITEM_BYTES, DType

BITS: Final = (8, 6, 4, 3, 2)
PREFIX: Final = "int"
DENSE_TEXTS: Final = ("16", "32")
TEXTS: Final = (*map(str, AFFINE_BITS), *(f"{bits}:{size}" for bits in AFFINE_BITS for size in AFFINE_GROUPS), *FIXED)
"""The texts of all formats of one array."""
STARTS: Final = ("+", ":", *"0123456789")


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
        present: the format chosen before the text.
        text: as `say` returns it: "8", "4:32", "8+4"; or its end, "+mxfp4" or ":32", which continues the present one.
    """
    if text in DENSE_TEXTS:
        return DENSE
    parts = [f"{PREFIX}{part}" if part[:1].isdigit() else part for part in _whole(present, text).split("+")]
    try:
        formats = parse_kv_format("+".join(parts))
    except UsageError:
        return None
    return formats.text if formats else None


def begins(present: str, text: str) -> bool:
    """Return whether a text is the beginning of one that `typed` takes; a letter does so only after a plus."""
    if text[:1] not in STARTS:
        return False
    key, plus, value = _whole(present, text).partition("+")
    known = TEXTS if plus else (*TEXTS, *DENSE_TEXTS)
    return (not plus or key in TEXTS) and any(each.startswith(value if plus else key) for each in known)


def _whole(present: str, text: str) -> str:
    """Return a text with the part of the present format that it continues."""
    key, plus, value = "+".join(part.removeprefix(PREFIX) for part in present.split("+")).partition("+")
    if text.startswith("+"):
        return f"{key}{text}"
    if text.startswith(":"):
        return f"{key}+{value.partition(':')[0]}{text}" if plus else f"{key.partition(':')[0]}{text}"
    return text
