"""The machine: MLX's backend, memory, processor and installed libraries; NVIDIA's management library."""

import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import Struct

from attention.core.errors import NoBackendError, Remedy
from attention.core.results import Environment

Backend = Literal["cpu", "metal", "cuda"]
MAX_CPU_RANKS: Final = 8
NOT_MLX: Final = ("numpy", "scipy", "torch")
NUMPY_BLAS: Final = "numpy-openblas"
"""Start of the file name of the library that forwards MLX's products to numpy's OpenBLAS."""
PRODUCT_NUMBER: Final = re.compile(r"\d{3}|\d[A-Z]\d")
"""What distinguishes a processor's name, as in "EPYC 9654", "EPYC 9R14" or "i7-8700K"; "AMD EPYC" is of all of them."""
MODEL_NUMBERS: Final = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
"""Fields of /proc/cpuinfo, on x86 and on ARM, and their names in a processor's."""


class Device(Struct, frozen=True, kw_only=True):
    """The device that MLX computes on."""

    backend: Backend
    name: str
    """Product name: "Apple M3 Max", "NVIDIA H200", "AMD EPYC 9R14", "AMD EPYC (family 25, model 17)"."""
    cores: int
    """Number of CPU cores that this process may use."""
    memory_bytes: int
    """Total memory of the backend."""
    available_bytes: int
    """Memory that a run may use now."""
    architecture: str = ""
    """Architecture as MLX names it: "x86_64", "applegpu_g15s", "sm_90a"."""
    mlx: str = ""
    """MLX's version."""
    count: int = 1
    """Number of such devices of this machine."""

    @property
    def max_ranks(self) -> int:
        """Number of ranks that this machine can run: one for each GPU, or shares of a CPU's cores."""
        return MAX_CPU_RANKS if self.backend == "cpu" else self.count


def probe() -> Device:
    """Return the device that MLX runs on.

    Raises:
        NoBackendError: MLX is missing or has no backend.
    """
    try:
        import mlx.core as mx

        default = mx.default_device()
    except (ImportError, OSError) as error:
        raise NoBackendError("MLX has no backend on this machine", str(error), Remedy.INSTALL_BACKEND) from error
    info = mx.device_info(default)
    backend: Backend = "cpu"
    if default.type == mx.DeviceType.gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
    total, available = _memory(backend, {name: value for name, value in info.items() if isinstance(value, int)})
    return Device(
        backend=backend,
        name=processor_name() if backend == "cpu" else str(info.get("device_name", "unknown GPU")),
        cores=usable_cores(),
        memory_bytes=total,
        available_bytes=available,
        architecture=str(info.get("architecture", "")),
        mlx=version("mlx"),
        count=max(1, mx.device_count(default.type)),
    )


def _memory(backend: Backend, info: dict[str, int]) -> tuple[int, int]:
    """Return total and available bytes of the backend's memory."""
    import psutil

    system = psutil.virtual_memory()
    if backend == "cuda":
        return info.get("total_memory", system.total), info.get("free_memory", system.available)
    total = min(system.total, container_memory_limit() or system.total)
    if backend == "metal":
        working_set = info.get("max_recommended_working_set_size", total)
        return total, min(working_set, system.available)
    return total, min(system.available, total)


def container_memory_limit() -> int | None:
    """Return the memory limit of this process's control group in bytes, or None."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(name).read_text())
        except (OSError, ValueError):
            continue
    return None


def cpu_quota(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the CPUs that this process's control group may keep busy, rounded up; None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None


def computes_on_cpu() -> bool:
    """Return whether MLX's default device is the CPU, by the installed packages: MLX is not imported."""
    names = ("mlx-cuda-12", "mlx-cuda-13", "mlx-metal")
    return sys.platform == "linux" and not any(installed_version(name) for name in names)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may keep busy: of its affinity, within its quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, cpu_quota() or cores)


def processor_name() -> str:
    """Return the CPU's product name; with family and model if it names no product, as in virtual machines."""
    if sys.platform == "darwin":
        import subprocess

        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    fields = first_processor()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{words} {fields[field]}" for field, words in MODEL_NUMBERS.items() if field in fields]
    return name if PRODUCT_NUMBER.search(name) or not numbers else f"{name} ({', '.join(numbers)})"


@cache
def first_processor() -> Mapping[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def blas() -> str | None:
    """Return the BLAS library used by MLX's CPU matrix products, found among the loaded libraries; None if unknown.

    Call it after importing MLX. numpy, scipy and torch load their own, which MLX does not use.
    """
    if sys.platform == "darwin":
        return "Accelerate"
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    if _forwards():
        return "numpy's OpenBLAS"
    theirs = {line.split(maxsplit=5)[-1].lower() for line in lines if ".so" in line and f"/{NUMPY_BLAS}" not in line}
    names = " ".join(Path(path).name for path in theirs if not any(f"/{other}" in path for other in NOT_MLX))
    known = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS", "libblas": "reference BLAS"}
    return next((title for part, title in known.items() if part in names), None)


def _forwards() -> bool:
    """Return whether MLX's products go through numpy's OpenBLAS, by computing one.

    The library that forwards them is found by symbol, not by file: its file may have been removed since it was loaded.
    """
    import ctypes

    count = getattr(ctypes.CDLL(None), "attention_blas_products", None)
    if count is None:
        return False
    import mlx.core as mx

    count.restype = ctypes.c_uint64
    before = count()
    with mx.stream(mx.cpu):
        mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    return bool(count() > before)


def environment(device: Device) -> Environment:
    """Return the environment of a report; the application adds its own version."""
    return Environment(
        mlx=device.mlx,
        backend=device.backend,
        device=device.name,
        memory_bytes=device.memory_bytes,
        blas=blas(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def open_nvml() -> tuple[Any, Any] | None:
    """Return NVIDIA's management library and the handle of the first visible device; None without any of them.

    The library itself sees all devices, also those that CUDA_VISIBLE_DEVICES hides.
    """
    with suppress(Exception):  # no pynvml, no driver, no device, or one that the library does not name
        import pynvml  # type: ignore[import-not-found, unused-ignore]

        nvml: Any = pynvml
        nvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        if first.startswith(("GPU-", "MIG-")):
            return nvml, nvml.nvmlDeviceGetHandleByUUID(first)
        return nvml, nvml.nvmlDeviceGetHandleByIndex(int(first or 0))
    return None
