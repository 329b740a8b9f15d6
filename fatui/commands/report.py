"""`fatui report`: writes what past runs found, as a page or as Markdown."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attention.errors import UsageError
from fatui import cli

if TYPE_CHECKING:
    from attention.report import Report
    from fatui.commands.delivery import Delivery
    from fatui.history import History

FORMATS: Final = ("html", "markdown")
EXAMPLE: Final = """examples:
  fatui report                              Markdown of all runs on the machine and the versions of the last one
  fatui report --html report.html           the same as a page, with charts
  fatui report 3f9c last run.json           these runs: ids of the history, or files of --json

Each finding carries its figures and appears only if its interval supports it; what is missing comes with the command
that measures it. Charts need matplotlib: pip install 'fatui[report]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="an id of the history, last, or a file of --json")
    group = parser.add_argument_group("where it goes", "FILE is replaced as a whole; '-' is stdout")
    group.add_argument("--html", metavar="FILE", help="write a page, with charts")
    group.add_argument("--markdown", metavar="FILE", help="write Markdown ('-' unless one of the two is given)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the report; returns 1 where a run cannot be read, or nothing was kept yet.

    Raises:
        UsageError: a file is no run, or cannot be written.
    """
    from fatui.commands.delivery import STDOUT, Delivery, wanted
    from fatui.history import History, HistoryError

    deliveries = wanted(arguments, FORMATS) or [Delivery("markdown", STDOUT)]
    history = History()
    try:
        reports = [_read(name, history) for name in arguments.runs] if arguments.runs else _latest(history)
    except HistoryError as error:
        cli.tell(error)
        return cli.FAILED
    finally:
        if history.notice:
            cli.tell(history.notice)
    if not reports:
        cli.tell("report: no run is kept yet; `fatui bench seed-table` makes one")
        return cli.FAILED
    return _write(reports, deliveries)


def _read(name: str, history: "History") -> "Report":
    """A run from a file where there is one of that name, or else from the history."""
    import msgspec

    from attention.report import Report

    path = Path(name)
    if not path.is_file():
        return history.get(name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (msgspec.DecodeError, OSError) as error:
        raise UsageError(f"report: {path} is no run as `fatui bench --json` writes it: {error}") from error


def _latest(history: "History") -> "list[Report]":
    """All runs that were made where the last one was: the same device and the same versions."""
    lines = history.runs()
    if not lines:
        return []
    last = history.get(lines[0].id)
    near = [line.id for line in lines[1:] if (line.device, line.backend) == (lines[0].device, lines[0].backend)]
    found = [history.get(name) for name in near]
    return [last, *(report for report in found if report.environment == last.environment)]


def _write(reports: "list[Report]", deliveries: "list[Delivery]") -> int:
    from fatui.commands.delivery import put
    from fatui.report.compose import compose
    from fatui.report.html import to_html
    from fatui.report.markdown import to_markdown

    document = compose(reports)
    problems = [
        problem
        for item in deliveries
        if (problem := put(item, to_html(document) if item.format == "html" else to_markdown(document)))
    ]
    for problem in problems:
        cli.tell(problem)
    return cli.FAILED if problems else cli.DONE
