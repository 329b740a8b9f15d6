"""Kernel selection: the Hopper or split-K kernel if it supports the call and passed its check, else the general one."""

from collections.abc import Iterator
from typing import Literal

from attention.core.errors import KernelUnavailable
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.portable.launch import Division
from attention.kernels.cuda.runtime import launcher, selfcheck
from attention.kernels.cuda.runtime.call import Call, Shape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.program import Program
from attention.kernels.cuda.sm90 import launch as sm90_launch
from attention.kernels.cuda.sm90.decode import MOST_ROWS

Path = Literal["decode", "forward", "general"]

_own_left_out = False


def set_own_left_out(left_out: bool) -> None:
    """Set whether all calls use the general kernels."""
    global _own_left_out  # noqa: PLW0603  for tests and measurements
    _own_left_out = left_out


def own_refusal(shape: Shape, call: Call) -> str | None:
    """Return why only the general kernels support a call, judging by its parameters and shapes, or None."""
    if _own_left_out:
        return "the general kernels are to be used"
    if call.mask is not None:
        return "only the general kernels have array masks"
    if shape.value_dim != shape.head_dim:
        return "only the general kernels take values of another width than keys"
    return None


def candidates(shape: Shape, call: Call) -> Iterator[Path]:
    """Yield the paths that support a call, fastest first."""
    # the specialised kernels need tensor maps and serial numbers, which only the launcher provides
    if own_refusal(shape, call) is None and launcher.obstacle() is None:
        if shape.group * shape.queries <= MOST_ROWS:
            yield "decode"
        elif gpu().architecture == "sm_90a":
            yield "forward"
    yield "general"


def path_of(shape: Shape, call: Call) -> tuple[Path, list[str]]:
    """Return the path of a call according to the checks so far, and why faster paths are not trusted.

    Raises:
        KernelUnavailable: no path is trusted.
    """
    reasons: list[str] = []
    for path in candidates(shape, call):
        distrusted = selfcheck.distrust(program_of(shape, call, path))
        if distrusted is None:
            return path, reasons
        reasons.append(f"{program_of(shape, call, path).name}: {distrusted}")
    raise KernelUnavailable("; ".join(reasons))


def program_of(shape: Shape, call: Call, path: Path) -> Program:
    """Return the program of the main kernel of a path."""
    match path:
        case "forward":
            return sm90_launch.forward_kernel(shape, call).program
        case "decode":
            return sm90_launch.splitting(shape, call).kernel.program
        case "general":
            return divided(shape, call).kernel.program


def divided(shape: Shape, call: Call) -> Division:
    """Return the work division of the general kernel for a call on this machine."""
    return portable_launch.division(shape, call, launcher.obstacle() is not None)
