"""Kernel selection: the Hopper or split-K kernel if it supports the call and passed its check, else the general one."""

from collections.abc import Iterator
from typing import Literal

from attention.core.errors import KernelUnavailable
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.portable.launch import WorkDivision
from attention.kernels.cuda.runtime import launcher, selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import Stage
from attention.kernels.cuda.runtime.program import Program
from attention.kernels.cuda.sm90 import launch as sm90_launch
from attention.kernels.cuda.sm90.decode import MAX_ROWS

KernelPath = Literal["decode", "forward", "general"]

_portable_only = False


def set_portable_only(left_out: bool) -> None:
    """Set whether all calls use the general kernels."""
    global _portable_only  # noqa: PLW0603  for tests and measurements
    _portable_only = left_out


def sm90_refusal(shape: CallShape, call: CallParams) -> str | None:
    """Return why only the general kernels support a call, judging by its parameters and shapes, or None."""
    if _portable_only:
        return "the general kernels are to be used"
    if call.mask is not None:
        return "only the general kernels have array masks"
    if shape.value_dim != shape.head_dim:
        return "only the general kernels take values of another width than keys"
    return None


def candidates(shape: CallShape, call: CallParams) -> Iterator[KernelPath]:
    """Yield the paths that support a call, fastest first."""
    # the specialised kernels need tensor maps and serial numbers, which only the launcher provides
    if sm90_refusal(shape, call) is None and launcher.known_obstacle() is None:
        if shape.group * shape.queries <= MAX_ROWS and call.pattern is None:
            yield "decode"
        elif gpu().architecture == "sm_90a":
            yield "forward"
    yield "general"


def path_of(shape: CallShape, call: CallParams) -> tuple[KernelPath, list[str]]:
    """Return the path of a call according to the checks so far, and why faster paths are not trusted.

    Raises:
        KernelUnavailable: no path is trusted.
    """
    reasons: list[str] = []
    for path in candidates(shape, call):
        distrusted = selfcheck.distrust_reason(program_of(shape, call, path))
        if distrusted is None:
            return path, reasons
        reasons.append(f"{program_of(shape, call, path).name}: {distrusted}")
    raise KernelUnavailable("; ".join(reasons))


def program_of(shape: CallShape, call: CallParams, path: KernelPath) -> Program:
    """Return the program of the main kernel of a path."""
    match path:
        case "forward":
            return sm90_launch.forward_kernel(shape, call).program
        case "decode":
            return sm90_launch.make_key_split(shape, call).kernel.program
        case "general":
            return work_division(shape, call).kernel.program


def stages(shape: CallShape, call: CallParams, path: KernelPath, with_logsumexp: bool = True) -> list[Stage]:
    """Return the launches of a call on a path; the general kernel always writes the logsumexp."""
    match path:
        case "forward":
            return sm90_launch.forward_stages(shape, call, with_logsumexp)
        case "decode":
            return sm90_launch.decode_stages(shape, call, sm90_launch.make_key_split(shape, call), with_logsumexp)
        case "general":
            return portable_launch.stages(shape, call, work_division(shape, call))


def work_division(shape: CallShape, call: CallParams) -> WorkDivision:
    """Return the work division of the general kernel for a call on this machine."""
    return portable_launch.division(shape, call, launcher.known_obstacle() is not None)
