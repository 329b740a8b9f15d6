"""Detection of fork: MLX's threads stay in the parent, so an evaluation in the child would hang."""

import os

from attention.core.errors import ForkedError

_used = _forked = False


def check() -> None:
    """Check that attention can be computed in this process; called first by every entry point.

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
