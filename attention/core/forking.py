"""Whether MLX can be used in this process: its threads stay in the parent of a forked process."""

import os

from attention.core.errors import ForkedError

_used = _forked = False
"""Whether attention was computed in this process, and whether it was before the fork that made this process."""


def check_not_forked() -> None:
    """Check that MLX can be used in this process; called first by every entry point that makes or takes arrays.

    An evaluation in a forked child would hang.

    Raises:
        ForkedError: attention was computed in the parent process before the fork.
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
