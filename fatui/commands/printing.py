"""Results on stdout: as wide as the terminal, 100 columns where there is none."""

import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPED_WIDTH: Final = 100
WIDEST: Final = 140


def console(stream: TextIO) -> "Console":
    """A console on a stream; NO_COLOR counts when it is set, even if empty."""
    from rich.console import Console

    width = None if stream.isatty() else _columns() or PIPED_WIDTH
    return Console(file=stream, width=width, no_color="NO_COLOR" in os.environ or None, highlight=False)


def _columns() -> int | None:
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isascii() and text.isdigit() and 20 <= int(text) <= 1000 else None


def results_width() -> int:
    """Columns that tables on stdout may take."""
    return min(console(sys.stdout).width, WIDEST)


def show(*renderables: "RenderableType") -> None:
    """Prints tables and texts on stdout, without blanks at the ends of lines."""
    out = console(sys.stdout)
    with out.capture() as captured:
        for renderable in renderables:
            out.print(renderable, width=min(out.width, WIDEST))
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().split("\n")))
