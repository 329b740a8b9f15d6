"""Parts of arrays that the ranks of a group hold: cut from whole arrays, and joined again. Imports no MLX."""

from typing import TYPE_CHECKING, NamedTuple

from attention.core.errors import UsageError
from attention.distributed.layout import Kind, Layout, check_layout_name, make_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    import mlx.core as mx

    from attention.masks import Pattern


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
    check_layout(layout, group)
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

    check_layout(layout, group)
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


def check_layout(layout: Layout, group: "mx.distributed.Group") -> None:
    """Raise UsageError unless a layout is for the ranks of a group."""
    if layout.ranks != group.size():
        raise UsageError(f"layout: got one of {layout.ranks} ranks; the group has {group.size()}")
