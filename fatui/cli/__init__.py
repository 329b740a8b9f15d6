"""The command line: one command a file, with `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`.

Here are the exit codes, and messages on stderr.
"""

import contextlib
import sys
from typing import Final

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
NO_BACKEND: Final = 3
GATE_FAILED: Final = 4
INTERRUPTED: Final = 130


def print_line(problem: object) -> None:
    """Print one line on stderr, with control characters replaced."""
    if sys.stderr is None:
        return
    from fatui.untrusted_text import MAX_SHOWN, one_line

    with contextlib.suppress(OSError):
        print(f"fatui: {one_line(str(problem), MAX_SHOWN)}", file=sys.stderr, flush=True)
