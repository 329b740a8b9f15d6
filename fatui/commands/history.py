"""`fatui history`: lists past runs, shows one, removes one."""

import argparse
from typing import TYPE_CHECKING, Final

from attention.errors import UsageError
from fatui import cli

if TYPE_CHECKING:
    from fatui.history import History

ACTIONS: Final = ("list", "show", "rm")
EXAMPLE: Final = """examples:
  fatui history
  fatui history show last
  fatui history show 3f9c --csv run.csv     the id, or as much of it as tells it from others
  fatui history rm 3f9c"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from fatui.commands.delivery import add_export_options

    parser.add_argument("action", nargs="?", default="list", metavar="list|show ID|rm ID", help="what to do (list)")
    parser.add_argument("id", nargs="?", metavar="ID", help=argparse.SUPPRESS)
    add_export_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Does one of them; returns 1 where the history cannot be used or has no such run.

    Raises:
        UsageError: the request is wrong.
    """
    from attention.errors import suggestion
    from fatui.history import History, HistoryError

    if arguments.action not in ACTIONS:
        hint = suggestion(arguments.action, ACTIONS)
        raise UsageError(f"history: got '{arguments.action}'; it takes list, show ID or rm ID{hint}")
    if arguments.action != "list" and arguments.id is None:
        raise UsageError(f"history {arguments.action}: it takes a run's id, or 'last'")
    history = History()
    try:
        return _do(arguments, history)
    except HistoryError as error:
        cli.tell(error)
        return cli.FAILED
    finally:
        if history.notice:
            cli.tell(history.notice)


def _do(arguments: argparse.Namespace, history: "History") -> int:
    if arguments.action == "list":
        return _list(history)
    if arguments.action == "show":
        return _show(arguments, history)
    cli.tell(f"removed run {history.remove(arguments.id).run.id}")
    return cli.DONE


def _list(history: "History") -> int:
    from rich.table import Table

    from fatui.commands.printing import show

    runs = history.runs()
    if not runs:
        cli.tell("no runs yet; `fatui bench quick` makes one")
        return cli.DONE
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    for head in ("id", "started", "preset", "cases", "finding"):
        table.add_column(head, no_wrap=head != "finding", justify="right" if head == "cases" else "left")
    for line in runs:
        state = "interrupted; " if line.interrupted else ""
        started = line.started[:16].replace("T", " ")
        table.add_row(line.id, started, line.preset or "-", str(line.cases), state + line.finding)
    show(table)
    return cli.DONE


def _show(arguments: argparse.Namespace, history: "History") -> int:
    from fatui.commands.delivery import wanted
    from fatui.commands.outcome import deliver_files, print_results

    deliveries = wanted(arguments)
    report = history.get(arguments.id)
    failures = deliver_files(report, deliveries)
    print_results(report, deliveries)
    for failure in failures:
        cli.tell(failure)
    return cli.FAILED if failures else cli.DONE
