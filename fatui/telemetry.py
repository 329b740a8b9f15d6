"""Machine readings that need no root: load, clock, temperature, power; None if unavailable. Their line of text."""

import contextlib
import time
from typing import Any

import psutil
from msgspec import Struct

from attention.measure.conditions import cpu_clock_hz, cpu_temperature_c
from attention.measure.device import open_nvml
from attention.measure.energy import RaplCounter
from fatui import formatting


class Reading(Struct, frozen=True, kw_only=True):
    """One reading of the machine."""

    cpu_percent: float | None = None
    """In percent of one core, so that two busy cores are 200."""
    clock_hz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    process_bytes: int | None = None
    """Resident memory of the engine's process."""
    gpu: "GpuReading | None" = None


class GpuReading(Struct, frozen=True, kw_only=True):
    """One reading of a CUDA device."""

    load_percent: float | None = None
    clock_hz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    used_bytes: int | None = None


class Telemetry:
    """Reader of the machine's state; readings that fail once are not tried again."""

    def __init__(self) -> None:
        self._process: psutil.Process | None = None
        self._counter: RaplCounter | None = None
        self._energy: tuple[float, float] | None = None
        self._sensors = hasattr(psutil, "sensors_temperatures")
        self._nvml: Any = None
        self._nvml_tried = False
        psutil.cpu_percent()

    def read(self, process_id: int | None) -> Reading:
        """Take one reading; call it from a thread, at most once a second."""
        return Reading(
            cpu_percent=psutil.cpu_percent() * (psutil.cpu_count() or 1),
            clock_hz=self._clock(),
            temperature_c=self._temperature(),
            power_w=self._power(),
            process_bytes=self._resident(process_id),
            gpu=self._gpu(),
        )

    def _resident(self, process_id: int | None) -> int | None:
        if process_id is None:
            return None
        with contextlib.suppress(psutil.Error):
            if self._process is None or self._process.pid != process_id:
                self._process = psutil.Process(process_id)
            return int(self._process.memory_info().rss) or None  # an ended process that was not reaped has none
        return None

    def _clock(self) -> float | None:
        return cpu_clock_hz()

    def _temperature(self) -> float | None:
        if not self._sensors:
            return None
        temperature = cpu_temperature_c()
        self._sensors = temperature is not None
        return temperature

    def _power(self) -> float | None:
        """Return the mean power since the last reading, from the packages' energy counters if readable."""
        try:
            self._counter = self._counter or RaplCounter()
            now = time.monotonic(), self._counter()
            before, self._energy = self._energy, now
            return (now[1] - before[1]) / (now[0] - before[0]) if before else None
        except (OSError, ValueError, ZeroDivisionError):
            return None

    def _gpu(self) -> GpuReading | None:
        if not self._nvml_tried:
            self._nvml_tried = True
            self._nvml = open_nvml()
        if self._nvml is None:
            return None
        nvml, handle = self._nvml

        def ask(call: Any, *arguments: Any) -> Any:
            with contextlib.suppress(nvml.NVMLError):
                return call(handle, *arguments)
            return None

        load, memory = ask(nvml.nvmlDeviceGetUtilizationRates), ask(nvml.nvmlDeviceGetMemoryInfo)
        clock = ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
        power = ask(nvml.nvmlDeviceGetPowerUsage)
        return GpuReading(
            load_percent=load.gpu if load else None,
            clock_hz=clock * 1e6 if clock else None,
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=power / 1000 if power else None,
            used_bytes=memory.used if memory else None,
        )


def reading_text(reading: Reading) -> str:
    """Format the telemetry line: "CPU 198 %   clock 3.4 GHz   temperature n/a   power n/a"."""
    return "   ".join([*_device_words("CPU", reading.cpu_percent, reading), *(_gpu_words(reading.gpu))])


def _gpu_words(gpu: GpuReading | None) -> list[str]:
    return _device_words("GPU", gpu.load_percent, gpu) if gpu else []


def _device_words(name: str, load: float | None, reading: Reading | GpuReading) -> list[str]:
    clock = "n/a" if reading.clock_hz is None else f"{formatting.rate(reading.clock_hz)}Hz"
    temperature = "n/a" if reading.temperature_c is None else f"{reading.temperature_c:.0f} °C"
    power = "n/a" if reading.power_w is None else f"{reading.power_w:.0f} W"
    shown = "n/a" if load is None else f"{load:.0f} %"
    return [f"{name} {shown}", f"clock {clock}", f"temperature {temperature}", f"power {power}"]
