"""Results of a command: exports, whose targets are checked before a run and written after it, and tables on stdout."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from msgspec import Struct, to_builtins
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from attention.core.errors import UsageError
from attention.core.files import is_replaced, write_whole
from attention.core.results import Report
from fatui.report.export import check_parquet, to_csv, to_json, to_json_lines, to_markdown, to_parquet, to_sql
from fatui.report.study import beside
from fatui.report.table import report_table
from fatui.untrusted_text import MAX_SHOWN, escape_controls

STDOUT: Final = "-"
FORMATS: Final = {
    "json": "write the whole run as JSON",
    "csv": "write the rows as CSV",
    "markdown": "write the rows as Markdown",
    "jsonl": "write each row as a line of JSON as soon as its case is done",
    "sql": "write CREATE TABLE and INSERT statements, for sqlite3",
    "parquet": "write the rows as Parquet; needs pyarrow",
}


BINARY: Final = ("parquet",)
"""Formats that are not written to stdout."""


class Export(Struct, frozen=True):
    """One export: its format, and its target, a file or "-" for stdout."""

    format: str
    target: str


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each format."""
    group = parser.add_argument_group("exports", "FILE is replaced as a whole; '-' is stdout, in place of the table")
    for name, text in FORMATS.items():
        group.add_argument(f"--{name}", metavar="FILE", help=text)


def requested_exports(arguments: argparse.Namespace, formats: Iterable[str] = FORMATS) -> list[Export]:
    """Return the exports requested on the command line; a format is named as its option.

    Raises:
        UsageError: with one problem for each target that is not writable or is used twice.
    """
    exports = [Export(name, getattr(arguments, name)) for name in formats if getattr(arguments, name) is not None]
    problems = [problem for export in exports if (problem := _export_problem(export))]
    targets = [item.target if item.target == STDOUT else os.path.realpath(item.target) for item in exports]
    for number, item in enumerate(exports):
        if targets[number] in targets[:number]:
            first = exports[targets.index(targets[number])].format
            problems.append(f"--{item.format}: '{item.target}' is already the file of --{first}")
    if problems:
        raise UsageError(*problems)
    return exports


def _export_problem(export: Export) -> str | None:
    """Return why an export cannot be made, in one line; None if it can."""
    if export.format == "parquet" and export.target != STDOUT:
        try:
            check_parquet()
        except UsageError as error:
            return str(error)
    return file_problem(f"--{export.format}", export.target, stdout=export.format not in BINARY)


def file_problem(option: str, target: str, *, stdout: bool) -> str | None:
    """Return why the target of an option cannot be written, in one line; None if it can.

    `stdout`: whether the option takes "-" for stdout.
    """
    if target == STDOUT:
        return None if stdout else f"{option}: got '-'; it takes a file"
    try:
        return _path_problem(option, target, "a file, or '-' for stdout" if stdout else "a file")
    except (OSError, ValueError) as error:  # a name that is too long
        return f"{option}: {target[:60]} cannot be written: {getattr(error, 'strerror', None) or error}"


def _path_problem(option: str, target: str, takes: str) -> str | None:
    path = Path(target)
    folder = path.resolve().parent
    if not target or path.is_dir():
        return f"{option}: got '{target}'; it takes {takes}"
    if not folder.is_dir():
        return f"{option}: {path} cannot be written: there is no folder {folder}"
    replaceable = os.access(folder, os.W_OK | os.X_OK) if is_replaced(path) else os.access(path, os.W_OK)
    return None if replaceable else f"{option}: {path} cannot be written: no permission"


def write_files(report: Report, exports: Sequence[Export]) -> list[str]:
    """Write the exports that are files; return the error messages, one line each."""
    problems = (write_text(export, _content(export.format, report)) for export in exports if export.target != STDOUT)
    return [problem for problem in problems if problem]


def print_results(report: Report, exports: Sequence[Export]) -> None:
    """Print the table, or the export to stdout instead of it.

    Raises:
        OSError: stdout could not be written.
    """
    for export in exports:
        if export.target == STDOUT:
            write_text(export, _content(export.format, report))
            return
    if report.all_cases:
        show(report_table(report, beside(report), results_width()))


def write_text(export: Export, text: str | bytes) -> str | None:
    """Write a text, or the bytes of a file, to an export's target; return an error message of one line, or None.

    Raises:
        OSError: stdout could not be written.
    """
    if export.target == STDOUT:
        sys.stdout.write(text if isinstance(text, str) else text.decode())
        return None
    path, content = Path(export.target), text.encode() if isinstance(text, str) else text
    try:
        write_whole(path, content)
    except OSError as error:
        kept = "; the existing file is unchanged" if path.is_file() else ""
        return f"--{export.format}: {path} could not be written: {error.strerror or error}{kept}"
    return None


def _content(name: str, report: Report) -> str | bytes:
    made: dict[str, Callable[[Report], str | bytes]] = {
        "csv": to_csv,
        "markdown": to_markdown,
        "jsonl": to_json_lines,
        "sql": to_sql,
        "parquet": to_parquet,
    }
    if name == "json":
        study = beside(report)
        return to_json(report, to_builtins(study) if study else None)
    return made[name](report)


PIPED_WIDTH: Final = 100
MAX_WIDTH: Final = 140


class PlainConsole(Console):
    """A console without markup, emoji names or escape codes, since table cells hold foreign text."""

    def render_str(self, text: str, **layout: Any) -> Text:
        """Return a string as plain text, with control characters replaced before its width is measured."""
        given = {name: layout[name] for name in ("style", "justify", "overflow") if layout.get(name)}
        return Text(escape_controls(text, MAX_SHOWN), **given)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as Rich does, and replace the control characters that are left in the segments."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n" or segment.text.isprintable():
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)


def console(stream: TextIO) -> PlainConsole:
    """Return a console for a stream; NO_COLOR counts when it is set, even if empty."""
    width = None if stream.isatty() else _columns() or PIPED_WIDTH
    return PlainConsole(file=stream, width=width, no_color="NO_COLOR" in os.environ or None, highlight=False)


def _columns() -> int | None:
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isascii() and text.isdigit() and 20 <= int(text) <= 1000 else None


def results_width() -> int:
    """Columns available to tables on stdout."""
    return min(console(sys.stdout).width, MAX_WIDTH)


def show(*renderables: RenderableType) -> None:
    """Print renderables on stdout without trailing blanks."""
    out = console(sys.stdout)
    with out.capture() as captured:
        for renderable in renderables:
            out.print(renderable, width=min(out.width, MAX_WIDTH))
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().split("\n")))
