"""The gradient of an additive mask, for implementations whose kernels do not compute it; and a vmap rule.

The mask is added after the softcap, so that its gradient is that of the masked scores,

    dMask = P * (dP - rowsum(P * dP)),    dP = dO V^T,

summed over the axes along which the mask is broadcast. It is computed from scratch in float32, in slabs of rows;
since MLX is lazy, an unused gradient costs nothing.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_map
from msgspec import structs

from attention.core.errors import UnsupportedError
from attention.implementations.bounded.blocks import MIB, Blocks
from attention.implementations.bounded.blockwise import (
    Arithmetic,
    BlockwiseParams,
    arithmetic_of,
    as_slice,
    blocks_of,
    head_groups,
    row_shift,
    tile_scores,
)
from attention.implementations.bounded.memory import Chain, TileWriter
from attention.implementations.calls import current_backend
from attention.kernels.common import unfused
from attention.masks import Mask, Pattern
from attention.quantized_kv import KeyOrValue, QuantizedArray

Rule = Callable[[Any, Any], tuple[Any, Any]]


def vmap_rule(function: Callable[..., Any], masks_at: int | None = None) -> Rule:
    """Return the vmap rule of a function from arrays (batch, ...) and lists of them to arrays (batch, ...).

    If an array without a batch axis is mapped, such as sinks or slopes (H,), each index is a separate call.

    Args:
        function: takes at least two arguments, the first of them the query or a list beginning with it.
        masks_at: index of the argument that is a list of masks, whose batch may be 1, and slopes (H,).
    """

    def rule(inputs: Any, axes: Any) -> tuple[Any, Any]:
        mapped = _mapped_inputs(inputs, axes)
        array, axis = mapped[0]
        size = array.shape[axis]
        if any(array.ndim < 5 for array, _ in mapped):
            calls = [function(*tree_map(lambda x, axis, i=i: _at(x, axis, i), inputs, axes)) for i in range(size)]
            return _move_mapped_axis_first(tree_map(lambda *each: mx.stack(list(each)), *calls))
        query, its_axis = _first(inputs[0]), _first(axes[0])
        batch = query.shape[0 if its_axis is None or its_axis > 0 else 1]

        def fold(x: mx.array, axis: int | None) -> mx.array:
            if axis is None and x.ndim == 1:
                return x
            x = x[None] if axis is None else mx.moveaxis(x, axis, 0)
            return mx.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(size * batch, *x.shape[2:])

        def fold_unless_one(x: mx.array, axis: int | None) -> mx.array:
            return x if axis is None and x.shape[0] == 1 else fold(x, axis)

        arguments = [
            tree_map(fold_unless_one if at == masks_at else fold, argument, its)
            for at, (argument, its) in enumerate(zip(inputs, axes, strict=True))
        ]
        return _move_mapped_axis_first(tree_map(lambda x: x.reshape(size, batch, *x.shape[1:]), function(*arguments)))

    return rule


def _mapped_inputs(inputs: Any, axes: Any) -> list[tuple[mx.array, int]]:
    """Return the mapped arrays with their axes."""
    pairs: list[tuple[mx.array, int]] = []
    tree_map(lambda x, axis: None if axis is None else pairs.append((x, axis)), inputs, axes)
    return pairs


def _move_mapped_axis_first(outputs: Any) -> tuple[Any, Any]:
    return outputs, tree_map(lambda _: 0, outputs)


def _first(argument: Any) -> Any:
    return argument[0] if isinstance(argument, list) else argument


def _at(x: mx.array, axis: int | None, index: int) -> mx.array:
    return x if axis is None else mx.take(x, index, axis=axis)


SLAB_BYTES: Final = 32 * MIB
"""Working memory of a slab of rows with all keys; a slab has at least one row."""
SLAB_ARRAYS: Final = 8
"""Number of score-sized arrays of a slab alive at once."""
Arrays = list[mx.array]


Out = TypeVar("Out", mx.array, tuple[mx.array, mx.array])


def with_mask_gradient(
    attend: Callable[..., Out],
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue,
    *,
    scale: float,
    mask: Mask,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    budget_bytes: int = SLAB_BYTES,
) -> Out:
    """Compute attention; an additive mask gets its gradient, unless keys and values are quantized.

    Args:
        attend: computes attention of q, k, v, a mask and the sinks, if there are any, or a pair of it and the logsumexp
            of its rows; its own gradient of the mask is ignored.
        q: query (B, H, Lq, D).
        k: key (B, Hkv, Lk, D).
        v: value (B, Hkv, Lk, Dv).
        scale: factor of the scores.
        mask: the keys each query attends to.
        softcap: bound of the scores, applied before the mask.
        sinks: (H,), an extra logit per head in the softmax of every row, without a value.
        budget_bytes: working memory of the gradient; exceeded if a single row with all its keys needs more.
    """
    extra = [] if sinks is None else [sinks]
    if (
        isinstance(k, QuantizedArray)
        or isinstance(v, QuantizedArray)
        or mask.array is None
        or mask.array.dtype == mx.bool_
    ):
        return attend(q, k, v, mask, *extra)
    backend = current_backend()
    arithmetic = arithmetic_of(q.dtype, backend) if backend == "cuda" else "exact"
    shifted, sloped = q.dtype != mx.float32, mask.alibi is not None
    kind = _Kind(scale, mask.causal, mask.window, mask.pattern, sloped, softcap, arithmetic, shifted, budget_bytes)
    inputs, node = _functions(kind)
    arrays = mask.arrays
    query, key, value, of_out, of_logsumexp, *seen = inputs(q, k, v, arrays, extra)
    out = attend(query, key, value, structs.replace(mask, array=mx.stop_gradient(mask.array)), *seen)
    outs = [out] if isinstance(out, mx.array) else list(out)
    given = node(outs, [of_out, of_logsumexp][: len(outs)], q, k, v, arrays, extra)
    return given[0] if isinstance(out, mx.array) else (given[0], given[1])


class _Kind(NamedTuple):
    """What the derivatives of a call depend on besides its arrays."""

    scale: float
    causal: bool
    window: int | None
    pattern: Pattern | None
    sloped: bool
    softcap: float | None
    arithmetic: Arithmetic
    shifted: bool
    budget_bytes: int

    def mask(self, arrays: Arrays) -> Mask:
        """Return the mask with these `Mask.arrays`."""
        alibi = arrays[1] if self.sloped else None
        return Mask(causal=self.causal, window=self.window, array=arrays[0], pattern=self.pattern, alibi=alibi)

    def in_slabs(self, q: mx.array, k: mx.array, arrays: Arrays) -> BlockwiseParams:
        """Return the parameters of the mask's gradient, in slabs of rows with all keys."""
        keys = k.shape[2]
        row_bytes = 4 * SLAB_ARRAYS * keys * (q.shape[1] // k.shape[1])
        rows = max(1, min(self.budget_bytes, SLAB_BYTES) // row_bytes)
        slab = Blocks(batches=1, kv_heads=1, rows=min(rows, q.shape[2]), keys=keys)
        return BlockwiseParams(self.scale, self.mask(arrays), self.softcap, slab, self.arithmetic, shifted=self.shifted)


@lru_cache(maxsize=256)
def _functions(kind: _Kind) -> tuple[Callable[..., Arrays], Callable[..., Arrays]]:
    """Return `_inputs` and `_node` of a kind of call; to make them takes as long as a short call."""
    return _inputs(kind), _node(kind)


def _inputs(kind: _Kind) -> Callable[..., Arrays]:
    """Return a function of q, k, v, mask and sinks that returns q, k, v, two carriers, and the sinks.

    The implementation takes the mask as a constant, so that its gradients of q, k, v and the sinks would not depend on
    the mask: they pass through `_dependent_gradients` here. The carriers, zeros of the shapes of output and logsumexp,
    bring the gradients of these, on which they depend too.
    """

    @mx.custom_function
    def pass_on(q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays) -> Arrays:
        rows, zero = q.shape[:3], mx.array(0.0)
        carriers = mx.broadcast_to(zero.astype(q.dtype), (*rows, v.shape[3])), mx.broadcast_to(zero, rows)
        return [q, k, v, *carriers, *sinks]

    def pull_back(
        inputs: tuple[mx.array, mx.array, mx.array, Arrays, Arrays], cotangents: Arrays, outs: Arrays
    ) -> tuple[mx.array, mx.array, mx.array, Arrays, Arrays]:
        q, k, v, mask, sinks = inputs
        gradients, carried = [*cotangents[:3], *cotangents[5:]], cotangents[3:5]
        of_q, of_k, of_v, *of_sinks = _dependent_gradients(kind)(gradients, carried, q, k, v, mask, sinks)
        return of_q, of_k, of_v, [mx.zeros_like(x) for x in mask], of_sinks

    pass_on.vjp(pull_back)
    pass_on.jvp(_refuse)
    pass_on.vmap(vmap_rule(pass_on, masks_at=3))
    return cast("Callable[..., Arrays]", pass_on)


def _dependent_gradients(kind: _Kind) -> Callable[..., Arrays]:
    """Return a function that returns its first argument, gradients of q, k, v and sinks, which depend on the mask.

    Its own gradient of the mask, a second derivative, is that of unfused attention.
    """

    @mx.custom_function
    def pass_on(
        gradients: Arrays, carried: Arrays, q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays
    ) -> Arrays:
        return gradients

    def pull_back(inputs: tuple[Any, ...], cotangents: Arrays, outs: Arrays) -> tuple[Any, ...]:
        _, carried, q, k, v, mask, sinks = inputs

        def gradients(array: mx.array) -> Arrays:
            masked = kind.mask([array, *mask[1:]])

            def attend(q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array) -> Arrays:
                return list(
                    unfused.attend(
                        *(q, k, v),
                        scale=kind.scale,
                        mask=masked,
                        softcap=kind.softcap,
                        sinks=next(iter(sinks), None),
                        shifted=kind.shifted,
                    )
                )

            primals = [x.astype(mx.float32) for x in (q, k, v, *sinks)]
            return mx.vjp(attend, primals, [x.astype(mx.float32) for x in carried])[1]

        wide = [x.astype(mx.float32) for x in cotangents]
        of_mask = mx.vjp(gradients, [mask[0].astype(mx.float32)], wide)[1][0].astype(mask[0].dtype)
        constant = [mx.stop_gradient(x) for x in (*carried, q, k, v, *sinks)]
        zeros = cast("Arrays", _zeros_without_mask_gradient(mask[0], constant))
        of_carried, of_qkv, of_sinks = zeros[: len(carried)], zeros[len(carried) :][:3], zeros[len(carried) + 3 :]
        return cotangents, of_carried, *of_qkv, [of_mask, *map(mx.zeros_like, mask[1:])], of_sinks

    pass_on.vjp(pull_back)
    pass_on.jvp(_refuse)
    pass_on.vmap(vmap_rule(pass_on, masks_at=5))
    return cast("Callable[..., Arrays]", pass_on)


def _refuse(primals: object, tangents: object) -> None:
    raise UnsupportedError("under an additive mask only implementation='baseline' has forward-mode derivatives (jvp)")


@mx.custom_function
def _zeros_without_mask_gradient(mask: mx.array, like: Arrays) -> Arrays:
    """Return zeros added to second derivatives, whose own dependence on the mask nothing computes."""
    return [mx.zeros_like(x) for x in like]


@_zeros_without_mask_gradient.vjp
def _refuse_third(*_: object) -> None:
    raise UnsupportedError("only implementation='baseline' has third derivatives that depend on an additive mask")


_zeros_without_mask_gradient.jvp(_refuse)
_zeros_without_mask_gradient.vmap(lambda inputs, axes: (_zeros_without_mask_gradient(*inputs), axes[1]))


def _node(kind: _Kind) -> Callable[..., Arrays]:
    """Return a function that returns its first argument, and whose gradient of the mask argument is `mask_gradient`.

    Its second argument, the carriers of `_inputs`, get the gradients of the first.
    """

    @mx.custom_function
    def pass_on(
        outs: Arrays, carriers: Arrays, q: mx.array, k: mx.array, v: mx.array, mask: Arrays, sinks: Arrays
    ) -> Arrays:
        return outs

    def pull_back(
        inputs: tuple[Arrays, Arrays, mx.array, mx.array, mx.array, Arrays, Arrays], cotangents: Arrays, outs: Arrays
    ) -> Arrays:
        _, _, q, k, v, mask, sinks = inputs
        of_logsumexp = cotangents[1] if len(cotangents) > 1 else None
        call = kind.in_slabs(q, k, mask)
        of_mask = mask_gradient(q, k, v, cotangents[0], call, next(iter(sinks), None), of_logsumexp)
        return [
            *cotangents,
            *cotangents,
            *(mx.zeros_like(x) for x in (q, k, v)),
            of_mask,
            *(mx.zeros_like(x) for x in (*mask[1:], *sinks)),
        ]

    pass_on.vjp(pull_back)
    pass_on.jvp(_refuse)
    pass_on.vmap(vmap_rule(pass_on, masks_at=5))
    return cast("Callable[..., Arrays]", pass_on)


def mask_gradient(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cotangent: mx.array,
    call: BlockwiseParams,
    sinks: mx.array | None = None,
    of_logsumexp: mx.array | None = None,
) -> mx.array:
    """Return the gradient of the call's mask, a 4-D additive array, in the mask's shape and dtype.

    `of_logsumexp`: the gradient of the logsumexp of each row, (B, H, Lq).
    """
    array = call.mask.array
    assert array is not None
    lengths = q.shape[2], k.shape[2]
    whole = array.shape == (*q.shape[:3], k.shape[2])
    chain = Chain()
    total = TileWriter(mx.zeros(array.shape, array.dtype if whole else mx.float32), chain)
    for heads in head_groups(q, k, call.blocks):
        for rows in blocks_of(lengths[0], call.blocks.rows):
            keys = call.mask.visible_keys(rows, *lengths)
            if not keys:
                continue
            *sides, key, value = chain.whole(q, cotangent, k, v)
            cuts = *(heads.rows(x, rows) for x in sides), heads.keys(key, keys), heads.keys(value, keys)
            query, upstream, key, value = (x.astype(mx.float32) for x in cuts)
            product = call.scores(query, call.transposed(key))
            shift = row_shift(call, heads, rows, lengths)
            scores, _ = tile_scores(product, call, heads, rows, keys, lengths, shift)
            d_weights = call.product(upstream, call.transposed(value))
            sink_logits = None if sinks is None else heads.sinks(sinks, len(rows), shift)
            weights = _softmax(scores, call, sink_logits)
            # not rowsum(dO * O): the output may be rounded, and then the difference does not cancel
            delta = (weights * d_weights).sum(axis=-1, keepdims=True)
            if of_logsumexp is not None:
                delta = delta - heads.rows(of_logsumexp[..., None], rows)
            slab = weights * (d_weights - delta)
            slab = slab.reshape(len(heads.batches), -1, len(rows), len(keys))
            summed = [axis for axis in range(4) if array.shape[axis] == 1]
            slab = slab.sum(axis=summed, keepdims=True) if summed else slab
            places = heads.batches, range(heads.heads.start, heads.heads.stop), rows, keys
            place = tuple(
                slice(None) if size == 1 else as_slice(run) for size, run in zip(array.shape, places, strict=True)
            )
            chain.links = [total.write(place, slab, 1) if whole else total.add(place, slab, 1)]
    return chain.results(total.array)[0].astype(array.dtype)


def _softmax(scores: mx.array, call: BlockwiseParams, sinks: mx.array | None) -> mx.array:
    """Return the softmax of scores; 0 in fully masked rows."""
    top = scores.max(axis=-1, keepdims=True)
    top = top if sinks is None else mx.maximum(top, sinks)
    top = mx.where(top == -mx.inf, 0.0, top)
    weights = call.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    total = total if sinks is None else total + call.exp(sinks - top)
    return weights / mx.where(total == 0, 1.0, total)
