"""`fatui history`: list, show and remove past runs, or add one that a program saved."""

import argparse
import sys
from typing import TYPE_CHECKING, Final

from attention.core.errors import UsageError
from attention.core.files import expand_home
from fatui import cli

if TYPE_CHECKING:
    from attention.core.results import Report
    from fatui.storage.history import RunHistory

ACTIONS: Final = ("list", "show", "rm", "add")
PRESET_OR_CASE: Final = "preset or case"
MAX_NAME_WIDTH: Final = 26
"""Columns of what was run in the list, on narrow terminals fewer: a long name hides no id, and findings have room."""
EXAMPLE: Final = """examples:
  fatui history
  fatui history show last
  fatui history show 3f9c --csv run.csv     the id, or a unique start of it
  fatui history rm 3f9c
  fatui history add monitor.json            what attention.monitor().save() wrote
  fatui history add results/                all runs of a folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    from fatui.cli.output import add_export_options

    parser.add_argument(
        "action", nargs="?", default="list", metavar="list|show ID|rm ID|add FILE|FOLDER", help="what to do (list)"
    )
    parser.add_argument("id", nargs="?", metavar="ID", help=argparse.SUPPRESS)
    add_export_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; return the exit code.

    Raises:
        UsageError: the request is wrong.
        HistoryError: the history is unusable, or has no such run.
    """
    from attention.core.errors import suggestion

    if arguments.action not in ACTIONS:
        hint = suggestion(arguments.action, ACTIONS)
        raise UsageError(
            f"history: got '{arguments.action}'; it takes list, show ID, rm ID, or add FILE or FOLDER{hint}"
        )
    if arguments.action != "list" and arguments.id is None:
        wanted = "a file or a folder" if arguments.action == "add" else "a run's id, or 'last'"
        raise UsageError(f"history {arguments.action}: it takes {wanted}")
    if arguments.action == "list" and arguments.id is not None:
        raise UsageError(f"history list: it takes nothing further, got '{arguments.id}'; `show ID` shows a run")
    if arguments.action != "show":
        from fatui.cli.output import FORMATS

        given = [f"--{name}" for name in FORMATS if getattr(arguments, name) is not None]
        if given:
            raise UsageError(
                f"history {arguments.action}: it takes no {given[0]}; `show ID {given[0]} FILE` exports a run"
            )
    with cli.opened_history() as history:
        return _do(arguments, history)


def _do(arguments: argparse.Namespace, history: "RunHistory") -> int:
    if arguments.action == "list":
        return _list(history)
    if arguments.action == "show":
        return _show(arguments, history)
    if arguments.action == "add":
        return _add(arguments.id, history)
    identity = history.find(arguments.id)
    history.remove(identity)
    cli.print_line(f"removed run {identity}")
    return cli.DONE


def _list(history: "RunHistory") -> int:
    from fatui import formatting
    from fatui.cli.output import console, show
    from fatui.report.table import FittedTable
    from fatui.untrusted_text import one_line

    runs = history.runs()
    if not runs:
        cli.print_line("no runs yet; `fatui bench quick` makes one")
        return cli.DONE
    table = FittedTable(dropped_first=("cases", "started", PRESET_OR_CASE))
    for head in ("id", "started", PRESET_OR_CASE, "cases", "finding"):
        widest = min(MAX_NAME_WIDTH, console(sys.stdout).width // 5) if head == PRESET_OR_CASE else None
        table.add_column(
            head, no_wrap=head != "finding", justify="right" if head == "cases" else "left", max_width=widest
        )
    for line in runs:
        state = "interrupted; " if line.interrupted else ""
        started = formatting.started_text(line.started)
        table.add_row(
            line.id, started, one_line(line.preset or line.shape or "-"), str(line.cases), state + line.finding
        )
    show(table)
    return cli.DONE


def _add(name: str, history: "RunHistory") -> int:
    from fatui.storage.history import files_of, is_folder
    from fatui.storage.result_files import read

    path = expand_home(name)
    if not is_folder(path):
        _keep(read(path), history)
        return cli.DONE
    failed = False
    kept = {line.id for line in history.runs()}
    for file in files_of(path):
        try:
            report = read(file)
        except UsageError as error:
            cli.print_line(error)
            failed = True
            continue
        if report.run.id in kept:
            cli.print_line(f"run {report.run.id} is in the history already")
        else:
            _keep(report, history)
            kept.add(report.run.id)
    return cli.FAILED if failed else cli.DONE


def _keep(report: "Report", history: "RunHistory") -> None:
    history.add(report)
    edited = ", which was edited since it was written" if report.edited else ""
    cli.print_line(f"added run {report.run.id}{edited}")


def _show(arguments: argparse.Namespace, history: "RunHistory") -> int:
    from fatui.cli.output import print_results, requested_exports, write_files

    exports = requested_exports(arguments)
    report = history.get(arguments.id)
    failures = write_files(report, exports)
    print_results(report, exports)
    for failure in failures:
        cli.print_line(failure)
    return cli.FAILED if failures else cli.DONE
