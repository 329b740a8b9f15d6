"""What a machine lets a blockwise attention take: memory in all, and for one tile."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

from attention.device import Backend
from attention.implementations.blocks import DEFAULT_BUDGET_BYTES, MIB

GPU_SHARE: Final = 32
"""A GPU's budget is its memory over this: every tile costs a dozen launches, so that tiles have to be large."""
LARGEST_COMFORT: Final = 32 * MIB
"""Beyond this a tile gains nothing, however large a cache is: others use it too."""
SMALLEST_COMFORT: Final = 4 * MIB
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


def default_budget(backend: Backend, memory_bytes: int) -> int:
    """Bytes that a call may take above its inputs and outputs unless the user chooses."""
    if backend == "cpu":
        return DEFAULT_BUDGET_BYTES
    return max(DEFAULT_BUDGET_BYTES, memory_bytes // GPU_SHARE)


def comfort(backend: Backend) -> int | None:
    """Bytes that a tile should not outgrow by choice, or None where only the budget counts."""
    if backend != "cpu":
        return None
    return min(max(last_cache() or LARGEST_COMFORT, SMALLEST_COMFORT), LARGEST_COMFORT)


@cache
def last_cache() -> int | None:
    """Bytes of the processor's largest cache, or None where the system does not tell."""
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
