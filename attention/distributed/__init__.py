"""Attention over a sequence that is sharded over several devices: layouts, calls, and the choice among them.

Importing this package imports no MLX; its functions do.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from attention.core.errors import UsageError
from attention.distributed.decision import Decision, Link, Option, decide
from attention.distributed.layout import LAYOUTS, Kind, Layout, check_layout_name, make_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    "layout_for",
    "make_layout",
    "reset_statistics",
    "shard",
    "statistics",
    "transport",
    "unshard",
]


def __getattr__(name: str) -> Any:
    """Import `BoundCall`, which imports MLX, when it is first used."""
    if name != "BoundCall":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from attention.distributed.bound_call import BoundCall

    globals()["BoundCall"] = BoundCall
    return BoundCall


class Shards(NamedTuple):
    """A rank's part of q, k and v, and the layout that says which part it is."""

    q: "mx.array"
    k: "mx.array"
    v: "mx.array"
    layout: Layout


def layout_for(
    kind: Kind,
    seq: int,
    group: "mx.distributed.Group",
    *,
    mask: "str | Pattern | None" = None,
    planes: tuple[int, int] = (1, 1),
    weights: "Sequence[float] | None" = None,
) -> Layout:
    """Return the layout of a sequence over the ranks of a group.

    Args:
        kind: name of the layout.
        seq: number of positions.
        group: the ranks.
        mask: for "balanced" the mask whose visible pairs are balanced.
        planes: batch and heads of the mask.
        weights: relative speeds of the ranks.
    """
    costs = None
    if check_layout_name(kind) == "balanced" and mask is not None:
        from attention import masks
        from attention.distributed.exchange import tile_costs

        costs = tile_costs(masks.causal() if isinstance(mask, str) else mask, (*planes, seq, seq))
    return make_layout(seq, group.size(), kind, costs=costs, weights=weights)


def shard(
    q: "mx.array",
    k: "mx.array",
    v: "mx.array",
    group: "mx.distributed.Group",
    layout: "Kind | Layout" = "zigzag",
    *,
    mask: "str | Pattern | None" = None,
    weights: "Sequence[float] | None" = None,
) -> Shards:
    """Return this rank's part of arrays that every rank has whole.

    Args:
        q: query (B, H, L, D).
        k: key (B, Hkv, L, D).
        v: value (B, Hkv, L, Dv).
        group: the ranks.
        layout: name of a layout, or one that was made before.
        mask: for "balanced" the mask whose visible pairs are balanced.
        weights: relative speeds of the ranks; all equal by default.

    Raises:
        UsageError: the layout does not fit, or the lengths of q and k differ.
    """
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise UsageError(f"k: got {k.shape[2]} keys; sharding takes as many as query rows, {q.shape[2]}")
    if not isinstance(layout, Layout):
        planes = (q.shape[0], q.shape[1])
        layout = layout_for(layout, q.shape[2], group, mask=mask, planes=planes, weights=weights)
    _check_layout(layout, group)
    if layout.kind == "heads":
        return Shards(_own_heads("q", q, group), _own_heads("k", k, group), _own_heads("v", v, group), layout)
    rank = group.rank()
    return Shards(own_rows(q, layout, rank), own_rows(k, layout, rank), own_rows(v, layout, rank), layout)


def _own_heads(name: str, array: "mx.array", group: "mx.distributed.Group") -> "mx.array":
    ranks, heads = group.size(), array.shape[1]
    if heads % ranks:
        raise UsageError(f"{name}: got {heads} heads; the layout heads takes a multiple of {ranks} ranks")
    first = heads // ranks * group.rank()
    return array[:, first : first + heads // ranks]


def own_rows(array: "mx.array", layout: Layout, rank: int) -> "mx.array":
    """Return a rank's rows of an array (B, heads, L, D), or (..., L, D) with any leading axes."""
    import mlx.core as mx

    if array.shape[-2] != layout.seq:
        raise UsageError(f"layout: got one of {layout.seq} positions; the array has {array.shape[-2]}")
    parts = [array[..., start:stop, :] for start, stop in layout.chunks[rank]]
    if not parts:
        return array[..., :0, :]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)


def unshard(array: "mx.array", layout: Layout, group: "mx.distributed.Group") -> "mx.array":
    """Return the whole array (B, heads, L, D) on every rank, of which each rank has its own part.

    Differentiable: each rank's part gets the sum of the gradients of all ranks.
    """
    import mlx.core as mx

    from attention.distributed import collectives

    _check_layout(layout, group)
    if group.size() == 1 or layout.kind == "replicated":
        return array
    if layout.kind == "heads":
        whole = collectives.gathered([array], group)
        joined = mx.concatenate([whole.arrays[0][rank] for rank in range(group.size())], axis=1)
        return collectives.tied(joined, whole.token)
    missing = layout.most_rows - array.shape[2]
    padded = mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else array
    whole = collectives.gathered([padded], group)
    runs: list[tuple[int, mx.array]] = []
    for rank, chunks in enumerate(layout.chunks):
        place = 0
        for start, stop in chunks:
            runs.append((start, whole.arrays[0][rank][:, :, place : place + stop - start]))
            place += stop - start
    joined = mx.concatenate([run for _, run in sorted(runs, key=lambda run: run[0])], axis=2)
    return collectives.tied(joined, whole.token)


def _check_layout(layout: Layout, group: "mx.distributed.Group") -> None:
    if layout.ranks != group.size():
        raise UsageError(f"layout: got one of {layout.ranks} ranks; the group has {group.size()}")


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
        UnsupportedError: a mask that ranks cannot compute from their parts, or the implementation does not take it.
    """
    from attention.arguments import (
        check_mask_of_shape,
        check_numbers,
        check_score_mod,
        check_shapes,
        check_support,
        find_implementation,
    )
    from attention.distributed.attend import Problem, attend, check_local, check_supported

    chosen = find_implementation(implementation)
    if not isinstance(layout, Layout):
        layout = make_layout(q.shape[2] * group.size(), group.size(), check_layout_name(layout))
    keys = layout if key_layout is None else key_layout
    for each in (layout, keys):
        _check_layout(each, group)
    if k.shape[2] and q.shape[2]:
        check_shapes(q, k, v)
    for name, array, its, what in (("q", q, layout, "rows"), ("k", k, keys, "keys"), ("v", v, keys, "values")):
        check_local(name, array, its.rows(group.rank()), what)
    factor, cap = check_numbers(scale, softcap, q.shape[-1])
    heads = q.shape[1] * (group.size() if layout.kind == "heads" else 1)
    found = check_score_mod(
        score_mod, check_mask_of_shape(mask, window, (q.shape[0], heads, layout.seq, keys.seq)), heads
    )
    check_support(chosen, found, return_lse or not layout.is_sharded, False)
    problem = Problem(chosen, factor, found, cap, layout, keys, group, return_lse)
    check_supported(problem)
    out, lse = attend(q, k, v, problem)
    return (out, lse) if return_lse else out


def statistics() -> "Statistics":
    """Return what this rank's calls sent and received since the start, or `reset_statistics`."""
    from attention.distributed import collectives

    return collectives.statistics()


def reset_statistics() -> None:
    """Set the counts of `statistics` to zero."""
    from attention.distributed import collectives

    collectives.reset_statistics()


def transport() -> str:
    """Return what moves data between ranks: "nccl", "jaccl", "mpi" or "ring"."""
    from attention.distributed import collectives

    return collectives.transport()
