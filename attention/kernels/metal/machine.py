"""Requirements of the kernels on this machine, checked without compiling or running anything."""

import platform
from functools import cache
from importlib.metadata import version

from attention.errors import KernelUnavailable
from attention.kernels import cache as folder

OLDEST_MACOS = 14
"""Oldest macOS version that MLX supports; its Metal 3.1 has bfloat16 and simdgroup matrices."""


@cache
def look() -> str:
    """Return GPU and system in a few words.

    Raises:
        KernelUnavailable: names the first missing requirement.
    """
    if platform.system() != "Darwin":
        raise KernelUnavailable(f"the Metal kernels run on macOS only, not on {platform.system()}")
    import mlx.core as mx

    if not mx.metal.is_available():
        raise KernelUnavailable("this MLX has no Metal backend, or finds no GPU")
    if int(platform.mac_ver()[0].partition(".")[0] or 0) < OLDEST_MACOS:
        raise KernelUnavailable(f"the Metal kernels need macOS {OLDEST_MACOS}, and this is {platform.mac_ver()[0]}")
    folder.ready_folder()
    return mark()


@cache
def mark() -> str:
    """Return what a self-check's result is valid for: GPU, system (with its Metal compiler) and MLX version."""
    import mlx.core as mx

    info = mx.device_info(mx.default_device())
    name, architecture = info.get("device_name", "unknown GPU"), info.get("architecture", "")
    return f"{name}, {architecture}, macOS {platform.mac_ver()[0]}, MLX {version('mlx')}"
