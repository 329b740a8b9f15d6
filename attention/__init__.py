"""The attention engine: implementations, kernels, and benchmarking.

Importing this package imports neither MLX nor numpy, nor anything else that takes long; the first call does.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final, Literal, cast, overload

from attention.core.errors import ForkedError, NoBackendError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import mlx.core as mx

    from attention import distributed, masks
    from attention.core.workload import Workload
    from attention.distributed.layout import Kind, Layout
    from attention.engine.library import abench, bench, benchmark
    from attention.implementations.protocol import Implementation
    from attention.masks import Alibi, Pattern
    from attention.mlx_lm.patch import ModelPatch
    from attention.mlx_lm.sharded import ShardedPatch
    from attention.monitoring.monitor import Monitor
    from attention.quantized_kv import QuantizedArray, quantized
    from attention.streaming import Rope, StreamingKV

__all__ = [
    "ForkedError",
    "NoBackendError",
    "QuantizedArray",
    "Rope",
    "StreamingKV",
    "UnsupportedError",
    "UsageError",
    "Workload",
    "abench",
    "attention",
    "bench",
    "benchmark",
    "distributed",
    "masks",
    "monitor",
    "patch_mlx_lm",
    "quantized",
]

_HOMES: Final = {
    "QuantizedArray": "attention.quantized_kv",
    "quantized": "attention.quantized_kv",
    "Rope": "attention.streaming",
    "StreamingKV": "attention.streaming",
    "Workload": "attention.core.workload",
    "abench": "attention.engine.library",
    "bench": "attention.engine.library",
    "benchmark": "attention.engine.library",
}
_MODULES: Final = ("distributed", "masks")
"""Modules that are attributes of the package before anything imports them."""


def __getattr__(name: str) -> Any:
    """Import what takes long to import when it is first used."""
    if name not in _HOMES and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return _imported(f"{__name__}.{name}")
    globals()[name] = getattr(_imported(_HOMES[name]), name)
    return globals()[name]


def _imported(module: str) -> Any:
    """Import a module that imports MLX.

    Raises:
        NoBackendError: MLX cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if "mlx" not in f"{error.name} {error.path}":
            raise  # a file beside the script that hides one of Python's modules, for example
        raise NoBackendError(f"MLX cannot be imported: {error}") from error


def __dir__() -> list[str]:
    """Return all names, also those that are imported when they are first used."""
    return sorted({*globals(), *__all__})


@overload
def attention(
    q: "mx.array",
    k: "mx.array | QuantizedArray | StreamingKV",
    v: "mx.array | QuantizedArray | StreamingKV",
    *,
    scale: float | None = None,
    mask: "str | Pattern | mx.array | None" = None,
    window: int | None = None,
    softcap: float | None = None,
    score_mod: "Alibi | None" = None,
    max_error: float | None = None,
    return_lse: Literal[False] = False,
    implementation: "str | Implementation" = "practical",
    group: "mx.distributed.Group | None" = None,
    layout: "Layout | Kind" = "zigzag",
    key_layout: "Layout | None" = None,
) -> "mx.array": ...


@overload
def attention(
    q: "mx.array",
    k: "mx.array | QuantizedArray | StreamingKV",
    v: "mx.array | QuantizedArray | StreamingKV",
    *,
    scale: float | None = None,
    mask: "str | Pattern | mx.array | None" = None,
    window: int | None = None,
    softcap: float | None = None,
    score_mod: "Alibi | None" = None,
    max_error: float | None = None,
    return_lse: Literal[True],
    implementation: "str | Implementation" = "practical",
    group: "mx.distributed.Group | None" = None,
    layout: "Layout | Kind" = "zigzag",
    key_layout: "Layout | None" = None,
) -> "tuple[mx.array, mx.array]": ...


