"""What a request may get wrong, collected, and the limits that all commands which measure take."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from attention.errors import UsageError

if TYPE_CHECKING:
    from attention.plan import FineTuningPlan, GenerationPlan
    from fatui.commands.delivery import Delivery

T = TypeVar("T")
M = TypeVar("M", "GenerationPlan", "FineTuningPlan")


class Mistakes:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def catch(self, read: Callable[[], T]) -> T | None:
        """Return what is read, or None where that is a mistake."""
        try:
            return read()
        except UsageError as error:
            self._problems.extend(error.problems)
            return None

    def tell(self) -> None:
        """Raise all of them, if there are any."""
        if self._problems:
            raise UsageError(*self._problems)


def add_limit_options(parser: argparse.ArgumentParser, seconds: str) -> None:
    """Add --seconds, --memory-limit and --force.

    Args:
        parser: gets them.
        seconds: what the seconds are for.
    """
    parser.add_argument("--seconds", metavar="S", help=seconds)
    parser.add_argument("--memory-limit", metavar="SIZE", help="refuse what needs more than this, such as 8GiB")
    parser.add_argument("--force", action="store_true", help="run also what is predicted not to fit")


def seconds_of(text: str | None, otherwise: float) -> float:
    """The seconds that an option gives.

    Raises:
        UsageError: it is no number, or none that makes sense.
    """
    from fatui.preset_format import LONGEST_S, SHORTEST_S, number_between

    if text is None:
        return otherwise
    try:
        value: object = float(text)
    except ValueError:
        value = text
    return number_between(value, "--seconds", SHORTEST_S, LONGEST_S)


def model_plan(
    arguments: argparse.Namespace, read_cases: Callable[[], Sequence[Any]], kind: type[M], otherwise_s: float
) -> "tuple[M, list[Delivery]]":
    """Read the whole request of a command that measures models, and tell all its mistakes at once.

    Args:
        arguments: what was given.
        read_cases: reads the cases.
        kind: the plan's.
        otherwise_s: the seconds unless they are given.

    Raises:
        UsageError: with all mistakes.
    """
    from attention.models.workloads import COMPARED
    from fatui.commands.delivery import wanted
    from fatui.preset_format import checked_names

    mistakes = Mistakes()
    cases = mistakes.catch(read_cases)
    names = mistakes.catch(lambda: checked_names(arguments.impl.split(",") if arguments.impl else list(COMPARED)))
    seconds = mistakes.catch(lambda: seconds_of(arguments.seconds, otherwise_s))
    limit = mistakes.catch(lambda: limit_of(arguments.memory_limit))
    deliveries = mistakes.catch(lambda: wanted(arguments))
    mistakes.tell()
    plan = kind(
        cases=tuple(cases or ()),
        implementations=names or (),
        seconds=seconds or otherwise_s,
        memory_limit_bytes=limit,
        force=arguments.force,
    )
    return plan, deliveries or []


def limit_of(text: str | None, otherwise: int | None = None) -> int | None:
    """The bytes that an option gives.

    Raises:
        UsageError: it is no size.
    """
    from fatui.sizes import parse_size

    return otherwise if text is None else parse_size(text, "--memory-limit")


def whole_numbers(text: str, option: str, *, single: bool = False) -> list[int]:
    """The whole numbers that an option gives, with commas between.

    Args:
        text: as it was given.
        option: its name, for what is told.
        single: whether it takes one number only.

    Raises:
        UsageError: a part is no whole number, or there are several where one is taken.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and len(part) < 12)]
    if wrong or (single and len(parts) > 1):
        takes = "one whole number" if single else "whole numbers with commas between"
        raise UsageError(f"{option}: got '{text[:40]}'; it takes {takes}")
    return [int(part) for part in parts]
