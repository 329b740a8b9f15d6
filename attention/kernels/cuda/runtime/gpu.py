"""Properties of CUDA device 0, the device of MLX, queried from the driver without MLX."""

import ctypes
import functools
from dataclasses import dataclass

from attention.core.errors import KernelUnavailable

_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARED_MEMORY = 16, 75, 76, 97  # CUdevice_attribute values


@dataclass(frozen=True)
class GpuProperties:
    """A GPU and its driver."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory_limit: int
    """Maximum shared memory per block, in bytes."""
    driver: int
    """CUDA version that the driver supports, 1000 * major + 10 * minor."""

    @property
    def architecture(self) -> str:
        """Compilation target; "sm_90a" on Hopper, for wgmma and TMA."""
        name = f"sm_{self.capability[0]}{self.capability[1]}"
        return "sm_90a" if self.capability == (9, 0) else name

    @property
    def fingerprint(self) -> str:
        """Identity of GPU and driver, part of the key of stored self-check results."""
        return f"{self.name}, {self.architecture}, driver {self.driver}"


@functools.cache
def gpu() -> GpuProperties:
    """Return the properties of device 0.

    Raises:
        KernelUnavailable: there is no driver, or it finds no GPU.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelUnavailable("there is no NVIDIA driver (libcuda.so.1)") from error
    device, driver, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    for status in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDriverGetVersion(ctypes.byref(driver)),
    ):
        if status:
            raise KernelUnavailable(f"the NVIDIA driver finds no GPU (error {status})")
    numbers = [_attribute(cuda, number, device) for number in (_MAJOR, _MINOR, _MULTIPROCESSORS, _SHARED_MEMORY)]
    return GpuProperties(name.value.decode(), (numbers[0], numbers[1]), numbers[2], numbers[3], driver.value)


def _attribute(cuda: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    status = cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    if status:
        raise KernelUnavailable(f"the NVIDIA driver does not answer (error {status})")
    return value.value
