"""Options shared by the commands that measure, and a collector that reports all usage errors at once."""

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
    """Collector of usage errors, to report them together."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def catch(self, read: Callable[[], T]) -> T | None:
        """Return the result of `read`, or record its usage error and return None."""
        try:
            return read()
        except UsageError as error:
            self._problems.extend(error.problems)
            return None

    def tell(self) -> None:
        """Raise one UsageError with all problems, if there are any."""
        if self._problems:
            raise UsageError(*self._problems)


def add_limit_options(parser: argparse.ArgumentParser, seconds: str) -> None:
    """Add --seconds, --memory-limit and --force.

    Args:
        parser: the parser to extend.
        seconds: help text of --seconds.
    """
    parser.add_argument("--seconds", metavar="S", help=seconds)
    parser.add_argument("--memory-limit", metavar="SIZE", help="refuse cases that need more memory, such as 8GiB")
    parser.add_argument("--force", action="store_true", help="also run cases predicted not to fit in memory")


def seconds_of(text: str | None, otherwise: float) -> float:
    """Parse the value of --seconds.

    Raises:
        UsageError: the text is not a number, or outside the accepted range.
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
    """Parse the options of a command that measures models, and report all mistakes at once.

    Args:
        arguments: the parsed command line.
        read_cases: builds the cases from the command line.
        kind: the type of the plan.
        otherwise_s: seconds per case unless --seconds is given.

    Raises:
        UsageError: with every mistake.
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
    """Parse the value of --memory-limit into bytes.

    Raises:
        UsageError: the text is not a size.
    """
    from fatui.sizes import parse_size

    return otherwise if text is None else parse_size(text, "--memory-limit")


def whole_numbers(text: str, option: str, *, single: bool = False) -> list[int]:
    """Parse the comma-separated whole numbers of an option.

    Args:
        text: the option's value.
        option: the option's name, for the error message.
        single: whether exactly one number is accepted.

    Raises:
        UsageError: a part is not a whole number, or there are several where one is accepted.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and len(part) < 12)]
    if wrong or (single and len(parts) > 1):
        takes = "one whole number" if single else "comma-separated whole numbers"
        raise UsageError(f"{option}: got '{text[:40]}'; it takes {takes}")
    return [int(part) for part in parts]
