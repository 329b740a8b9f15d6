"""The attention engine: implementations, kernels, and an honest way of measuring them.

Importing this imports neither MLX nor numpy; a call does.
"""

from typing import TYPE_CHECKING

from attention.errors import ForkedError, NoBackendError, UnsupportedError, UsageError
from attention.workload import Workload

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.implementations.protocol import Implementation
    from attention.monitoring import Monitor
    from attention.patch.model_patch import ModelPatch

__all__ = [
    "ForkedError",
    "NoBackendError",
    "UnsupportedError",
    "UsageError",
    "Workload",
    "attention",
    "monitor",
    "patch_mlx_lm",
]


def attention(
    q: "mx.array",
    k: "mx.array",
    v: "mx.array",
    *,
    scale: float | None = None,
    mask: "str | mx.array | None" = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: "str | Implementation" = "practical",
) -> "mx.array":
    """Attends: softmax(mask(softcap(scale q k^T))) v.

    Args:
        q: query (B, H, Lq, D), in float32, float16 or bfloat16.
        k: key (B, Hkv, Lk, D), Hkv a divisor of H.
        v: value (B, Hkv, Lk, Dv).
        scale: factor of the scores; 1 / sqrt(D) unless given.
        mask: None, "causal" (lower-right aligned), or an array that broadcasts to (B, H, Lq, Lk): bool, True where a
            pair may be seen, or numbers to add to the scores. An array of numbers gets its gradient.
        window: a query sees only the last `window` keys that end at its own position; implies causal.
        softcap: squashes scaled scores s to softcap * tanh(s / softcap), before the mask.
        implementation: a name from `attention.implementations.NAMES`, "FILE.py:CLASS", or an implementation.

    Returns:
        (B, H, Lq, Dv) in the query's type; rows that may see nothing are 0.

    Raises:
        UsageError: an argument is wrong; it says which, what it got and what it takes, one line each.
        UnsupportedError: the implementation does not take this, as its route says.
        NoBackendError: MLX cannot be imported.
        ForkedError: attention was computed before this process was forked; MLX would hang.
    """
    from attention import watching
    from attention.arguments import checked_mask, checked_numbers, checked_shapes, find

    chosen = find(implementation)
    checked_shapes(q, k, v)
    factor, cap = checked_numbers(scale, softcap, q.shape[-1])
    return watching.call(chosen, q, k, v, scale=factor, mask=checked_mask(mask, window, q, k), softcap=cap)


def patch_mlx_lm(implementation: "str | Implementation" = "practical") -> "ModelPatch":
    """Replaces attention in every model of mlx-lm, loaded or yet to be, while the context is open.

    A context manager and a decorator. Entering gives an object that counts: `calls_taken` and `taken` by path,
    `calls_handed` and `handed` by the reason why the calls went to MLX's own, `summary()` in words.
    What `mx.compile` traces meanwhile stays as it was traced.

    Args:
        implementation: a name from `attention.implementations.NAMES`, "FILE.py:CLASS", or an implementation.

    Raises:
        UsageError: there is no such implementation; on entering, mlx-lm is not installed.
        NoBackendError: MLX cannot be imported.
    """
    from attention.patch.model_patch import ModelPatch

    return ModelPatch(implementation)


def monitor(share: float = 0.01) -> "Monitor":
    """Watches attention in a program while the context is open: calls, shapes, paths, time and memory.

    Afterwards `summary()` says it in lines, `report()` in the rows of `fatui bench`, and `save(FILE)` keeps these for
    `fatui history add FILE`.

    Args:
        share: share of the program's time that watching may take; it bounds how many calls are timed.
    """
    from attention.monitoring import Monitor

    return Monitor(share)
