"""Records of the kernels' self-checks on this Mac, one per specialisation; see `first_use`."""

import functools
import hashlib
import platform
from importlib.metadata import version
from typing import Final

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache
from attention.kernels.common.cache import code_fingerprint
from attention.kernels.common.first_use import PASSED, Check, SelfChecks
from attention.kernels.metal.call import Specialisation

MIN_MACOS = 14
"""Oldest macOS version that MLX supports; its Metal 3.1 has bfloat16 and simdgroup matrices."""


@functools.cache
def describe() -> str:
    """Return GPU and system in a few words.

    Raises:
        KernelUnavailable: names the first missing requirement.
    """
    if platform.system() != "Darwin":
        raise KernelUnavailable(f"the Metal kernels run on macOS only, not on {platform.system()}")
    import mlx.core as mx

    if not mx.metal.is_available():
        raise KernelUnavailable("this MLX has no Metal backend, or finds no GPU")
    if int(platform.mac_ver()[0].partition(".")[0] or 0) < MIN_MACOS:
        raise KernelUnavailable(f"the Metal kernels need macOS {MIN_MACOS}, and this is {platform.mac_ver()[0]}")
    cache.ensure_folder()
    return machine_fingerprint()


@functools.cache
def machine_fingerprint() -> str:
    """Return what a self-check's result is valid for: GPU, system (with its Metal compiler) and MLX version."""
    import mlx.core as mx

    info = mx.device_info(mx.default_device())
    name, architecture = info.get("device_name", "unknown GPU"), info.get("architecture", "")
    return f"{name}, {architecture}, macOS {platform.mac_ver()[0]}, MLX {version('mlx')}"


PREFIX: Final = "metal-"
"""Prefix of the keys of all records."""


@functools.cache
def key_of(special: Specialisation) -> str:
    """Return the key of a specialisation's record: its constants and the fingerprint of its code."""
    return (
        PREFIX
        + hashlib.sha256(f"{special}{code_fingerprint('kernels/common', 'kernels/metal')}".encode()).hexdigest()[:32]
    )


def distrust_reason(special: Specialisation) -> str | None:
    """Return why a specialisation must not be used on this machine, in one line, or None if unknown."""
    reason = checks.distrust_reason(key_of(special))
    return f"{special.name}: {reason}" if reason else None


def is_trusted(special: Specialisation) -> bool:
    """Return whether a specialisation has passed its self-check on this machine."""
    return checks.verdict(key_of(special)) == PASSED


def ensure(special: Specialisation, check: Check) -> None:
    """Run the self-check of a specialisation unless it has been run on this machine before.

    Args:
        special: the specialisation.
        check: runs the kernel (Metal compiles it) and returns what is wrong with its results, or None.

    Raises:
        KernelUnavailable: the self-check failed, now or before.
    """
    checks.ensure(key_of(special), special.name, check)


checks = SelfChecks(machine_fingerprint)
