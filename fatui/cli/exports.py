"""Exports of a run: targets are checked before it starts, files are written whole when it has ended."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from attention.core.errors import UsageError
from attention.core.results import Report
from fatui.report.export import to_csv, to_json, to_markdown
from fatui.storage.paths import write_atomically

STDOUT: Final = "-"
FORMATS: Final = ("json", "csv", "markdown")


class Export(Struct, frozen=True):
    """One export: its format, and its target, a file or "-" for stdout."""

    format: str
    target: str


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add --json, --csv and --markdown."""
    group = parser.add_argument_group("exports", "FILE is replaced as a whole; '-' is stdout, in place of the table")
    for name in FORMATS:
        group.add_argument(
            f"--{name}", metavar="FILE", help=f"write the rows as {name.upper() if name != 'markdown' else 'Markdown'}"
        )


def requested_exports(arguments: argparse.Namespace, formats: Sequence[str] = FORMATS) -> list[Export]:
    """Return the exports requested on the command line; a format is named as its option.

    Raises:
        UsageError: with one problem for each target that is not writable or is used twice.
    """
    exports = [Export(name, getattr(arguments, name)) for name in formats if getattr(arguments, name) is not None]
    problems = [problem for delivery in exports if (problem := _problem(delivery))]
    targets = [item.target if item.target == STDOUT else os.path.realpath(item.target) for item in exports]
    for number, item in enumerate(exports):
        if targets[number] in targets[:number]:
            first = exports[targets.index(targets[number])].format
            problems.append(f"--{item.format}: '{item.target}' is already the file of --{first}")
    if problems:
        raise UsageError(*problems)
    return exports


def _problem(delivery: Export) -> str | None:
    option, path = f"--{delivery.format}", Path(delivery.target)
    if delivery.target == STDOUT:
        return None
    folder = path.resolve().parent
    if not delivery.target or path.is_dir():
        return f"{option}: got '{delivery.target}'; it takes a file, or '-' for stdout"
    if not folder.is_dir():
        return f"{option}: {path} cannot be written: there is no folder {folder}"
    replaceable = os.access(folder, os.W_OK | os.X_OK) if _is_replaced(path) else os.access(path, os.W_OK)
    return None if replaceable else f"{option}: {path} cannot be written: no permission"


def _is_replaced(path: Path) -> bool:
    """Whether a path is written by replacing its file; devices and pipes are written to in place."""
    return path.is_file() or not path.exists()


def write_export(delivery: Export, report: Report, study: Mapping[str, Any] | None = None) -> str | None:
    """Write one export of a run; return an error message of one line, or None.

    Raises:
        OSError: stdout could not be written.
    """
    return write_text(delivery, _text(delivery.format, report, study))


def write_text(delivery: Export, text: str) -> str | None:
    """Write a text to an export's target; return an error message of one line, or None.

    Raises:
        OSError: stdout could not be written.
    """
    if delivery.target == STDOUT:
        sys.stdout.write(text)
        return None
    path = Path(delivery.target)
    try:
        if _is_replaced(path):
            write_atomically(path, text)
        else:
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        kept = "; the existing file is unchanged" if path.is_file() else ""
        return f"--{delivery.format}: {path} could not be written: {error.strerror or error}{kept}"
    return None


def _text(name: str, report: Report, study: Mapping[str, Any] | None) -> str:
    if name == "json":
        return to_json(report, study)
    return to_csv(report) if name == "csv" else to_markdown(report)
