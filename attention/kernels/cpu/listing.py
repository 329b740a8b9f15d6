"""Block lists of masks for kernels: by compiled code, once a process has made many."""

import threading
import time
from typing import Final

from attention.core.errors import KernelUnavailable
from attention.kernels.cpu import library
from attention.masks import BlockList, Pattern, Shape
from attention.masks import block_list as lists

PARTS: Final = frozenset({"lists"})
LOAD_AFTER_S: Final = 0.02
"""CPU time that lists take in a process until compiled code is looked for in the cache folder."""
COMPILE_AFTER_S: Final = 5.0
"""CPU time until it is compiled, which takes as long."""

_lock = threading.Lock()
_spent_s = 0.0
_next_s: float | None = LOAD_AFTER_S
"""CPU time after which compiled code is looked for, or compiled; None if there will be none."""


def block_list(pattern: Pattern, shape: Shape, block_q: int, block_k: int) -> BlockList:
    """Return a mask's block list, as `Pattern.block_list`: by NumPy until lists have taken some time."""
    start = time.thread_time()
    made = pattern.block_list(shape, block_q, block_k)
    if _next_s is not None and lists.current_builder() is None:
        _count(time.thread_time() - start)
    return made


def _count(seconds: float) -> None:
    """Count time that a list took by NumPy; load or compile the code once that is worth it."""
    global _next_s, _spent_s  # noqa: PLW0603  of the process
    with _lock:
        _spent_s += seconds
        if _next_s is None or _spent_s < _next_s:
            return
        is_last = _next_s == COMPILE_AFTER_S
        _next_s = None if is_last else COMPILE_AFTER_S
        if is_last or library.is_compiled(PARTS):
            try:
                library.load(parts=PARTS)
            except KernelUnavailable:  # the library keeps the reason
                _next_s = None
