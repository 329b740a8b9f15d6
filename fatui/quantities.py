"""Sizes in bytes with units: "8 GiB", "512M", "1000000"."""

import re
from fractions import Fraction
from typing import Final

from attention.core.errors import UsageError

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
MAX_BYTES: Final = 2**60
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
        if 1 <= size <= MAX_BYTES:
            return size
    raise UsageError(f"{name}: got {value!r}; it takes a size such as '8 GiB', '512M' or a number of bytes")


_TIME: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ns|us|µs|ms|s)")
_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_seconds(text: str, name: str) -> float:
    """Parse a time with its unit, such as "12us" or "0.5 ms", into seconds.

    Raises:
        UsageError: naming the option, the value and the accepted format.
    """
    match = _TIME.fullmatch(text.strip())
    if match and 0 < (seconds := float(match[1]) * _SECONDS[match[2]]) <= 1:
        return seconds
    raise UsageError(f"{name}: got '{text[:40]}'; it takes a time up to 1 s, such as 12us or 0.5ms")


def size_text(size: int) -> str:
    """Format a size so that parse_size returns the same number: "8 GiB", or a plain number of bytes."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size % factor == 0:
            return f"{size // factor} {unit}"
    return str(size)


STOPS: Final[dict[str, tuple[int, ...]]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "seq": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
    "head_dim": (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512),
    "heads": (1, 2, 4, 6, 8, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128),
    "ranks": (1,),
}
SECONDS: Final = (1, 2, 4, 6, 10, 20, 30, 60, 120, 300)
"""Stops of the time limit of a case's rounds."""
MAX_VALUES: Final = 32
"""Maximum number of values of one axis in a sweep."""


def divisors(number: int) -> tuple[int, ...]:
    """Return the possible numbers of K/V heads for a number of heads."""
    return tuple(each for each in range(1, number + 1) if number % each == 0)


def format_number(number: int) -> str:
    """Format a number: 512, 8 K, 1 M; in powers of 1024 if exact, else with commas."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if number >= size and number % size == 0:
            return f"{number // size} {letter}"
    return f"{number:,}"


def parse_number(text: str, largest: int) -> int:
    """Parse a whole number from 1 to the largest: "512", "8k" or "1 M".

    Raises:
        ValueError: saying what is accepted.
    """
    word = text.strip().lower().replace(" ", "").replace("_", "")
    factor = {"k": 2**10, "m": 2**20}.get(word[-1:], 1)
    digits = word[:-1] if factor > 1 else word
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12 and 1 <= int(digits) * factor <= largest):
        raise ValueError(f"takes a whole number from 1 to {largest:,}, not '{text.strip()}'")
    return int(digits) * factor


def parse_values(text: str, largest: int) -> tuple[int, ...]:
    """Parse "128, 256" and "128..2k", which doubles from the first to the last; sorted, without duplicates.

    Raises:
        ValueError: saying what is wrong.
    """
    values: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not dots:
            values.add(parse_number(part, largest))
            continue
        value, end = parse_number(first, largest), parse_number(last, largest)
        if value > end:
            raise ValueError(f"'{part.strip()}' runs downwards")
        while value <= end:
            values.add(value)
            value *= 2
    if len(values) > MAX_VALUES:
        raise ValueError(f"{len(values)} values; {MAX_VALUES} at most")
    return tuple(sorted(values))


def format_numbers(values: tuple[int, ...]) -> str:
    """Format several values: "128, 256, 512"."""
    return ", ".join(format_number(value) for value in values)
