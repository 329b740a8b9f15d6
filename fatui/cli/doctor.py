"""`fatui doctor`: what this machine has, what is missing, and how to fix it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

TOPIC_WIDTH: Final = 10
EXAMPLE: Final = """examples:
  fatui doctor
  fatui doctor --no-measure     without the second that measuring takes
  fatui doctor --report         write a file about this machine, to attach to a bug report

Exit codes: 0 done, 3 no usable backend."""
REPORT: Final = "fatui-report.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--no-measure", action="store_true", help="skip what has to be measured")
    parser.add_argument(
        "--report",
        nargs="?",
        const=REPORT,
        metavar="FILE",
        help=f"write what is found, and every check of a kernel with its error, to FILE ({REPORT}); "
        "on a Mac this compiles and checks the Metal kernels first, unless --no-measure is given",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the findings as they come; return 3 if there is no usable backend."""
    from rich.padding import Padding
    from rich.text import Text

    from fatui.cli.output import show
    from fatui.diagnosis import diagnose

    if arguments.report is not None:
        return _write_report(arguments.report, measure=not arguments.no_measure)
    usable = True
    for finding in diagnose(measure=not arguments.no_measure):
        show(_hanging(finding.topic, Text(finding.text)))
        if finding.advice:
            show(Padding(Text(f"→ {finding.advice}", style="yellow"), (0, 0, 0, TOPIC_WIDTH + 2)))
        if finding.topic == "backend" and finding.text == "none":
            usable = False
    return cli.DONE if usable else cli.NO_BACKEND


def _write_report(target: str, measure: bool) -> int:
    from attention.core.errors import UsageError
    from fatui.cli.output import file_problem
    from fatui.diagnosis import make
    from fatui.storage import write_atomically

    if problem := file_problem("--report", target, stdout=False):
        raise UsageError(problem)
    path = Path(target)
    write_atomically(path, make(cli.print_line, measure))
    cli.print_line(f"wrote {path}; read it through before you send it")
    return cli.DONE


def _hanging(topic: str, text: "Text") -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=TOPIC_WIDTH, no_wrap=True)
    grid.add_column()
    grid.add_row(Text(topic, style="bold"), text)
    return grid
