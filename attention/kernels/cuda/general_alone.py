"""Leaving the GPU's own kernels out, to test and to measure the general ones where there are others."""

import contextlib
from collections.abc import Iterator

from attention.kernels import cuda
from attention.kernels.cuda import attend, choice, pullback


@contextlib.contextmanager
def general_alone() -> Iterator[None]:
    """Every call goes to the general kernels, forward and backward."""
    choice.set_own_left_out(True)
    _forget()
    try:
        yield
    finally:
        choice.set_own_left_out(False)
        _forget()


def _forget() -> None:
    """What was chosen before."""
    cuda.forget_calls()
    for kept in (attend.repeated, pullback._own_is_taken, pullback._general_is_taken):
        kept.cache_clear()
