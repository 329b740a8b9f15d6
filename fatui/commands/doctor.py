"""`fatui doctor`: what this machine has, what is missing, and what to do."""

import argparse
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

TOPIC_WIDTH: Final = 10
EXAMPLE: Final = """examples:
  fatui doctor
  fatui doctor --no-measure     without the second that measuring takes

Exit codes: 0 done, 3 no usable backend."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--no-measure", action="store_true", help="leave out what has to be measured")


def run(arguments: argparse.Namespace) -> int:
    """Prints one finding after the other; returns 3 where nothing can run."""
    from rich.padding import Padding
    from rich.text import Text

    from fatui.commands.printing import show
    from fatui.diagnosis import diagnose

    usable = True
    for finding in diagnose(measure=not arguments.no_measure):
        show(_hanging(finding.topic, Text(finding.text)))
        if finding.advice:
            show(Padding(Text(f"→ {finding.advice}", style="yellow"), (0, 0, 0, TOPIC_WIDTH + 2)))
        if finding.topic == "backend" and finding.text == "none":
            usable = False
    return cli.DONE if usable else cli.NO_BACKEND


def _hanging(topic: str, text: "Text") -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=TOPIC_WIDTH, no_wrap=True)
    grid.add_column()
    grid.add_row(Text(topic, style="bold"), text)
    return grid
