"""`fatui schema`: the JSON Schema of result files."""

import argparse
import sys
from typing import Final

from fatui import cli

EXAMPLE: Final = """examples:
  fatui schema                              of the files of --json
  fatui schema --file result.schema.json

JSON Schema, draft 2020-12, generated from the types that fatui reads and writes. It describes the structure of a file;
limits of numbers, names and sizes are checked in addition when a file is read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--file", metavar="FILE", help="write it to a file")


def run(arguments: argparse.Namespace) -> int:
    """Print the schema.

    Raises:
        UsageError: the target is not writable.
    """
    from fatui.cli.output import requested_exports, write_text
    from fatui.storage.result_files import schema_text

    exports = requested_exports(arguments, ("file",))
    if not exports:
        sys.stdout.write(schema_text())
        return cli.DONE
    problem = write_text(exports[0], schema_text())
    if problem:
        cli.print_line(problem)
    return cli.FAILED if problem else cli.DONE
