"""Numbers and flags among the arguments of a call: which are taken, and how others are shown in a message."""

from typing import Final

from attention.core.errors import UsageError

MAX_SCALE: Final = 1e38
MIN_SOFTCAP, MAX_SOFTCAP = 1e-30, 1e30
"""Within these bounds scores and their quotients by a softcap stay in float32's range."""
MAX_SHOWN: Final = 60
"""Maximum number of characters of an invalid value in a message."""


def check_numbers(scale: object, softcap: object, head_dim: int) -> tuple[float, float | None]:
    """Return the scale, 1 / sqrt(head_dim) by default, and the softcap.

    Raises:
        UsageError: the scale or the softcap is not a number or out of float32's useful range.
    """
    problems = []
    if scale is not None and not (is_number(scale) and abs(scale) <= MAX_SCALE):  # type: ignore[arg-type]
        problems.append(
            f"scale: got {shown_value(scale)}; it takes a number from -{MAX_SCALE:g} to {MAX_SCALE:g}, "
            "or None for 1 / sqrt(head_dim)"
        )
    if softcap is not None and not (is_number(softcap) and MIN_SOFTCAP <= softcap <= MAX_SOFTCAP):  # type: ignore[operator]
        problems.append(
            f"softcap: got {shown_value(softcap)}; it takes a number from {MIN_SOFTCAP:g} to {MAX_SOFTCAP:g}, or None"
        )
    if problems:
        raise UsageError(*problems)
    factor = head_dim**-0.5 if scale is None else scale
    return float(factor), None if softcap is None else float(softcap)  # type: ignore[arg-type]


def is_number(value: object) -> bool:
    """Return whether a value is an int or a float, and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check_flag(name: str, value: object) -> None:
    """Raise UsageError unless a value is True or False."""
    problem = flag_problem(name, value)
    if problem:
        raise UsageError(problem)


def flag_problem(name: str, value: object) -> str | None:
    """Return what is wrong unless a value is True or False: the text "no" would be taken as yes."""
    return None if value is True or value is False else f"{name}: got {shown_value(value)}; it takes True or False"


def shown_value(value: object) -> str:
    """Format an invalid value, truncated; Python refuses to print integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
