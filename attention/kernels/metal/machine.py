"""What this machine has of what the kernels need, asked without compiling or running anything."""

import platform
from functools import cache
from importlib.metadata import version

from attention.errors import KernelUnavailable
from attention.kernels import cache as folder

OLDEST_MACOS = 14
"""MLX's own floor; its Metal (3.1) has bfloat16 and matrices of simdgroups."""


@cache
def look() -> str:
    """GPU and system in a few words.

    Raises:
        KernelUnavailable: naming the first thing that is missing.
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
    """What a verdict holds for: the GPU, the system, whose part Metal's compiler is, and MLX."""
    import mlx.core as mx

    info = mx.device_info(mx.default_device())
    name, architecture = info.get("device_name", "unknown GPU"), info.get("architecture", "")
    return f"{name}, {architecture}, macOS {platform.mac_ver()[0]}, MLX {version('mlx')}"
