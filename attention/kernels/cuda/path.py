"""The CUDA kernels as a path of the engine: what they take, what they need, and the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attention.errors import KernelUnavailable
from attention.kernels import cuda
from attention.kernels.cuda import launcher
from attention.kernels.cuda.call import MAX_SOFTCAP
from attention.route import Needs, Route, unsupported
from attention.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

    from attention.masks import Mask

NAMES: Final = {
    "forward": "CUDA kernel, Hopper",
    "decode": "CUDA kernel, split K",
    "general": "CUDA kernel, general",
}


def route(workload: Workload, needs: Needs) -> Route:
    """The kernels' path, or a route that is not supported, with the reason; runs nothing."""
    refusal = cuda.supports(workload, needs)
    if refusal:
        return unsupported(refusal)
    from attention.kernels.cuda.choice import path_of
    from attention.kernels.cuda.machine import shape_and_call

    path, distrusted = path_of(*shape_and_call(workload, needs))
    reason = "fatui's own flash attention in CUDA C++; a kind of call compiles at its first use, in about a second"
    if distrusted:
        reason = f"{reason}; this one for any call, since the faster one is not used: {'; '.join(distrusted)}"
    obstacle = launcher.obstacle()
    behind = backward_refusal(workload, needs) if workload.pass_ == "training" else None
    if obstacle:
        reason = f"{reason}; launched kernel by kernel, since {obstacle}"
    if behind:
        reason = f"{reason}; gradients go through MLX's own path: {behind}"
    predicted = _predicted(workload, needs, behind)
    return Route(path=NAMES[path], fused=True, reason=reason, predicted_bytes=predicted)


def backward_refusal(workload: Workload, needs: Needs) -> str | None:
    """Why gradients of a workload that the kernels take go through MLX's own path, or None if ours make them."""
    from attention.kernels.cuda import pullback
    from attention.kernels.cuda.machine import shape_and_call

    return pullback.refusal(*shape_and_call(workload, needs))


def is_built() -> bool:
    """Whether a call would not have to compile the launcher first; a kernel takes a second, which does not count."""
    return launcher.is_settled()


def build(tell: Callable[[str], None]) -> None:
    """Compiles the launcher, and makes sure that kernels can be compiled.

    Raises:
        KernelUnavailable: with the reason; routes say it from then on.
    """
    cuda.load(tell)


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    """Attends; shapes as in the implementations' protocol.

    Raises:
        KernelUnavailable: it could not be compiled, does not agree with the reference, or the scale is not positive.
    """
    if not scale > 0:
        raise KernelUnavailable(f"the CUDA kernels take positive scales, not {scale}")
    if softcap is not None and softcap > MAX_SOFTCAP:
        raise KernelUnavailable(f"the CUDA kernels take a softcap of up to {MAX_SOFTCAP:g}, not {softcap:g}")
    return cuda.flash_attention(
        q, k, v, scale=scale, causal=mask.causal, window=mask.window, mask=mask.array, softcap=softcap
    )


def _predicted(workload: Workload, needs: Needs, backward_refusal: str | None) -> int | None:
    """Outputs and workspace; of a training pass also dQ in float32 and the rows' numbers, where our kernels make it."""
    from attention.kernels.cuda import pullback
    from attention.kernels.cuda.machine import shape_and_call, workspace_bytes

    forward = workspace_bytes(workload, needs)
    if workload.pass_ != "training":
        return workload.output_bytes + forward
    if backward_refusal:
        return None
    return workload.output_bytes + forward + pullback.scratch_bytes(*shape_and_call(workload, needs))
