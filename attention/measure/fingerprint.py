"""What a run's figures depend on beside its code: versions of libraries, clocks, load and temperature."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import psutil

from attention.core.results import Fingerprint, MachineState
from attention.measure import nvml
from attention.measure.device import Device, installed_version

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
        if found := nvml.open_device():
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
