"""Kernel selection for quantized keys and values.

Few queries take the split-K kernel. For many, some heads at a time are dequantized to a workspace, which a dense kernel
reads. The general kernel, which dequantizes in shared memory, takes what is left.
"""

from collections.abc import Iterator
from typing import Literal

from attention.core.errors import KernelUnavailable
from attention.kernels.cuda import choice
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.quantized import forward_launch, launch
from attention.kernels.cuda.quantized.decode import MAX_ROWS
from attention.kernels.cuda.quantized.formats import PackedKV
from attention.kernels.cuda.quantized.forward import QuantizedGeneral
from attention.kernels.cuda.quantized.forward_launch import divided_heads, shape_of
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import Stage
from attention.kernels.cuda.runtime.program import Program
from attention.kernels.cuda.sm90.launch import same_kernel

PackedPath = Literal["decode", "workspace", "general"]


def candidates(shape: CallShape, call: CallParams) -> Iterator[PackedPath]:
    """Yield the paths that take a call, fastest first."""
    if launch.refusal(shape, call) is None:
        yield "decode"
    elif shape.group * shape.queries > MAX_ROWS:
        fits = forward_launch.head_bytes(shape) <= forward_launch.MAX_HEAD
        if fits and (call.pattern is None or len(divided_heads(shape)) == 1):  # lists are those of all heads
            yield "workspace"
    yield "general"


def workspace_parts(shape: CallShape) -> set[CallShape]:
    """Return the shapes of the dense calls that read the workspace, of which there may be two."""
    return {shape_of(shape, own) for own in divided_heads(shape)}


def path_of(shape: CallShape, call: CallParams, packed: PackedKV) -> tuple[PackedPath, list[str]]:
    """Return the path of a call according to the checks so far, and why faster paths are not trusted.

    Raises:
        KernelUnavailable: no path is trusted.
    """
    reasons: list[str] = []
    for path in candidates(shape, call):
        program = program_of(shape, call, packed, path)
        distrusted = selfcheck.distrust_reason(program)
        if distrusted is None and path == "workspace":
            try:
                for part in workspace_parts(shape):
                    choice.path_of(part, call)
            except KernelUnavailable as unavailable:
                distrusted = str(unavailable)
        if distrusted is None:
            return path, reasons
        reasons.append(f"{program.name}: {distrusted}")
    raise KernelUnavailable("; ".join(reasons))


def program_of(shape: CallShape, call: CallParams, packed: PackedKV, path: PackedPath) -> Program:
    """Return the program of a path that reads quantized keys and values."""
    match path:
        case "decode":
            return launch.make_key_split(shape, call, packed).kernel.program
        case "workspace":
            return forward_launch.dequantize_program(shape, packed).program
        case "general":
            return QuantizedGeneral(forward_launch.division(shape, call).kernel, packed).program


def stages(
    shape: CallShape, call: CallParams, packed: PackedKV, path: PackedPath, with_logsumexp: bool = True
) -> list[Stage]:
    """Return the launches of a call on a path."""
    match path:
        case "decode":
            return launch.stages(shape, call, packed, with_logsumexp)
        case "workspace":
            return _workspace_stages(shape, call, packed, forward_launch.MAX_WORKSPACE, with_logsumexp)
        case "general":
            return forward_launch.general_stages(shape, call, packed, forward_launch.division(shape, call))


def check_stages(
    shape: CallShape, call: CallParams, packed: PackedKV, path: PackedPath, small: CallShape, tried: CallParams
) -> list[Stage]:
    """Return the launches of a call's kernel on inputs of a small shape; a workspace holds one head, if it can."""
    match path:
        case "decode":
            own, other = (launch.make_key_split(*each, packed) for each in ((shape, call), (small, tried)))
            return launch.stages(small, tried, packed, plan=same_kernel(own, other, small.keys))
        case "workspace":
            return _workspace_stages(small, tried, packed, 1 if call.pattern is None else forward_launch.MAX_WORKSPACE)
        case "general":
            divided = portable_launch.same_kernel(forward_launch.division(shape, call), small, tried)
            return forward_launch.general_stages(small, tried, packed, divided)


def _workspace_stages(
    shape: CallShape, call: CallParams, packed: PackedKV, limit: int, with_logsumexp: bool = True
) -> list[Stage]:
    def dense(part: CallShape) -> list[Stage]:
        return choice.stages(part, call, choice.path_of(part, call)[0], with_logsumexp)

    return forward_launch.workspace_stages(shape, packed, dense, divided_heads(shape, limit))
