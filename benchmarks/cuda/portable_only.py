"""Restriction to the general kernels, to test and benchmark them on GPUs that also have specialised kernels."""

import contextlib
from collections.abc import Iterator

from attention.kernels import cuda
from attention.kernels.cuda import attend, choice, gradients


@contextlib.contextmanager
def portable_only() -> Iterator[None]:
    """Use the general kernels for every call, forward and backward, while the context is open."""
    choice.set_portable_only(True)
    _forget()
    try:
        yield
    finally:
        choice.set_portable_only(False)
        _forget()


def _forget() -> None:
    """Clear the cached selections."""
    cuda.forget_calls()
    for kept in (attend.repeated_call, gradients._own_is_taken, gradients._general_is_taken):
        kept.cache_clear()
