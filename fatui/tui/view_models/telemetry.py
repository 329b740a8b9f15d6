"""The line of a machine's readings."""

from fatui import formatting
from fatui.telemetry import GpuReading, Reading


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
