"""Results on stdout, as wide as the terminal, or 100 columns if stdout is not one."""

import os
import sys
from collections.abc import Iterable
from typing import Any, Final, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fatui.untrusted_text import MAX_SHOWN, escape_controls

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
