"""`fatui presets`: list presets, show one, or check one."""

import argparse
from typing import Final

from attention.core.errors import UsageError
from fatui import cli

ACTIONS: Final = ("list", "show", "check")
EXAMPLE: Final = """examples:
  fatui presets
  fatui presets show quick > mine.toml
  fatui presets check mine.toml
  fatui bench ./mine.toml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "action", nargs="?", default="list", metavar="list|show NAME|check NAME|FILE", help="what to do (list)"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; return the exit code.

    Raises:
        UsageError: the preset does not exist, or has mistakes.
    """
    from attention.core.errors import suggestion

    if arguments.action not in ACTIONS:
        hint = suggestion(arguments.action, ACTIONS)
        raise UsageError(f"presets: got '{arguments.action}'; it takes list, show NAME or check NAME|FILE{hint}")
    if arguments.action == "list":
        if arguments.name is not None:
            raise UsageError(f"presets list: got '{arguments.name}'; it takes nothing more")
        return _list()
    if arguments.name is None:
        raise UsageError(f"presets {arguments.action}: it takes a preset's name or file")
    return _show(arguments.name) if arguments.action == "show" else _check(arguments.name)


def _list() -> int:
    from fatui.cli.output import show
    from fatui.report.table import FittedTable
    from fatui.storage.presets import list_presets

    table = FittedTable(dropped_first=("from", "cases"))
    for head in ("", "cases", "from", "what it is for"):
        table.add_column(head, no_wrap=head != "what it is for", justify="right" if head == "cases" else "left")
    for listed in list_presets():
        origin = "fatui" if listed.bundled else "you"
        if listed.preset:
            table.add_row(
                listed.name, str(len(listed.preset.cases)), origin, listed.preset.summary or listed.preset.title
            )
        else:
            first = listed.problems[0].removeprefix(f"{listed.source}: ")
            more = f", and {len(listed.problems) - 1} more" if len(listed.problems) > 1 else ""
            told = f"has mistakes: {first}{more}; `fatui presets check {listed.name}` tells all"
            table.add_row(listed.name, "-", origin, told, style="yellow")
    show(table)
    return cli.DONE


def _show(name: str) -> int:
    import sys

    from fatui.storage.presets import load
    from fatui.untrusted_text import escape_controls

    preset = load(name)
    assert preset.source is not None
    text = preset.source.read_text(encoding="utf-8")
    # A file or pipe gets the text unchanged; a terminal would execute escape codes in its comments.
    sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
    return cli.DONE


def _check(name: str) -> int:
    from pathlib import Path

    from fatui.cli.output import show
    from fatui.storage.presets import load

    preset = load(Path(name) if Path(name).is_file() else name)
    count = len(preset.cases)
    show(f"{name}: valid: {count} case{'s' * (count != 1)} with {', '.join(preset.implementations)}")
    return cli.DONE
