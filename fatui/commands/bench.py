"""`fatui bench`: measures, and prints the table."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attention.errors import UsageError
from fatui import cli

if TYPE_CHECKING:
    from attention.events import RunRefused
    from attention.plan import Plan
    from attention.record import Record
    from attention.report import Report
    from fatui.commands.delivery import Delivery
    from fatui.preset_format import Preset

T = TypeVar("T")
DEFAULT_PRESET: Final = "quick"
"""How the engine's refusal begins when its process ended twice without a word."""
EXAMPLE: Final = """examples:
  fatui bench quick
  fatui bench llama-7b --impl baseline,mlx --json llama.json
  fatui bench --batch 1,2 --seq 512,2048 --head-dim 128 --mask causal

Options override the preset's; without a preset they change the one case of `quick`.
Exit codes: 0 done, 1 a case failed or is inaccurate, 2 wrong usage or preset, 3 no backend, 130 interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    from fatui.commands.delivery import add_export_options
    from fatui.commands.options import add_workload_options

    parser.add_argument("preset", nargs="?", metavar="PRESET", help=f"a preset's name or file ({DEFAULT_PRESET})")
    add_workload_options(parser)
    parser.add_argument("--seconds", metavar="S", help="time for the rounds of one case")
    parser.add_argument("--memory-limit", metavar="SIZE", help="refuse what needs more than this, such as 8GiB")
    parser.add_argument("--force", action="store_true", help="run also what is predicted not to fit")
    add_export_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code.

    Raises:
        UsageError: with everything that is wrong with the request; nothing has run then.
    """
    plan, preset, deliveries = request(arguments)
    from fatui.commands.running import execute, undisturbed
    from fatui.reproduce import Started

    started = Started(_command(arguments, preset), preset.name)
    record, interrupted = execute(plan)
    report = record.report(started.run(interrupted))
    with undisturbed():  # a second Ctrl+C must not cost what the first one kept
        failures = deliver_files(report, deliveries)
        _keep(report)
    print_results(report, deliveries)
    for failure in failures:
        cli.tell(failure)
    return _exit_code(record, report, interrupted, failed=bool(failures))


def request(arguments: argparse.Namespace) -> "tuple[Plan, Preset, list[Delivery]]":
    """Reads the whole request, and tells all its mistakes at once."""
    from msgspec import structs

    from fatui.commands import delivery, options
    from fatui.presets import load

    mistakes = _Mistakes()
    preset = mistakes.catch(lambda: load(arguments.preset or DEFAULT_PRESET)) or load(DEFAULT_PRESET)
    cases = mistakes.catch(lambda: options.overridden(preset.cases, options.given_values(arguments)))
    names = mistakes.catch(lambda: options.implementations(arguments.impl, preset))
    seconds = mistakes.catch(lambda: _seconds(arguments.seconds, preset))
    limit = mistakes.catch(lambda: _limit(arguments.memory_limit, preset))
    deliveries = mistakes.catch(lambda: delivery.wanted(arguments))
    mistakes.tell()
    plan = structs.replace(
        preset.plan(),
        cases=cases,
        implementations=names,
        seconds=seconds,
        memory_limit_bytes=limit,
        force=arguments.force,
    )
    return plan, preset, deliveries or []


class _Mistakes:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def catch(self, read: Callable[[], T]) -> T | None:
        """Returns what is read, or None where that is a mistake."""
        try:
            return read()
        except UsageError as error:
            self._problems.extend(error.problems)
            return None

    def tell(self) -> None:
        """Raises all of them, if there are any."""
        if self._problems:
            raise UsageError(*self._problems)


def _seconds(text: str | None, preset: "Preset") -> float:
    from fatui.preset_format import LONGEST_S, SHORTEST_S, number_between

    if text is None:
        return preset.seconds
    try:
        value: object = float(text)
    except ValueError:
        value = text
    return number_between(value, "--seconds", SHORTEST_S, LONGEST_S)


def _limit(text: str | None, preset: "Preset") -> int | None:
    from fatui.sizes import parse_size

    return preset.memory_limit_bytes if text is None else parse_size(text, "--memory-limit")


def _command(arguments: argparse.Namespace, preset: "Preset") -> str:
    from fatui.commands.options import given_values
    from fatui.reproduce import bench_command

    further = {
        "impl": arguments.impl,
        "seconds": arguments.seconds,
        "memory-limit": arguments.memory_limit,
        "force": arguments.force,
    }
    return bench_command(arguments.preset or preset.name, given_values(arguments), further)


def deliver_files(report: "Report", deliveries: "list[Delivery]") -> list[str]:
    """Writes the exports that go to files; returns what went wrong, in a line each."""
    from fatui.commands.delivery import STDOUT, deliver

    study = _study_as_data(report)
    return [problem for item in deliveries if item.target != STDOUT and (problem := deliver(item, report, study))]


def print_results(report: "Report", deliveries: "list[Delivery]") -> None:
    """Prints the table, or the export that goes to stdout in its place."""
    from fatui.commands.delivery import STDOUT, deliver

    for item in deliveries:
        if item.target == STDOUT:
            deliver(item, report, _study_as_data(report))
            return
    if report.cases:
        from fatui.commands.printing import results_width, show
        from fatui.study import beside
        from fatui.table import report_table

        show(report_table(report, beside(report), results_width()))


def _study_as_data(report: "Report") -> "dict[str, Any] | None":
    from msgspec import to_builtins

    from fatui.study import beside

    study = beside(report)
    return to_builtins(study) if study else None


def _keep(report: "Report") -> None:
    from fatui.history import History, HistoryError

    history = History()
    try:
        if report.cases:
            history.add(report)
    except HistoryError as error:
        cli.tell(f"{error}; this run is not kept in the history")
    if history.notice:
        cli.tell(history.notice)


def _exit_code(record: "Record", report: "Report", interrupted: bool, failed: bool) -> int:
    if record.refused and not interrupted:
        return _refused(record.refused)
    if interrupted:
        cli.tell("interrupted" + ("" if report.cases else "; nothing was measured"))
        return cli.INTERRUPTED
    broken = any(row.status in ("failed", "inaccurate") for case in report.cases for row in case.rows)
    return cli.FAILED if broken or failed else cli.DONE


def _refused(refusal: "RunRefused") -> int:
    for line in refusal.reason.splitlines():
        cli.tell(line)
    return {"no backend": cli.NO_BACKEND, "cannot start": cli.FAILED}.get(refusal.kind, cli.WRONG_USAGE)
