"""The CPU kernel as a path of the engine: route, build and call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attention.core.kv_format import DENSE
from attention.core.route import MAX_PATH_LENGTH, Needs, Route, unsupported
from attention.core.workload import Workload
from attention.kernels import cpu
from attention.kernels.cpu.listing import block_list
from attention.measure.device import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

    from attention.masks import Mask
    from attention.quantized_kv import QuantizedArray

    Attend = Callable[..., mx.array]
    KV = mx.array | QuantizedArray

MAX_HEAD_DIM: Final = 512
"""Maximum supported head dim."""
THREAD_BYTES: Final = 4 * 2**20
"""Upper bound of a thread's tiles in bytes; the figure until the kernel is compiled (`Route.at_most`)."""
ROW_BYTES: Final = 16
"""Bytes kept per row for the backward pass besides the output: logsumexp, maximum with its remainder, and sum."""
MAX_ITEM_ROWS, TARGET_ITEMS = 256, 64
"""Maximum rows per work item, and desired number of items per call; as in schedule.hpp."""
VARIANTS: Final = ("tall",)
TAKES: Final = frozenset({"pattern", "alibi", "logsumexp", "quantized"})
"""What the kernel takes beyond bounds, array masks and softcap."""


def route(workload: Workload, needs: Needs) -> Route:
    """Return the kernel's route, or an unsupported one with the reason; compiles nothing."""
    width = max(workload.head_dim, workload.value_dim)
    if width > MAX_HEAD_DIM:
        return unsupported(f"the CPU kernel takes head dims to {MAX_HEAD_DIM}, not {width}")
    quantized = workload.kv_format != DENSE
    if quantized and workload.pass_ == "training":
        return unsupported("the CPU kernel has no gradients for quantized keys and values")
    parts = _parts(workload)
    usable, state = cpu.availability(parts)
    if not usable:
        return unsupported(f"no CPU kernel: {state}")
    loaded = cpu.load_compiled(parts)
    variant = cpu.variant()
    path = f"CPU kernel {variant}"
    kinds = ["lists"] if workload.structured else [workload.kv_format, "quant"] if quantized else []
    names = [f"{start} {variant}, {kind}" for kind in kinds for start in ("CPU kernel", "CPU")]
    path = next((name for name in names if len(name) <= MAX_PATH_LENGTH), path)
    when = "" if loaded else "; it is compiled at first use, which takes some seconds"
    lists = ", visiting the tiles of the mask's block lists" if workload.structured else ""
    packed = f", reading {workload.kv_format} packed, tile by tile" if quantized else ""
    reason = f"flash attention in C++, compiled for {variant}{packed}{lists}{when}"
    tiles = _tiles(workload) if loaded else THREAD_BYTES * usable_cores()
    return Route(
        path=path,
        fused=True,
        reason=reason,
        predicted_bytes=_outputs(workload) + tiles,
        at_most=not loaded,
        scratch_bytes=tiles,
    )


def _parts(workload: Workload) -> frozenset[str]:
    """Return the parts of the kernel that the workload's calls need."""
    training, quantized = workload.pass_ == "training", workload.kv_format != DENSE
    return cpu.parts(workload.dtype, workload.seq, training=training, quantized=quantized)


def is_built(workload: Workload) -> bool:
    """Return whether the workload's calls can run without compiling first."""
    return cpu.is_compiled(_parts(workload))


def build(workload: Workload, on_message: Callable[[str], None]) -> None:
    """Compile and self-check what the workload's calls need of the kernel, if it is missing on this machine.

    Raises:
        KernelUnavailable: the reason, which routes report from then on.
    """
    cpu.load(on_message, _parts(workload))


def attend(q: mx.array, k: KV, v: KV, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    """Compute attention; shapes as in `Implementation.__call__`. Keys and values may both be quantized.

    Raises:
        KernelUnavailable: the kernel cannot be compiled or loaded, or failed its self-check.
    """
    return cpu.flash_attention(q, k, v, scale=scale, softcap=softcap, **_mask_arguments(q, k, mask))


def with_logsumexp(
    q: mx.array, k: KV, v: KV, *, scale: float, mask: Mask, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """Compute attention as `attend`, and the logsumexp (B, H, Lq) in float32, -inf for fully masked rows."""
    arguments = _mask_arguments(q, k, mask)
    return cpu.flash_attention_with_logsumexp(q, k, v, scale=scale, softcap=softcap, **arguments)


def _mask_arguments(q: mx.array, k: KV, mask: Mask) -> dict[str, Any]:
    """Return the parts of a mask as keywords of the kernel; a pattern as its block lists."""
    lists = None
    if mask.pattern is not None:
        batch, heads, queries, _ = q.shape
        lists = block_list(mask.pattern, (batch, heads, queries, k.shape[2]), *cpu.LIST_TILE)
    return {
        "causal": mask.causal,
        "window": mask.window,
        "mask": mask.array,
        "lists": lists,
        "alibi": mask.alibi,
    }


def variants(workload: Workload) -> dict[str, Attend]:
    """Return the "tall" variant, with items of 256 rows, if the kernel's default uses fewer rows for more parallelism.

    Tall items read keys and values less often; bfloat16, with fewer bytes to read, gains nothing.
    """
    few = workload.batch * workload.heads * (workload.seq // MAX_ITEM_ROWS) < TARGET_ITEMS
    in_pairs = workload.dtype == "bfloat16" and workload.kv_format == DENSE
    return {"tall": _attend_tall} if few and workload.seq >= MAX_ITEM_ROWS and not in_pairs else {}


def _attend_tall(q: mx.array, k: KV, v: KV, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    return cpu.flash_attention(q, k, v, scale=scale, softcap=softcap, items=1, **_mask_arguments(q, k, mask))


def _outputs(workload: Workload) -> int:
    """Return the bytes of outputs and, in training, of rows' statistics."""
    rows = workload.batch * workload.heads * workload.seq
    return workload.output_bytes + (ROW_BYTES * rows if workload.pass_ == "training" else 0)


def _tiles(workload: Workload) -> int:
    """Return the bytes of all threads' tiles, of the loaded kernel."""
    import mlx.core as mx

    return cpu.workspace_bytes(
        (workload.batch, workload.heads, workload.seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.value_dim),
        dtype=getattr(mx, workload.dtype),
        training=workload.pass_ == "training",
        quantized=workload.kv_format != DENSE,
    )
