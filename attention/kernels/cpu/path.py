"""The CPU kernel as a path of the engine: what it takes, what it needs, and the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attention.device import usable_cores
from attention.kernels import cpu
from attention.route import Needs, Route, unsupported
from attention.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

    from attention.masks import Mask

    Attend = Callable[..., mx.array]

WIDEST: Final = 512
"""Head dims beyond this are not taken."""
THREAD_BYTES: Final = 4 * 2**20
"""What a thread's tiles take at the most; said in place of the exact figure until the kernel is compiled."""
ROW_BYTES: Final = 12
"""What training keeps of a row besides the output: logsumexp, reference and sum."""
TALLEST, ITEMS = 256, 64
"""Most rows of an item, and items that the kernel wants of a call, as schedule.hpp has them."""
VARIANTS: Final = ("tall",)


def route(workload: Workload, needs: Needs) -> Route:
    """The kernel's path, or a route that is not supported, with the reason; compiles nothing."""
    width = max(workload.head_dim, workload.value_dim)
    if width > WIDEST:
        return unsupported(f"the CPU kernel takes head dims to {WIDEST}, not {width}")
    usable, state = cpu.availability()
    if not usable:
        return unsupported(f"no CPU kernel: {state}")
    variant = cpu.variant()
    when = "" if cpu.is_compiled() else "; it is compiled at first use, which takes about half a minute"
    reason = f"fatui's own flash attention in C++, for this processor's {variant}{when}"
    return Route(
        path=f"CPU kernel {variant}",
        fused=True,
        reason=reason,
        predicted_bytes=_predicted(workload),
        scratch_bytes=_tiles(workload, workload.pass_ == "training"),
    )


def is_built() -> bool:
    """Whether a call would not have to compile first."""
    return cpu.is_compiled()


def build(tell: Callable[[str], None]) -> None:
    """Compiles and checks the kernel if this machine has none yet.

    Raises:
        KernelUnavailable: with the reason; routes say it from then on.
    """
    cpu.load(tell)


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    """Attends; shapes as in the implementations' protocol.

    Raises:
        KernelUnavailable: it could not be compiled, loaded, or does not agree with the reference.
    """
    return cpu.flash_attention(
        q, k, v, scale=scale, causal=mask.causal, window=mask.window, mask=mask.array, softcap=softcap
    )


def variants(workload: Workload) -> dict[str, Attend]:
    """Items of 256 rows, "tall", where the kernel would take fewer to have work for many threads.

    They read keys and values less often; bfloat16, which has fewer of them to read, gains nothing by it.
    """
    few = workload.batch * workload.heads * (workload.seq // TALLEST) < ITEMS
    return {"tall": _tall} if few and workload.seq >= TALLEST and workload.dtype != "bfloat16" else {}


def _tall(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None) -> mx.array:
    return cpu.flash_attention(
        q, k, v, scale=scale, causal=mask.causal, window=mask.window, mask=mask.array, softcap=softcap, items=1
    )


def _predicted(workload: Workload) -> int:
    """Outputs, what training keeps of each row, and the tiles."""
    training = workload.pass_ == "training"
    rows = workload.batch * workload.heads * workload.seq
    return workload.output_bytes + (ROW_BYTES * rows if training else 0) + _tiles(workload, training)


def _tiles(workload: Workload, training: bool) -> int:
    if not cpu.is_loaded():
        return THREAD_BYTES * usable_cores()
    import mlx.core as mx

    return cpu.workspace_bytes(
        (workload.batch, workload.heads, workload.seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.value_dim),
        dtype=getattr(mx, workload.dtype),
        training=training,
    )
