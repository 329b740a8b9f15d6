"""Limits of time that a busy machine does not break."""

import os


def patient(seconds: float) -> float:
    """Return a limit times the processes that share a core: the limit itself on a quiet machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return seconds * max(1.0, 2 * os.getloadavg()[0] / cores)
