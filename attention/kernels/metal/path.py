"""The Metal kernels as a path of the engine: route, build and call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attention.core.errors import KernelUnavailable
from attention.core.route import Needs, Route, unsupported
from attention.kernels.metal.call import of_workload, refusal_of_workload, specialisation
from attention.kernels.metal.tiles import FLOAT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

    from attention.core.workload import Workload
    from attention.kernels.metal.call import CallParams, CallShape
    from attention.masks import Mask

TAKES: Final = frozenset({"pattern", "alibi", "logsumexp"})
"""What the kernels take beyond bounds, array masks and softcap."""
LISTED: Final = "; with block lists the keys of a few queries are not split among threadgroups"
UNKNOWN: Final = "how fast it is on a Mac was never measured by its authors; `demo` tries it beside MLX's own"


def route(workload: Workload, needs: Needs) -> Route:
    """Return the kernels' route, or an unsupported one with the reason; compiles nothing."""
    from attention.kernels.metal import trust as metal_trust

    refusal = refusal_of_workload(workload)
    if refusal:
        return unsupported(refusal)
    try:
        metal_trust.describe()
    except KernelUnavailable as unavailable:
        return unsupported(str(unavailable))
    shape, call = of_workload(workload, needs)
    special = specialisation("decode" if call.splits_keys(shape) else "forward", shape, call)
    distrusted = metal_trust.distrust_reason(special)
    if distrusted:
        return unsupported(f"the Metal kernel is not used, because of its check on first use: {distrusted}")
    state = "checked on this Mac" if metal_trust.is_trusted(special) else "compiled and checked at first use"
    reason = f"flash attention in Metal, {state}; {UNKNOWN}"
    if workload.pass_ == "training":
        reason += _of_gradients(shape, call)
    path = "Metal kernel, split K" if call.splits_keys(shape) else "Metal kernel"
    if call.lists:
        path, reason = "Metal kernel, lists", reason + LISTED if shape.few else reason
    return Route(path=path, fused=True, reason=reason, predicted_bytes=_predicted(workload, shape, call))


def is_built() -> bool:
    """Return whether no long compilation precedes a call: Metal compiles each kernel on first use, quickly."""
    return True


def build(on_message: Callable[[str], None]) -> None:
    """Check that there is a Metal GPU to compile for.

    Raises:
        KernelUnavailable: the reason, which routes report from then on.
    """
    from attention.kernels.metal import trust as metal_trust

    on_message(f"The Metal kernels are compiled and checked at the first call of each kind ({metal_trust.describe()})")


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    """Compute attention; shapes as in `Implementation.__call__`.

    Raises:
        KernelUnavailable: Metal cannot compile the kernel, or it disagrees with the reference.
    """
    return attend_with_sinks(q, k, v, scale=scale, mask=mask, softcap=softcap, sinks=None)


def attend_with_sinks(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None, sinks: mx.array | None
) -> mx.array:
    """Compute attention with `sinks` (H,): one extra logit per head in the softmax, without a value."""
    from attention.kernels import metal

    return metal.flash_attention(q, k, v, scale=scale, softcap=softcap, sinks=sinks, **_of_mask(mask))


def with_logsumexp(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """Compute attention as `attend`, and the logsumexp (B, H, Lq) in float32, -inf for fully masked rows."""
    from attention.kernels import metal

    return metal.flash_attention_with_logsumexp(q, k, v, scale=scale, softcap=softcap, **_of_mask(mask))


def _of_mask(mask: Mask) -> dict[str, Any]:
    return {
        "causal": mask.causal,
        "window": mask.window,
        "mask": mask.array,
        "pattern": mask.pattern,
        "alibi": mask.alibi,
    }


def _of_gradients(shape: CallShape, call: CallParams) -> str:
    from attention.kernels.metal.gradients import refusal

    gradient_refusal = refusal(shape, call)
    return f"; gradients go through the score matrix: {gradient_refusal}" if gradient_refusal else ""


def _predicted(workload: Workload, shape: CallShape, call: CallParams) -> int | None:
    """Return the bytes of outputs and logsumexp, of float32 parts if keys are split, and of delta in training."""
    from attention.kernels.metal.gradients import refusal
    from attention.kernels.metal.launch import key_split

    rows = shape.batch * shape.heads * shape.queries
    made = workload.output_bytes + FLOAT_BYTES * rows
    splits = key_split(shape, call)[0] if call.splits_keys(shape) else 1
    if splits > 1:
        made += FLOAT_BYTES * splits * rows * (shape.head_dim + 1)
    if workload.pass_ != "training":
        return made
    return None if refusal(shape, call) else made + FLOAT_BYTES * rows
