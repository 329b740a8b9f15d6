"""MLX does not survive a fork: its threads stay in the parent, and a child that evaluates waits for them for ever."""

import os

from attention.errors import ForkedError

_used = _forked = False


def check() -> None:
    """See to it that attention can be computed in this process; called first by everything that attends.

    Raises:
        ForkedError: attention was computed in the process that this one was forked from.
    """
    global _used  # noqa: PLW0603  about the process
    if _forked:
        raise ForkedError(
            "attention was computed before this process was forked, and MLX would hang here: its threads are not "
            "in a forked process; start it with multiprocessing's 'spawn' or 'forkserver', or fork before the first use"
        )
    _used = True


def _after_fork() -> None:
    global _forked  # noqa: PLW0603  about the process
    _forked = _used


os.register_at_fork(after_in_child=_after_fork)
