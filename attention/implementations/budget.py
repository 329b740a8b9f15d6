"""Memory budgets of a machine: of a whole call, and of one tile."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

from attention.device import Backend
from attention.implementations.blocks import DEFAULT_BUDGET_BYTES, MIB

GPU_SHARE: Final = 32
"""A GPU's budget is its memory divided by this: a tile costs a dozen launches, so tiles must be large."""
LARGEST_COMFORT: Final = 32 * MIB
"""Tile size beyond which there is no gain, however large the cache: it is shared."""
SMALLEST_COMFORT: Final = 4 * MIB
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


def default_budget(backend: Backend, memory_bytes: int) -> int:
    """Return the default budget of a call in bytes above inputs and outputs."""
    if backend == "cpu":
        return DEFAULT_BUDGET_BYTES
    return max(DEFAULT_BUDGET_BYTES, memory_bytes // GPU_SHARE)


def comfort(backend: Backend) -> int | None:
    """Return the preferred maximum size of a tile in bytes, or None if only the budget counts."""
    if backend != "cpu":
        return None
    return min(max(last_cache() or LARGEST_COMFORT, SMALLEST_COMFORT), LARGEST_COMFORT)


@cache
def last_cache() -> int | None:
    """Return the size of the last-level cache in bytes, or None if the system does not report it."""
    try:
        if sys.platform == "darwin":
            told = subprocess.run(
                ["sysctl", "-n", "hw.perflevel0.l2cachesize"], capture_output=True, text=True, check=True, timeout=5
            )
            return int(told.stdout)
        sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
        return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=None)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
