"""The values that a slider stops at, and how numbers are shown and typed."""

from typing import Final

from attention.workload import LARGEST

STOPS: Final[dict[str, tuple[int, ...]]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "seq": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
    "head_dim": (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512),
    "heads": (1, 2, 4, 6, 8, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128),
}
MOST_VALUES: Final = 32
"""Maximum number of values of one axis in a sweep."""


def divisors(number: int) -> tuple[int, ...]:
    """Return the possible numbers of K/V heads for a number of heads."""
    return tuple(each for each in range(1, number + 1) if number % each == 0)


def say(number: int) -> str:
    """Format a number: 512, 8 K, 1 M; in powers of 1024 if exact, else with commas."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if number >= size and number % size == 0:
            return f"{number // size} {letter}"
    return f"{number:,}"


def parse(text: str, name: str) -> int:
    """Parse "512", "8k" or "1 M".

    Raises:
        ValueError: saying what the axis accepts.
    """
    word = text.strip().lower().replace(" ", "").replace("_", "")
    factor = {"k": 2**10, "m": 2**20}.get(word[-1:], 1)
    digits = word[:-1] if factor > 1 else word
    largest = LARGEST[name]
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12 and 1 <= int(digits) * factor <= largest):
        raise ValueError(f"takes a whole number from 1 to {largest:,}, not '{text.strip()}'")
    return int(digits) * factor


def parse_values(text: str, name: str) -> tuple[int, ...]:
    """Parse "128, 256" and "128..2k", which doubles from the first to the last; sorted, without duplicates.

    Raises:
        ValueError: saying what is wrong.
    """
    values: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not dots:
            values.add(parse(part, name))
            continue
        value, end = parse(first, name), parse(last, name)
        if value > end:
            raise ValueError(f"'{part.strip()}' runs downwards")
        while value <= end:
            values.add(value)
            value *= 2
    if len(values) > MOST_VALUES:
        raise ValueError(f"{len(values)} values; {MOST_VALUES} at most")
    return tuple(sorted(values))


def say_values(values: tuple[int, ...]) -> str:
    """Format several values: "128, 256, 512"."""
    return ", ".join(say(value) for value in values)
