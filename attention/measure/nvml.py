"""NVIDIA's management library, opened for the device that MLX computes on."""

import os
from contextlib import suppress
from typing import Any


def open_device() -> tuple[Any, Any] | None:
    """Return the library and the handle of the first visible device; None without the library, a driver or a device.

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
