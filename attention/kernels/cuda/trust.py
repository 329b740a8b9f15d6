"""First-use self-checks (`first_use`) of the programs compiled by NVRTC."""

import functools
from importlib import metadata

import mlx.core as mx

from attention.code_mark import code_mark
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.program import Program, machine_code
from attention.kernels.first_use import Check, FirstUse


def distrust(program: Program) -> str | None:
    """Return why a program must not be used on this GPU, or None if unknown."""
    return checks.distrust(program.key)


def judged(program: Program, check: Check) -> str | None:
    """Self-check a program unless it was checked on this GPU before; return why it must not be used, or None.

    Args:
        program: program to check; its verdict is stored.
        check: runs the kernel and returns an error in its results, or None.

    Raises:
        RuntimeError: the launch failed, and the CUDA context of this process is no longer usable.
    """
    reason = checks.judged(program.key, program.name, check, prepare=lambda: machine_code(program))
    if reason is not None and not _gpu_answers():
        raise RuntimeError(f"{program.name} broke this process's use of the GPU; a new one goes without it: {reason}")
    return reason


def mark() -> str:
    """Return the key of a verdict: GPU, driver, MLX version, and a fingerprint of the code in this package."""
    return f"{gpu().mark}, MLX {_mlx_version()}, code {code_mark('kernels/cuda')}"


@functools.cache
def _mlx_version() -> str:
    return metadata.version("mlx")


def _gpu_answers() -> bool:
    """Return whether MLX can still compute; after an illegal memory access, every CUDA call fails."""
    try:
        mx.eval(mx.zeros(1) + 1)
    except RuntimeError:
        return False
    return True


checks = FirstUse(mark)
