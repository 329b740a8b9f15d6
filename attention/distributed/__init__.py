"""Attention over a sequence that is sharded over several devices: layouts, calls, and the choice among them.

Importing this package imports no MLX; its functions do.
"""

from typing import TYPE_CHECKING, Any

from attention.core.errors import UsageError
from attention.distributed.decision import Decision, Link, Option, decide
from attention.distributed.layout import LAYOUTS, Kind, Layout, check_layout_name, make_layout
from attention.distributed.shards import Shards, check_layout, layout_for, own_rows, shard, unshard

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import mlx.core as mx

    from attention.distributed.bound_call import BoundCall
    from attention.distributed.collectives import Statistics
    from attention.implementations.protocol import Implementation
    from attention.masks import Alibi, Pattern

__all__ = [
    "LAYOUTS",
    "BoundCall",
    "Decision",
    "Layout",
    "Link",
    "Option",
    "Shards",
    "attention",
    "decide",
    "in_sequence",
    "layout_for",
    "make_layout",
    "own_rows",
    "reset_statistics",
    "shard",
    "statistics",
    "transport",
    "transport_reason",
    "unshard",
]


def __getattr__(name: str) -> Any:
    """Import `BoundCall`, which imports MLX, when it is first used."""
    if name != "BoundCall":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from attention.distributed.bound_call import BoundCall

    globals()["BoundCall"] = BoundCall
    return BoundCall


def attention(
    q: "mx.array",
    k: Any,
    v: Any,
    *,
    group: "mx.distributed.Group",
    layout: "Layout | Kind" = "zigzag",
    key_layout: Layout | None = None,
    scale: float | None = None,
    mask: "str | Pattern | mx.array | None" = None,
    window: int | None = None,
    softcap: float | None = None,
    score_mod: "Alibi | None" = None,
    return_lse: bool = False,
    implementation: "str | Implementation" = "practical",
) -> Any:
    """Compute attention of a sequence whose rows, keys and values are sharded over the ranks of a group.

    Every rank makes the same calls, in the same order. Gradients are those of the sum of all ranks' losses.

    Args:
        q: this rank's rows (B, H, rows, D); all rows on every rank in the layout "replicated".
        k: this rank's keys (B, Hkv, keys, D).
        v: this rank's values (B, Hkv, keys, Dv).
        group: the ranks.
        layout: layout of the rows, from `shard`; or its name, if all ranks have as many.
        key_layout: layout of the keys; that of the rows by default. Row i of Lq has position i + Lk - Lq.
        scale: factor of the scores; 1 / sqrt(D) by default.
        mask: as in `attention.attention`, of the whole sequence: patterns for (B, H, Lq, Lk), arrays likewise.
        window: each query attends to the last `window` keys up to its own position; implies causal.
        softcap: bound of the scores.
        score_mod: `attention.masks.alibi(slopes)`; needs a causal mask.
        return_lse: return the logsumexp of each row too.
        implementation: what computes each rank's part.

    Returns:
        This rank's rows of the output, (B, H, rows, Dv), and with `return_lse` of the logsumexp.

    Raises:
        UsageError: invalid arguments.
        UnsupportedError: keys and values are not dense, ranks cannot compute the mask from their parts, or the
            implementation does not take it.
    """
    from attention.arguments import (
        check_mask_of_shape,
        check_score_mod,
        check_shapes,
        check_support,
        find_implementation,
    )
    from attention.core.numbers import check_flag, check_numbers, shown_value
    from attention.distributed.attend import (
        Problem,
        attend,
        check_dense,
        check_local,
        check_supported,
        layout_of_equal_rows,
        with_a_row,
    )

    check_flag("return_lse", return_lse)
    if not all(callable(getattr(group, name, None)) for name in ("size", "rank")):
        raise UsageError(f"group: got {shown_value(group)}; it takes a group, such as mx.distributed.init() returns")
    chosen = find_implementation(implementation)
    check_dense(k, v)
    check_shapes(*map(with_a_row, (q, k, v)))  # on ranks without rows or keys too: all raise, or none
    if not isinstance(layout, Layout):
        layout = layout_of_equal_rows(q, check_layout_name(layout), group.size())
    keys = layout if key_layout is None else key_layout
    for each in (layout, keys):
        check_layout(each, group)
    for name, array, its, what in (("q", q, layout, "rows"), ("k", k, keys, "keys"), ("v", v, keys, "values")):
        check_local(name, array, its.rows(group.rank()), what)
    factor, cap = check_numbers(scale, softcap, q.shape[-1])
    heads = q.shape[1] * (group.size() if layout.kind == "heads" else 1)
    found = check_score_mod(
        score_mod, check_mask_of_shape(mask, window, (q.shape[0], heads, layout.seq, keys.seq)), heads
    )
    merges = layout.kind == "replicated" and keys.is_sharded and group.size() > 1
    check_support(chosen, found, return_lse or merges, False)
    problem = Problem(chosen, factor, found, cap, layout, keys, group, return_lse)
    check_supported(problem)
    out, lse = attend(q, k, v, problem)
    return (out, lse) if return_lse else out


def in_sequence() -> "AbstractContextManager[None]":
    """Return a context for calls of which each depends on the one before, as those of a model's layers do.

    Their collectives are left to a later evaluation, and `mx.compile` takes them. Otherwise each is submitted as it is
    called, so that all ranks have one order of what does not depend on each other; while a gradient is traced, the
    program waits for it.
    """
    from attention.distributed import collectives

    return collectives.in_sequence()


def statistics() -> "Statistics":
    """Return what this rank's calls sent and received since the start, or `reset_statistics`."""
    from attention.distributed import collectives

    return collectives.statistics()


def reset_statistics() -> None:
    """Set the counts of `statistics` to zero."""
    from attention.distributed import collectives

    collectives.reset_statistics()


def transport_reason(group: "mx.distributed.Group") -> str:
    """Return how the keys and values of a group are moved, and why; all ranks ask together."""
    from attention.distributed import collectives

    copies, reason = collectives.peer_copies(group)
    return f"peer copies: {reason}" if copies else f"{collectives.transport()}: {reason}"


def transport() -> str:
    """Return what moves data between ranks: "nccl", "jaccl", "mpi" or "ring"."""
    from attention.distributed import collectives

    return collectives.transport()
