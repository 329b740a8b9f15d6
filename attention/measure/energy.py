"""The energy of calls, from the counters of a device: NVML's, Linux's RAPL, Apple's IOReport.

A counter moves in steps of up to a tenth of a second, longer than a sample in the rounds, so that energies cannot be
measured there. Each implementation computes alone for a while, from one step of the counter to another.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from attention.measure import nvml
from attention.measure.device import Device
from attention.measure.rounds import Clock

ENERGY_S: Final = 0.25
"""Seconds between the two steps of the counter."""
PATIENCE: Final = 4
"""Multiple of that after which a counter counts as standing still."""
POWERCAP: Final = Path("/sys/class/powercap")
Counter = Callable[[], float]
"""Returns joules since an arbitrary moment."""


def energy_counter(device: Device) -> Counter | None:
    """Return the counter of the device that computes: a GPU's own, or that of the processor's packages.

    None without one, or if it cannot be read: RAPL is for root on many systems.
    """
    with suppress(Exception):  # a library, a driver or a file may raise anything
        on_mac = sys.platform == "darwin"
        counter = _nvml() if device.backend == "cuda" else _apple() if on_mac else RaplCounter(POWERCAP)
        counter()
        return counter
    return None


def _nvml() -> Counter:
    library, handle = nvml.open_device() or (None, None)
    assert library is not None
    return lambda: float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def _apple() -> Counter:
    """Return the counter of a Mac's GPU and CPU together, since they share a chip; the extra `energy` has it."""
    from zeus_apple_silicon import AppleEnergyMonitor  # type: ignore[import-not-found, unused-ignore]

    monitor: Any = AppleEnergyMonitor()

    def joules() -> float:
        read = monitor.get_cumulative_energy()
        return float((read.gpu_mj or 0) + (read.cpu_total_mj or 0)) / 1e3

    return joules


class RaplCounter:
    """The energy of all packages of the processor; the counters wrap around."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        """Find the packages.

        Raises:
            OSError: there are none, or they cannot be read.
        """
        packages = [
            domain
            for domain in sorted(folder.glob("intel-rapl:*"))
            if (domain / "name").read_text().startswith("package")
        ]
        if not packages:
            raise FileNotFoundError(f"no packages in {folder}")
        self._files = [domain / "energy_uj" for domain in packages]
        self._ranges = [int((domain / "max_energy_range_uj").read_text()) for domain in packages]
        self._last = [int(file.read_text()) for file in self._files]
        self._total = 0

    def __call__(self) -> float:
        """Return the joules since the counter was made."""
        for number, file in enumerate(self._files):
            now = int(file.read_text())
            used = now - self._last[number]
            self._total += used if used >= 0 else used + self._ranges[number]
            self._last[number] = now
        return self._total / 1e6


def joules_per_call(
    make_calls: Callable[[], int], counter: Counter, seconds: float = ENERGY_S, clock: Clock = time.perf_counter
) -> float | None:
    """Return the joules of one call, from calls back to back between two steps of a counter.

    Args:
        make_calls: makes some calls, and returns their number.
        counter: of the device.
        seconds: minimum time between the two steps.
        clock: in seconds.

    Returns:
        None if the counter stands still.
    """
    began, made, last = clock(), 0, counter()
    first: tuple[int, float, float] | None = None
    while first is not None or clock() - began < PATIENCE * seconds:
        made += make_calls()
        joules, now = counter(), clock()
        if joules != last and first is None:
            first = made, joules, now
        elif first is not None and joules != last and now - first[2] >= seconds:
            return (joules - first[1]) / (made - first[0])
        elif first is not None and now - first[2] >= PATIENCE * seconds:
            return None
        last = joules
    return None
