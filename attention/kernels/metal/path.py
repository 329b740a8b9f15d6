"""The Metal kernels as a path of the engine: route, build and call, and the results of their self-checks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from attention.core.errors import KernelUnavailable
from attention.core.kv_format import Format, KVFormat
from attention.core.route import MAX_PATH_LENGTH, Needs, Route, unsupported
from attention.kernels.common.first_use import PASSED, headline
from attention.kernels.metal.call import (
    FEW_ROWS,
    CallParams,
    CallShape,
    of_workload,
    refusal_of_workload,
    specialisation,
)
from attention.kernels.metal.tiles import FLOAT_BYTES, HEAD_DIMS, SIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import mlx.core as mx

    from attention.core.workload import Workload
    from attention.kernels.metal.tiles import Kind
    from attention.masks import Mask
    from attention.quantized_kv import KeyOrValue

TAKES: Final = frozenset({"pattern", "alibi", "logsumexp", "quantized"})
"""What the kernels take beyond bounds, array masks and softcap."""
CHECKED_FORMAT: Final = KVFormat(Format("affine", 4, 32), Format("mxfp8", 8, 32))
"""Quantized keys and values of the checks of all kernels."""
LISTED: Final = "; with block lists the keys of a few queries are not split among threadgroups"
UNKNOWN: Final = "how fast it is on a Mac was never measured by its authors; `demo` tries it beside MLX's own"
UNMEASURED: Final = (
    "Never measured by the authors, who had no Mac: speed, registers and occupancy. "
    "The texts were run and checked on an emulator of Metal's language, not through Apple's compiler."
)


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
    how = "lists" if call.lists else "split K" if call.splits_keys(shape) else ""
    if call.lists and shape.few:
        reason += LISTED
    if workload.quantized:
        reason += f"; {workload.kv_format} is read packed, tile by tile"
    path = _path(how, workload.kv_format if workload.quantized else "")
    return Route(path=path, fused=True, reason=reason, predicted_bytes=_predicted(workload, shape, call))


def _path(how: str, kv_format: str) -> str:
    """Return the path's name, with the format of keys and values as far as its column has room."""
    if not kv_format:
        return f"Metal kernel, {how}" if how else "Metal kernel"
    starts = [f"{name}, {how}" if how else name for name in ("Metal kernel", "Metal")]
    names = [f"{start}, {kind}" for kind in (kv_format, "quant") for start in starts]
    return next(name for name in names if len(name) <= MAX_PATH_LENGTH)


def is_built(workload: Workload) -> bool:
    """Return whether no long compilation precedes a call: Metal compiles each kernel on first use, quickly."""
    return True


def build(workload: Workload, on_message: Callable[[str], None]) -> None:
    """Check that there is a Metal GPU to compile for.

    Raises:
        KernelUnavailable: the reason, which routes report from then on.
    """
    from attention.kernels.metal import trust as metal_trust

    on_message(f"The Metal kernels are compiled and checked at the first call of each kind ({metal_trust.describe()})")


def attend(q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    """Compute attention; shapes as in `Implementation.__call__`. Keys and values may both be quantized.

    Raises:
        KernelUnavailable: Metal cannot compile the kernel, or it disagrees with the reference.
    """
    return attend_with_sinks(q, k, v, scale=scale, mask=mask, softcap=softcap, sinks=None)


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
    """Compute attention with `sinks` (H,): one extra logit per head in the softmax, without a value."""
    from attention.kernels import metal

    return metal.flash_attention(q, k, v, scale=scale, softcap=softcap, sinks=sinks, **_of_mask(mask))


def with_logsumexp(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None
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


@dataclass(frozen=True)
class CheckResult:
    """The result of one specialisation's self-check."""

    name: str
    text: str
    """ "passed", or the whole error, as far as `first_use` stores it."""
    machine: str
    """GPU, macOS and MLX version that it is valid for."""

    @property
    def passed(self) -> bool:
        """Whether the kernel is used."""
        return self.text == PASSED


def known_results() -> list[CheckResult]:
    """Return all self-check results stored in this cache folder, by name."""
    from attention.kernels.common import cache
    from attention.kernels.metal import trust as metal_trust

    made = [
        CheckResult(str(record.get("name")), str(text), where)
        for record in cache.records(metal_trust.PREFIX)
        for where, text in record.get("checked", {}).items()
    ]
    return sorted(made, key=lambda verdict: (verdict.machine, verdict.name))


def summary() -> tuple[str, str | None]:
    """Return the state of the self-checks on this machine in a line, and the error of the first that failed."""
    from attention.kernels.metal import trust as metal_trust

    here = [verdict for verdict in known_results() if verdict.machine == metal_trust.machine_fingerprint()]
    failed = [verdict for verdict in here if not verdict.passed]
    if not here:
        return f"no kernel has been used yet, so none has been checked. {UNMEASURED}", None
    text = f"{len(here) - len(failed)} of {len(here)} kernels checked on this Mac agree with float64. {UNMEASURED}"
    return text, f"{failed[0].name}: {headline(failed[0].text)}" if failed else None


def check_all() -> Iterator[str]:
    """Self-check the kernels of every head dim and dtype, causal, with block lists, and quantized; yields names first.

    Raises:
        KernelUnavailable: there is no Metal device.
    """
    from attention.kernels.metal import attend, gradients
    from attention.kernels.metal import trust as metal_trust

    metal_trust.describe()

    for dtype in SIZES:
        for head_dim in HEAD_DIMS:
            many = CallShape(1, 4, 2, FEW_ROWS + 1, 83, head_dim, dtype)
            few = CallShape(1, 4, 2, 1, 83, head_dim, dtype)
            causal, listed = CallParams(head_dim**-0.5, causal=True), CallParams(head_dim**-0.5, lists=True)
            checks: list[tuple[Kind, CallShape, CallParams, Callable[[CallShape, CallParams], None]]] = [
                ("forward", many, causal, attend.check),
                ("decode", few, causal, attend.check),
                ("backward_key", many, causal, gradients.check),
                ("forward", many, listed, attend.check),
                ("backward_key", many, listed, gradients.check),
            ]
            if head_dim % CHECKED_FORMAT.key.group_size == 0:
                form = CHECKED_FORMAT
                checks.append(("forward", replace(many, kv_format=form), causal, attend.check))
                checks.append(("decode", replace(few, kv_format=form), causal, attend.check))
            for kind, shape, call, check in checks:
                yield specialisation(kind, shape, call).name
                with suppress(KernelUnavailable):  # stored with its reason, like one that passes
                    check(shape, call)