def attention(
    q: "mx.array",
    k: "mx.array | QuantizedArray | StreamingKV",
    v: "mx.array | QuantizedArray | StreamingKV",
    *,
    scale: float | None = None,
    mask: "str | Pattern | mx.array | None" = None,
    window: int | None = None,
    softcap: float | None = None,
    score_mod: "Alibi | None" = None,
    max_error: float | None = None,
    return_lse: bool = False,
    implementation: "str | Implementation" = "practical",
    group: "mx.distributed.Group | None" = None,
    layout: "Layout | Kind" = "zigzag",
    key_layout: "Layout | None" = None,
) -> "mx.array | tuple[mx.array, mx.array]":
    """Compute softmax(mask(softcap(scale q k^T))) v.

    Args:
        q: query (B, H, Lq, D), in float32, float16 or bfloat16.
        k: key (B, Hkv, Lk, D), Hkv a divisor of H.
        v: value (B, Hkv, Lk, Dv). Both may be quantized, each in a format of its own: `quantized(k, "int8")`.
            docs/quantized.md says which implementations take them, and how they read them. Or both are the state of a
            sequence without an end, with its new tokens: `attention(q, *state.update(k, v))` (docs/streaming.md).
        scale: factor of the scores; 1 / sqrt(D) by default.
        mask: None; "causal" (lower-right aligned); a mask of `attention.masks`, as
            `causal() & documents([512, 1536]) | prefix(4)`; or an array that broadcasts to (B, H, Lq, Lk): bool, True
            where a query attends to a key, or numbers added to the scores. An additive mask is differentiable.
        window: each query attends to the last `window` keys up to its own position; implies causal.
        softcap: replaces scaled scores s by softcap * tanh(s / softcap), before the mask.
        score_mod: a bias of the scores, added after the softcap: `attention.masks.alibi(slopes)`.
        max_error: the largest relative error for which approximate arithmetic is acceptable: the root mean square
            difference of the output from attention in float64, over the root mean square of the latter. It is measured
            on rows of these inputs in the first call of their kind, and in the 2nd, 4th, 8th and so on. With it `demo`
            also tries `poc-fp8`, and goes back to the exact ones if its error exceeds the budget; `poc-fp8` itself
            raises UnsupportedError then. None: no error beyond rounding. The other implementations ignore it.
        return_lse: return the logsumexp of each row's scores too.
        implementation: a name from `attention.implementations.NAMES`, "FILE.py:CLASS", or an implementation.
        group: ranks over which the sequence is sharded; q, k and v are this rank's part, as `distributed.shard` gives
            it, the mask is the whole sequence's, and the output is that of this rank's rows. See docs/distributed.md.
        layout: with a group, the rows' layout: from `distributed.shard`, or its name if all ranks have as many rows.
        key_layout: with a group, the layout of the keys, if it is not that of the rows.

    Returns:
        (B, H, Lq, Dv) in the query's dtype; fully masked rows are 0. With `return_lse` a pair: that array, and the
        natural logarithm of the sum of the exponentials of each row's scores, (B, H, Lq) in float32, differentiable;
        -inf for fully masked rows.

    Raises:
        UsageError: invalid arguments; one line each with the name, the value and what is accepted.
        UnsupportedError: the implementation does not support this call; the message is its route's reason.
        NoBackendError: MLX cannot be imported.
        ForkedError: attention was computed before this process was forked; MLX would hang.
    """
    if group is not None:
        from attention import distributed

        if max_error is not None:
            raise UsageError(f"max_error: got {max_error!r}; with a group it takes None")
        of_ranks: mx.array | tuple[mx.array, mx.array] = distributed.attention(
            q,
            k,
            v,
            group=group,
            layout=layout,
            key_layout=key_layout,
            scale=scale,
            mask=mask,
            window=window,
            softcap=softcap,
            score_mod=score_mod,
            return_lse=return_lse,
            implementation=implementation,
        )
        return of_ranks
    from attention.arguments import (
        check_mask,
        check_max_error,
        check_score_mod,
        check_shapes,
        check_streaming,
        check_support,
        find_implementation,
        is_streaming,
    )
    from attention.core.numbers import check_flag, check_numbers

    check_flag("return_lse", return_lse)
    if key_layout is not None or not isinstance(layout, str):
        from attention.distributed.layout import check_is_whole

        check_is_whole(layout, key_layout)
    chosen = find_implementation(implementation)
    from attention.implementations.calls import (  # imports MLX, which the line above checks
        call_through_hooks,
        with_logsumexp,
    )

    if k is v and is_streaming(k):
        check_streaming(mask, window, score_mod, max_error, return_lse, q)
        return k.attend_pending(q, chosen, *check_numbers(scale, softcap, q.shape[-1]))
    packed = check_shapes(q, k, v)
    k, v = cast("mx.array | QuantizedArray", k), cast("mx.array | QuantizedArray", v)
    factor, cap = check_numbers(scale, softcap, q.shape[-1])
    found = check_score_mod(score_mod, check_mask(mask, window, q, k), q.shape[1])
    if found.pattern is not None or found.alibi is not None or return_lse or packed:
        check_support(chosen, found, return_lse, packed)
    called = with_logsumexp(chosen) if return_lse else chosen
    budget = {} if max_error is None else check_max_error(max_error, chosen, return_lse)
    made: mx.array | tuple[mx.array, mx.array] = call_through_hooks(
        called, q, k, v, scale=factor, mask=found, softcap=cap, **budget
    )
    return made


@overload
def patch_mlx_lm(implementation: "str | Implementation" = "practical", *, group: None = None) -> "ModelPatch": ...


@overload
def patch_mlx_lm(
    implementation: "str | Implementation" = "practical", *, group: "mx.distributed.Group"
) -> "ShardedPatch": ...


def patch_mlx_lm(
    implementation: "str | Implementation" = "practical", *, group: "mx.distributed.Group | None" = None
) -> "ModelPatch":
    """Replace attention in every mlx-lm model, loaded now or later, while the context is open.

    A context manager and a decorator. Entering it returns an object with counters: `calls_taken` and `taken` (by path),
    `calls_handed` and `handed` (calls passed to MLX's own function, by reason), and `summary()` as text. Quantized
    keys and values that neither the implementation nor mlx-lm supports are among these, and go to `practical`.
    Functions traced by `mx.compile` in the meantime keep what was traced.

    Args:
        implementation: a name from `attention.implementations.NAMES`, "FILE.py:CLASS", or an implementation.
        group: ranks that share each sequence: run `patch.sharded(model)` instead of the model, and train with
            `patch.sequence_loss` and `patch.whole_batches` (docs/distributed.md).

    Raises:
        UsageError: there is no such implementation; on entering, mlx-lm is not installed.
        NoBackendError: MLX cannot be imported.
    """
    if group is not None:
        sharded: ShardedPatch = _imported("attention.mlx_lm.sharded").ShardedPatch(implementation, group)
        return sharded
    patch: ModelPatch = _imported("attention.mlx_lm.patch").ModelPatch(implementation)
    return patch


def monitor(share: float = 0.01) -> "Monitor":
    """Record the attention calls of a program while the context is open: counts, shapes, paths, time and memory.

    Afterwards `summary()` returns lines of text, `report()` a report in the format of a benchmark, and `save(FILE)`
    writes that report as JSON.

    Args:
        share: share of the program's run time that monitoring may take; it bounds how many calls are timed.

    Raises:
        UsageError: the share is no number from 0 on.
        NoBackendError: MLX cannot be imported.
    """
    made: Monitor = _imported("attention.monitoring.monitor").Monitor(share)
    return made
