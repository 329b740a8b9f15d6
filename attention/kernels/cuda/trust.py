"""Which kernels have shown on this GPU that they are right: `first_use` for the programs that NVRTC compiles."""

import functools
from importlib import metadata

import mlx.core as mx

from attention.code_mark import code_mark
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.program import Program, machine_code
from attention.kernels.first_use import Check, FirstUse


def distrust(program: Program) -> str | None:
    """Why a program is not to be used on this GPU, if that is known."""
    return checks.distrust(program.key)


def judged(program: Program, check: Check) -> str | None:
    """Checks a program unless that has been done on this GPU before; why it is not to be used, or None.

    Args:
        program: what the verdict is kept for.
        check: runs the kernel and returns what is wrong with its results, or None.

    Raises:
        RuntimeError: its launch failed now, and with it all that this process asks of the GPU from here on.
    """
    reason = checks.judged(program.key, program.name, check, prepare=lambda: machine_code(program))
    if reason is not None and not _gpu_answers():
        raise RuntimeError(f"{program.name} broke this process's use of the GPU; a new one goes without it: {reason}")
    return reason


def mark() -> str:
    """What a verdict holds for: GPU, driver, the MLX that launches, and the code that does and that checks."""
    return f"{gpu().mark}, MLX {_mlx_version()}, code {code_mark('kernels/cuda')}"


@functools.cache
def _mlx_version() -> str:
    return metadata.version("mlx")


def _gpu_answers() -> bool:
    """Whether MLX can still compute; after a bad memory access CUDA refuses everything."""
    try:
        mx.eval(mx.zeros(1) + 1)
    except RuntimeError:
        return False
    return True


checks = FirstUse(mark)
