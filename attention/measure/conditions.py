"""What a run's figures depend on beside its code: versions, clocks and temperature, and what else goes on meanwhile.

A fingerprint is taken when a run begins: versions, driver, clocks. Conditions are read while it measures: other
processes, other runs, the hypervisor.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import psutil
from msgspec import Struct

from attention.core.results import Conditions, Fingerprint, MachineState
from attention.measure.device import Device, installed_version, open_nvml

ENGINE: Final = "attention.engine.worker"
"""The module of an engine's process, as on its command line."""
GOVERNOR: Final = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
MAX_NAMES: Final = 3
MIN_NAMED_CORES: Final = 0.02
"""Processes that took less are not named."""
KERNEL: Final = "kworker"
"""Begins the names of the kernel's own threads, which say nothing to a user."""
MIN_INTERVAL_S: Final = 0.5
"""Shorter intervals are not read: a reading would take a good part of them, and the counters tick every 10 ms."""


class _Usage(Struct):
    """Seconds of processor time up to now."""

    at: float
    busy_s: float
    stolen_s: float
    by_process: dict[tuple[int, str], float]
    family_s: float
    engines: set[int]
    """Ids of the programs of other runs: each has an engine, however many ranks."""


class ConditionsWatch:
    """Reader of the conditions between two readings; one takes up to 0.1 s, so that none is made while timing."""

    def __init__(self, device: Device) -> None:
        """Begin the first interval."""
        self._device = device
        self._before = _usage()
        self._last = Conditions()

    def read(self) -> Conditions:
        """Return the conditions since the last reading, or the last ones again if that was just now."""
        if time.monotonic() - self._before.at < MIN_INTERVAL_S:
            return self._last
        now = _usage()
        elapsed = now.at - self._before.at
        own_s = max(0.0, now.family_s - self._before.family_s)
        others = max(0.0, now.busy_s - self._before.busy_s - own_s) / elapsed
        spent = {key: (s - self._before.by_process.get(key, 0.0)) / elapsed for key, s in now.by_process.items()}
        named = [key for key in spent if spent[key] >= MIN_NAMED_CORES and not key[1].startswith(KERNEL)]
        busiest = sorted(named, key=lambda key: -spent[key])
        self._last = Conditions(
            cores=self._device.cores,
            other_cores=others,
            busiest=tuple(dict.fromkeys(name for _, name in busiest))[:MAX_NAMES],
            stolen_cores=max(0.0, now.stolen_s - self._before.stolen_s) / elapsed,
            other_engines=len(now.engines),
            governor=_governor(),
            on_battery=_on_battery(),
            tf32=self._device.backend == "cuda" and os.environ.get("MLX_ENABLE_TF32", "1") != "0",
        )
        self._before = now
        return self._last


def _usage() -> _Usage:
    total = psutil.cpu_times()
    idle = total.idle + getattr(total, "iowait", 0.0) + getattr(total, "steal", 0.0)
    guest = getattr(total, "guest", 0.0) + getattr(total, "guest_nice", 0.0)  # counted in user and nice already
    family = _family()
    made = _Usage(
        at=time.monotonic(),
        busy_s=sum(total) - idle - guest,
        stolen_s=getattr(total, "steal", 0.0),
        by_process={},
        family_s=0.0,
        engines=set(),
    )
    for process in psutil.process_iter():
        with suppress(psutil.Error), process.oneshot():
            times = process.cpu_times()
            spent = times.user + times.system
            if process.pid in family:
                made.family_s += spent + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            else:
                name = process.name()
                made.by_process[process.pid, name] = spent
                if "python" in name and _is_engine(process):
                    made.engines.add(process.ppid())
    return made


def _family() -> set[int]:
    """Return the ids of the program that started this engine, and of all that it started: ranks, compilers."""
    with suppress(psutil.Error):
        head = psutil.Process(os.getppid() if _is_engine(psutil.Process()) else os.getpid())
        return {head.pid, os.getpid(), *(child.pid for child in head.children(recursive=True))}
    return {os.getpid()}


def _is_engine(process: psutil.Process) -> bool:
    return ENGINE in process.cmdline()


def _governor() -> str | None:
    try:
        return GOVERNOR.read_text(encoding="ascii", errors="replace").strip()[:40] or None
    except OSError:
        return None


def _on_battery() -> bool | None:
    with suppress(Exception):  # psutil raises different errors for different system files
        battery = psutil.sensors_battery()
        return None if battery is None or battery.power_plugged is None else not battery.power_plugged
    return None


PACKAGES: Final = ("mlx", "mlx-lm", "numpy", "torch", "nanobind")
SENSORS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
CPU0: Final = Path("/sys/devices/system/cpu/cpu0")
DRIVER: Final = Path("/proc/driver/nvidia/version")
MAX_TEXT: Final = 100


def fingerprint(device: Device) -> Fingerprint:
    """Return the fingerprint of a run that begins; what cannot be read is None."""
    return Fingerprint(
        versions={name: found for name in PACKAGES if (found := installed_version(name))},
        architecture=device.architecture or None,
        max_clock_hz=_clock_hz("max"),
        driver=_driver(),
        before=machine_state(device),
    )


def machine_state(device: Device) -> MachineState:
    """Return what changes while a machine works; takes a millisecond, so that none is read while timing."""
    clock, temperature = _gpu() if device.backend == "cuda" else (None, None)
    return MachineState(
        clock_hz=cpu_clock_hz(),
        temperature_c=cpu_temperature_c(),
        load=_load(),
        throttle_events=_number(CPU0 / "thermal_throttle/core_throttle_count"),
        gpu_clock_hz=clock,
        gpu_temperature_c=temperature,
    )


def cpu_clock_hz() -> float | None:
    """Return the current clock of the cores."""
    return _clock_hz("current")


def cpu_temperature_c() -> float | None:
    """Return the temperature of the hottest core in degrees Celsius."""
    with suppress(Exception):
        found = psutil.sensors_temperatures()
        return max((float(each.current) for name in SENSORS for each in found.get(name, [])), default=None)
    return None


def _clock_hz(name: Literal["current", "max"]) -> float | None:
    with suppress(Exception):  # psutil raises different errors for different system files
        megahertz = float(getattr(psutil.cpu_freq(), name))
        return megahertz * 1e6 if megahertz > 0 else None
    return None


def _load() -> float | None:
    with suppress(OSError):
        return os.getloadavg()[0]
    return None


def _gpu() -> tuple[float | None, float | None]:
    """Return the clock and the temperature of the GPU that computes, if pynvml is installed."""
    with suppress(Exception):  # a driver that fails
        if found := open_nvml():
            library, handle = found
            clock = library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)
            temperature = library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU)
            return clock * 1e6, float(temperature)
    return None, None


def _driver() -> str | None:
    text = _text(DRIVER, 1000) or ""
    words = text.split("Kernel Module")[-1].split() if "Kernel Module" in text else []
    return next((word for word in words if word[:1].isdigit()), None)


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isascii() and text.isdigit() else None


def _text(path: Path, limit: int = MAX_TEXT) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:limit] or None
    except OSError:
        return None
