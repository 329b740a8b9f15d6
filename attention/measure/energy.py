"""The energy of calls, from the counters of a device: NVML's, Linux's RAPL, Apple's IOReport.

A counter moves in steps of up to a tenth of a second, longer than a sample in the rounds, so that energies cannot be
measured there. Each implementation computes alone for a while, from one step of the counter to another.
"""

import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from attention.measure.device import Device, open_nvml
from attention.measure.rounds import Clock

ENERGY_S: Final = 0.25
"""Seconds between the two steps of the counter."""
PATIENCE: Final = 4
"""Multiple of that after which a counter counts as standing still."""
POLL_S: Final = 0.002
LEAD_S: Final = 0.1
"""Seconds of calls before the first step that counts, in which the device's power rises."""
MIN_MARKS: Final = 3
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


def power_limit_w(device: Device) -> float | None:
    """Return the watts beyond which a counter of energy cannot be right: the GPU's limit; None if no driver says."""
    if device.backend != "cuda":
        return None
    with suppress(Exception):
        library, handle = open_nvml() or (None, None)
        assert library is not None
        return float(library.nvmlDeviceGetPowerManagementLimit(handle)) / 1e3
    return None


def _nvml() -> Counter:
    library, handle = open_nvml() or (None, None)
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


Marks = Sequence[tuple[float, float]]
"""Times in seconds, in order, each with what a count had reached."""


class EnergyOfCalls(NamedTuple):
    """What calls back to back took on average."""

    joules: float | None
    """Of one call; None if the counter stood still."""
    call_s: float
    """Of one call, in seconds."""
    watts: float | None = None
    """Between the two steps of the counter."""


def energy_of_calls(
    make_calls: Callable[[], int], counter: Counter, seconds: float = ENERGY_S, clock: Clock = time.perf_counter
) -> EnergyOfCalls:
    """Measure the energy of calls back to back, between two steps of a counter.

    The counter is read in a thread, for a read may take milliseconds, in which the device would idle.

    Args:
        make_calls: makes some calls, and returns their number.
        counter: of the device.
        seconds: minimum time between the two steps.
        clock: in seconds.
    """
    ended = threading.Event()
    steps: list[tuple[float, float]] = []
    began, made = clock(), 0
    calls: list[tuple[float, float]] = [(began, 0)]

    def watch() -> None:
        last = counter()
        while not ended.wait(POLL_S):
            joules, now = counter(), clock()
            if joules != last and now - began >= LEAD_S:
                steps.append((now, joules))
            last = joules

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        while True:
            made += make_calls()
            calls.append((clock(), made))
            found = per_call(steps, calls, seconds)
            if found is not None or (calls[-1][0] - began > PATIENCE * seconds + LEAD_S and len(calls) > MIN_MARKS):
                return EnergyOfCalls(found, (calls[-1][0] - began) / made, watts_of(steps, calls) if found else None)
    finally:
        ended.set()
        thread.join()


def per_call(steps: Marks, calls: Marks, seconds: float) -> float | None:
    """Return the joules of a call between the first step of a counter and the last one that calls have passed.

    Args:
        steps: when the counter moved, and its joules.
        calls: when calls had been made, and their number.
        seconds: minimum time between the two steps; None is returned for less.
    """
    passed = _passed(steps, calls)
    if len(passed) < 2 or passed[-1][0] - passed[0][0] < seconds:
        return None
    return (passed[-1][1] - passed[0][1]) / (_at(passed[-1][0], calls) - _at(passed[0][0], calls))


def watts_of(steps: Marks, calls: Marks) -> float:
    """Return the power between the first step of a counter and the last one that calls have passed."""
    passed = _passed(steps, calls)
    return (passed[-1][1] - passed[0][1]) / (passed[-1][0] - passed[0][0])


def _passed(steps: Marks, calls: Marks) -> Marks:
    return [step for step in steps if step[0] <= calls[-1][0]]


def _at(time_s: float, calls: Marks) -> float:
    """Return the number of calls at a time, those under way as far as they have come."""
    after = bisect_left(calls, time_s, key=lambda mark: mark[0])
    (begin_s, begin), (end_s, end) = calls[after - 1], calls[after]
    return begin + (end - begin) * (time_s - begin_s) / (end_s - begin_s)
