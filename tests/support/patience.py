"""Limits of time that a busy machine does not break."""

import os
from pathlib import Path

LOAD = Path("/proc/loadavg")


def patient(seconds: float) -> float:
    """Return a limit times the processes that share a core, now or of late: the limit itself on a quiet machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return seconds * max(1.0, 2 * max(os.getloadavg()[0], _running()) / cores)


def _running() -> int:
    """Return how many threads run or wait for a core; 0 where the system does not say so."""
    return int(LOAD.read_text().split()[3].partition("/")[0]) if LOAD.exists() else 0
