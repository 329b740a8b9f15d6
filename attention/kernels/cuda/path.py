"""The CUDA kernels as a code path of the engine: route, build and call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attention.core.errors import KernelUnavailable, UsageError
from attention.core.kv_format import DENSE
from attention.core.route import Needs, Route, unsupported
from attention.core.workload import Workload
from attention.kernels import cuda
from attention.kernels.cuda.runtime import launcher
from attention.kernels.cuda.runtime.call import MAX_SOFTCAP
from attention.quantized_kv import KeyOrValue, QuantizedArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import mlx.core as mx

    from attention.kernels.cuda.choice import KernelPath
    from attention.kernels.cuda.packed_choice import PackedPath
    from attention.masks import Mask

NAMES: Final = {
    "forward": "CUDA kernel, Hopper",
    "decode": "CUDA kernel, split K",
    "general": "CUDA kernel, general",
    "packed": "CUDA, quantized K/V",
}


TAKES: Final = frozenset({"pattern", "alibi", "logsumexp", "quantized"})


def route(workload: Workload, needs: Needs) -> Route:
    """Return the route of a workload through the kernels, or an unsupported route with the reason; runs nothing."""
    from attention.kernels.cuda.requirements import path_here

    try:
        path, distrusted = path_here(workload, needs)
    except KernelUnavailable as unavailable:
        return unsupported(str(unavailable))
    if workload.kv_format != DENSE:
        return _packed_route(workload, needs, path, distrusted)
    if needs.sinks:
        return unsupported("the CUDA kernels take attention sinks with quantized keys and values only")
    reason = "flash attention in CUDA C++; a kind of call compiles at its first use, in about a second"
    if distrusted:
        reason = f"{reason}; this one for any call, since the faster one is not used: {'; '.join(distrusted)}"
    obstacle = launcher.known_obstacle()
    gradient_refusal = backward_refusal(workload, needs) if workload.pass_ == "training" else None
    if obstacle:
        reason = f"{reason}; launched kernel by kernel, since {obstacle}"
    if gradient_refusal:
        reason = f"{reason}; gradients go through MLX's own path: {gradient_refusal}"
    predicted = _predicted(workload, needs, path, gradient_refusal)
    return Route(path=NAMES[path], fused=True, reason=reason, predicted_bytes=predicted)


PACKED_KERNELS: Final = {
    "decode": "unpacks {} in registers",
    "workspace": "reads a workspace to which {} is dequantized, some heads at a time",
    "general": "dequantizes {} in shared memory",
}
"""What the kernels do with quantized keys and values, by their path."""


def _packed_route(workload: Workload, needs: Needs, path: KernelPath | PackedPath, distrusted: list[str]) -> Route:
    """Return the route of a supported workload with quantized keys and values on a path."""
    from attention.kernels.cuda.requirements import workspace_bytes

    reason = (
        f"flash attention in CUDA C++ that {PACKED_KERNELS[path].format(workload.kv_format)}; a kind of call compiles "
        "at its first use, in about a second"
    )
    if distrusted:
        reason = f"{reason}; a faster one is not used: {'; '.join(distrusted)}"
    predicted = workload.output_bytes + workspace_bytes(workload, path, needs)
    return Route(path=NAMES["packed"], fused=True, reason=reason, predicted_bytes=predicted)


def backward_refusal(workload: Workload, needs: Needs) -> str | None:
    """Return why the gradients of a supported workload fall back to MLX, or None if the kernels compute them."""
    from attention.kernels.cuda import gradients
    from attention.kernels.cuda.requirements import shape_and_call

    return gradients.refusal(*shape_and_call(workload, needs))


def is_built(workload: Workload) -> bool:
    """Return whether the launcher is already compiled; kernels (about a second each) are not considered."""
    return launcher.is_settled()


def build(workload: Workload, on_message: Callable[[str], None]) -> None:
    """Compile the launcher and check that kernels can be compiled; `on_message` is called with progress messages.

    Raises:
        KernelUnavailable: compilation is not possible; later routes report the reason.
    """
    cuda.load(on_message)


def attend(q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    """Compute attention. Shapes: see `Implementation.__call__`. Keys and values may be quantized, both.

    Raises:
        KernelUnavailable: the kernel cannot be compiled, fails its self-check, or does not take the scale, softcap or
            mask.
    """
    if isinstance(k, QuantizedArray) or isinstance(v, QuantizedArray):
        return _attend_packed(q, k, v, scale, mask, softcap, logsumexp=False)[0]
    return cuda.flash_attention(q, k, v, scale=scale, softcap=softcap, **_checked(scale, mask, softcap))


def with_logsumexp(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """Compute attention as `attend`, and the logsumexp (B, H, Lq) in float32, -inf for fully masked rows."""
    if isinstance(k, QuantizedArray) or isinstance(v, QuantizedArray):
        output, logsumexp = _attend_packed(q, k, v, scale, mask, softcap, logsumexp=True)
        return output, logsumexp
    return cuda.flash_attention_with_logsumexp(q, k, v, scale=scale, softcap=softcap, **_checked(scale, mask, softcap))


def attend_with_sinks(
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """Compute attention to quantized keys and values with `sinks` (H,): one extra logit per head, without a value.

    The softmax with it is the one without times sigmoid(logsumexp - sink).
    """
    import mlx.core as mx

    if sinks is None:
        return attend(q, k, v, scale=scale, mask=mask, softcap=softcap)
    output, logsumexp = with_logsumexp(q, k, v, scale=scale, mask=mask, softcap=softcap)
    share = mx.sigmoid(logsumexp - sinks.astype(mx.float32)[:, None])
    return (output * share[..., None]).astype(output.dtype)


def _attend_packed(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, scale: float, mask: Mask, softcap: float | None, logsumexp: bool
) -> Sequence[mx.array]:
    if not (isinstance(k, QuantizedArray) and isinstance(v, QuantizedArray)):
        raise UsageError("k, v: got one quantized and one not; both are, or neither")
    keywords = _checked(scale, mask, softcap)
    return cuda.flash_attention_quantized(q, k, v, scale=scale, softcap=softcap, logsumexp=logsumexp, **keywords)


def _checked(scale: float, mask: Mask, softcap: float | None) -> dict[str, Any]:
    """Return the keywords of the mask, or raise KernelUnavailable if the kernels do not take the call."""
    if not scale > 0:
        raise KernelUnavailable(f"the CUDA kernels take positive scales, not {scale}")
    if softcap is not None and softcap > MAX_SOFTCAP:
        raise KernelUnavailable(f"the CUDA kernels take a softcap of up to {MAX_SOFTCAP:g}, not {softcap:g}")
    return {
        "causal": mask.causal,
        "window": mask.window,
        "mask": mask.array,
        "pattern": mask.pattern,
        "alibi": mask.alibi,
    }


def _predicted(
    workload: Workload, needs: Needs, path: KernelPath | PackedPath, backward_refusal: str | None
) -> int | None:
    """Return the bytes of outputs and workspace; None for a training pass whose gradients fall back to MLX."""
    from attention.kernels.cuda import gradients
    from attention.kernels.cuda.requirements import shape_and_call, workspace_bytes

    forward = workspace_bytes(workload, path, needs)
    if workload.pass_ != "training":
        return workload.output_bytes + forward
    if backward_refusal:
        return None
    return workload.output_bytes + forward + gradients.scratch_bytes(*shape_and_call(workload, needs))
