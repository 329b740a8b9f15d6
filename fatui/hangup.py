"""Detection of a closed terminal, even without a SIGHUP or while the event loop is blocked on output."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

POLL_MS: Final = 500
GRACE_S: Final = 3.0
"""Seconds for an orderly end: the run is stopped and stored, the layout saved."""
HUNG_UP: Final = 128 + signal.SIGHUP
"""The exit code after a hang-up."""


def watch_terminal(hung_up: Callable[[], object], abandon: Callable[[], object]) -> None:
    """Start a thread that ends the process once the terminal on stdin or stderr has hung up.

    Textual's reader spins on a terminal at its end, and its writer dies of the first write that fails, after which
    the event loop may block forever on its output. Neither notifies the app, so a separate thread watches.

    Args:
        hung_up: called from that thread; requests an orderly end from the event loop.
        abandon: called if the process still runs after `GRACE_S`; kills the child processes that must not outlive it.
    """
    files = [stream.fileno() for stream in (sys.__stdin__, sys.__stderr__) if stream is not None and stream.isatty()]
    if not files or not hasattr(select, "poll"):
        return
    poll = select.poll()
    for file in files:
        poll.register(file, 0)  # only POLLHUP and POLLERR, which are always reported

    def watch() -> None:
        while True:
            states = [state for _, state in poll.poll(POLL_MS)]
            if any(state & (select.POLLHUP | select.POLLERR) for state in states):
                break
            if states:  # POLLNVAL: this system cannot poll a terminal, or the file was closed
                return
        hung_up()
        time.sleep(GRACE_S)
        abandon()
        os._exit(HUNG_UP)

    threading.Thread(target=watch, name="terminal-watch", daemon=True).start()
