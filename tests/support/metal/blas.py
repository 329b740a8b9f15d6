"""Numpy's products on one thread: for arrays this small, OpenBLAS's other threads only spin."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@cache
def _openblas() -> ctypes.CDLL | None:
    """Return the library that numpy has loaded, if it is the one of its Linux wheels."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    path = next((line.split()[-1] for line in lines if "libscipy_openblas64_" in line), None)
    return None if path is None else ctypes.CDLL(path)


@contextmanager
def one_thread() -> Iterator[None]:
    """Set the number of threads, and restore it afterwards."""
    library = _openblas()
    if library is None:
        yield
        return
    before = library.scipy_openblas_get_num_threads64_()
    library.scipy_openblas_set_num_threads64_(1)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads64_(before)
