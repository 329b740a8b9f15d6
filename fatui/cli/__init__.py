"""The command line: one command a file, with `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`.

Here are the exit codes, messages on stderr, and the history as commands open it.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fatui.storage.history import RunHistory

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
NO_BACKEND: Final = 3
GATE_FAILED: Final = 4
INTERRUPTED: Final = 130
STOPPING: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command with the exit code of an interrupt."""


def print_line(problem: object) -> None:
    """Print one line on stderr, with control characters replaced."""
    if sys.stderr is None:
        return
    from fatui.untrusted_text import MAX_SHOWN, one_line

    with contextlib.suppress(OSError):
        print(f"fatui: {one_line(str(problem), MAX_SHOWN)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def opened_history() -> "Iterator[RunHistory]":
    """Open the history, and at the end print its notice, if it has one."""
    from fatui.storage.history import RunHistory

    history = RunHistory()
    try:
        yield history
    finally:
        if history.notice:
            print_line(history.notice)
