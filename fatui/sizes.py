"""Sizes in bytes with units: "8 GiB", "512M", "1000000"."""

import re
from fractions import Fraction
from typing import Final

from attention.errors import UsageError

UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 10**3,
    "m": 2**20,
    "mib": 2**20,
    "mb": 10**6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
LARGEST_BYTES: Final = 2**60
_SIZE: Final = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]*)")


def parse_size(value: object, name: str) -> int:
    """Parse a size, a number or a text such as "8 GiB", into bytes.

    Raises:
        UsageError: naming the option, the value and the accepted format.
    """
    text = str(value) if type(value) in (int, str) else ""
    match = _SIZE.fullmatch(text.strip())
    if match and match[2].lower() in UNITS:
        size = int(Fraction(match[1]) * UNITS[match[2].lower()])
        if 1 <= size <= LARGEST_BYTES:
            return size
    raise UsageError(f"{name}: got {value!r}; it takes a size such as '8 GiB', '512M' or a number of bytes")


def size_text(size: int) -> str:
    """Format a size so that parse_size returns the same number: "8 GiB", or a plain number of bytes."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size % factor == 0:
            return f"{size // factor} {unit}"
    return str(size)
