"""`fatui report`: write the findings of past runs as an HTML page or as Markdown."""

import argparse
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from attention.core.results import Report
    from fatui.cli.output import Export
    from fatui.storage.history import RunHistory

FORMATS: Final = ("html", "markdown")
EXAMPLE: Final = """examples:
  fatui report                              Markdown of all runs on the machine and the versions of the last one
  fatui report --html report.html           the same as a page, with charts
  fatui report 3f9c last run.json           these runs: ids of the history, or files of --json

Each finding carries its figures and appears only if its interval supports it; what is missing comes with the command
that measures it. Charts need matplotlib: pip install 'fatui[report]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="an id of the history, last, or a file of --json")
    group = parser.add_argument_group("where it goes", "FILE is replaced as a whole; '-' is stdout")
    group.add_argument("--html", metavar="FILE", help="write a page, with charts")
    group.add_argument("--markdown", metavar="FILE", help="write Markdown ('-' unless one of the two is given)")


def run(arguments: argparse.Namespace) -> int:
    """Write the report; return 1 if it cannot be written or the history is empty.

    Raises:
        UsageError: a file is not a run, or the target is not writable.
        HistoryError: the history is unusable, or has no such run.
    """
    from fatui.cli.output import STDOUT, Export, requested_exports
    from fatui.storage.history import read_run

    exports = requested_exports(arguments, FORMATS) or [Export("markdown", STDOUT)]
    with cli.opened_history() as history:
        reports = [read_run(name, history) for name in arguments.runs] if arguments.runs else _latest(history)
    if not reports:
        cli.print_line("report: no run is kept yet; `fatui bench seed-table` makes one")
        return cli.FAILED
    return _write(reports, exports)


def _latest(history: "RunHistory") -> "list[Report]":
    """Return the last run, and all others with its device and versions."""
    lines = history.runs()
    if not lines:
        return []
    last = history.get(lines[0].id)
    near = [line.id for line in lines[1:] if (line.device, line.backend) == (lines[0].device, lines[0].backend)]
    found = [report for name in near if (report := _readable(name, history))]
    return [last, *(report for report in found if report.environment == last.environment)]


def _readable(name: str, history: "RunHistory") -> "Report | None":
    """Return a run of the history, or None, with a warning, if it cannot be read."""
    from fatui.storage.history import HistoryError

    try:
        return history.get(name)
    except HistoryError as error:
        cli.print_line(f"{error}; it is left out")
        return None


def _write(reports: "list[Report]", exports: "list[Export]") -> int:
    from fatui.cli.output import write_text
    from fatui.report.compose import compose
    from fatui.report.document import to_html, to_markdown

    document = compose(reports)
    problems = [
        problem
        for item in exports
        if (problem := write_text(item, to_html(document) if item.format == "html" else to_markdown(document)))
    ]
    for problem in problems:
        cli.print_line(problem)
    return cli.FAILED if problems else cli.DONE
