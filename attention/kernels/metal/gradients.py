"""The backward pass: by the Metal kernels if they passed their self-check, else through the score matrix."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NoReturn, cast

import mlx.core as mx

from attention.core.errors import KernelUnavailable
from attention.kernels.common.unfused import attend
from attention.kernels.metal import launch, selfcheck, trust
from attention.kernels.metal.call import CallParams, CallShape, specialisation
from attention.kernels.metal.launch import Arrays
from attention.kernels.metal.lists import visible_pairs
from attention.masks import Mask, combine


def plain_gradients(
    arrays: Arrays, d_o: mx.array, d_lse: mx.array | None, call: CallParams
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return the gradients of q, k, v and sinks through the score matrix; arguments as in `gradients`."""
    d_q, d_k, d_v, d_sinks = _through_scores(("q", "k", "v", "sinks"), arrays, d_o, d_lse, call)
    return d_q, d_k, d_v, d_sinks


def _through_scores(
    names: Sequence[str], arrays: Arrays, d_o: mx.array, d_lse: mx.array | None, call: CallParams
) -> list[mx.array]:
    """Return the gradients of some of the arrays, computed only if they are evaluated."""

    def attend(*some: mx.array) -> list[mx.array]:
        return list(plain_attention(arrays._replace(**dict(zip(names, some, strict=True))), call))

    d_lse = mx.zeros(arrays.q.shape[:3]) if d_lse is None else d_lse
    return mx.vjp(attend, [getattr(arrays, name) for name in names], [d_o, d_lse])[1]


def plain_attention(arrays: Arrays, call: CallParams) -> tuple[mx.array, mx.array]:
    """Return output and logsumexp, computed in float32; fully masked rows give 0 and -inf."""
    queries, keys = arrays.q.shape[2], arrays.k.shape[2]
    listed = visible_pairs(arrays.lists, arrays.entries, arrays.bits, queries, keys) if call.lists else None
    array = combine(listed, None if call.mask == "none" else arrays.mask)
    slopes = arrays.slopes if call.alibi else None
    whole = Mask(causal=call.causal, window=call.window, array=array, alibi=slopes)
    q, k, v = (x.astype(mx.float32) for x in arrays[:3])
    sinks = arrays.sinks if call.sinks else None
    out, logsumexp = attend(q, k, v, scale=call.scale, mask=whole, softcap=call.softcap, sinks=sinks)
    return out.astype(arrays.q.dtype), logsumexp


MASK: Final = 3
"""Index of the mask argument, whose batch may be 1."""
SINKS: Final = 4
"""Index of the sinks argument, which has no batch, as those after it in `Arrays` up to the block lists."""
SLOPES: Final = 5
PARTS: Final = Arrays._fields.index("key_scales")
"""Index of the first of the scales and biases, which have the batch of the keys."""

Function = Callable[..., Sequence[mx.array]]
Rule = Callable[[Sequence[mx.array], Sequence[int | None]], tuple[list[mx.array], list[int]]]


def vmap_rule(shape: CallShape, function_of: Callable[[CallShape], Function]) -> Rule:
    """Return the vmap rule of a function of `Arrays` and more arrays: the mapped axis joins the batch.

    If the sinks or the slopes are mapped, each index is a separate call.

    Args:
        shape: of the arrays of one call.
        function_of: returns the function for arrays of another shape.
    """

    def rule(inputs: Sequence[mx.array], axes: Sequence[int | None]) -> tuple[list[mx.array], list[int]]:
        size = next(x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None)
        if axes[SINKS] is not None or axes[SLOPES] is not None:
            one = function_of(shape)
            calls = [one(*(_at(x, axis, i) for x, axis in zip(inputs, axes, strict=True))) for i in range(size)]
            made = [mx.stack(list(each)) for each in zip(*calls, strict=True)]
        else:
            arguments = [_fold(at, x, axis, size) for at, (x, axis) in enumerate(zip(inputs, axes, strict=True))]
            outputs = function_of(replace(shape, batch=size * shape.batch))(*arguments)
            made = [x.reshape(size, shape.batch, *x.shape[1:]) for x in outputs]
        return made, [0] * len(made)

    def _fold(at: int, x: mx.array, axis: int | None, size: int) -> mx.array:
        if axis is None and (SINKS <= at < PARTS or (at == MASK and x.shape[0] == 1)):
            return x
        x = x[None] if axis is None else mx.moveaxis(x, axis, 0)
        return mx.broadcast_to(x, (size, shape.batch, *x.shape[2:])).reshape(size * shape.batch, *x.shape[2:])

    return rule


def _at(x: mx.array, axis: int | None, index: int) -> mx.array:
    return x if axis is None else mx.take(x, index, axis=axis)


def refuse_jvp(*_: Any) -> NoReturn:
    """The jvp rule of the kernels."""
    raise ValueError("flash_attention has no forward-mode derivative (jvp); implementation 'baseline' has.")


def refuse_quantized() -> NoReturn:
    """Raise the error of gradients of calls with quantized keys and values."""
    raise ValueError("flash_attention has no gradient for quantized keys and values; implementation 'baseline' has.")


def refuse_second_derivative(*_: Any) -> NoReturn:
    """The vjp rule of the backward kernels."""
    raise ValueError("flash_attention has no second derivative; implementation 'baseline' has.")


def refusal(shape: CallShape, call: CallParams) -> str | None:
    """Return why gradients go through the score matrix, in one line, or None if the kernels are expected to work."""
    return trust.distrust_reason(specialisation("backward_key", shape, call))


def gradients(
    arrays: Arrays,
    d_o: mx.array,
    d_lse: mx.array | None,
    outputs: Sequence[mx.array],
    shape: CallShape,
    call: CallParams,
) -> tuple[mx.array, ...]:
    """Return the gradients of all arrays; those of a bool mask and of block lists are 0.

    The gradients of an additive mask and of alibi's slopes go through the score matrix, and only if they are evaluated.

    Args:
        arrays: of the call.
        d_o: cotangent of the output, in the output's dtype.
        d_lse: cotangent of the logsumexp, if it was returned.
        outputs: outputs of the forward pass.
        shape: of the arrays.
        call: keywords of the call.
    """
    given = (arrays, d_o, d_lse)
    if _taken(shape, call, d_lse is not None):
        d_q, d_k, d_v, d_sinks = by_kernel(*given, outputs, shape, call)
    else:
        d_q, d_k, d_v, d_sinks = plain_gradients(*given, call)
    made = [mx.zeros_like(array) for array in arrays]
    if call.mask not in ("none", "bool"):
        made[MASK] = _through_scores(("mask",), *given, call)[0]
    if call.alibi:
        made[SLOPES] = _through_scores(("slopes",), *given, call)[0]
    return (d_q, d_k, d_v, made[MASK], d_sinks, *made[SLOPES:])


@functools.lru_cache(maxsize=256)
def _taken(shape: CallShape, call: CallParams, logsumexp: bool) -> bool:
    try:
        check(shape, call, logsumexp)
    except KernelUnavailable:
        return False
    return True


def by_kernel(
    arrays: Arrays,
    d_o: mx.array,
    d_lse: mx.array | None,
    outputs: Sequence[mx.array],
    shape: CallShape,
    call: CallParams,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return the gradients of q, k, v and sinks by the Metal kernels; arguments as in `gradients`."""
    more = () if d_lse is None else (d_lse,)
    d_q, d_k, d_v, delta = _backward(shape, call)(*arrays, *outputs, d_o, *more)
    sinks = arrays.sinks
    d_sinks = of_sinks(sinks, outputs, delta).sum(axis=(0, 2)) if call.sinks else mx.zeros_like(sinks)
    return d_q, d_k, d_v, d_sinks


@functools.lru_cache(maxsize=256)
def _backward(shape: CallShape, call: CallParams) -> Function:
    """Return the backward kernels as a function of `Arrays`, the outputs and their cotangents."""

    @mx.custom_function
    def function(*given: mx.array) -> tuple[mx.array, ...]:
        count = len(Arrays._fields)
        o, lse, rest, d_o, *d_lse = given[count:]
        arrays = Arrays(*given[:count])
        return launch.backward(arrays, (o, lse, rest), d_o, d_lse[0] if d_lse else None, shape, call)

    function.vjp(refuse_second_derivative)
    function.jvp(refuse_second_derivative)
    function.vmap(vmap_rule(shape, lambda batched: _backward(batched, call)))
    return cast("Function", function)


def of_sinks(sinks: mx.array, outputs: Sequence[mx.array], delta: mx.array) -> mx.array:
    """Return each row's contribution to the gradient of its head's sink, (B, H, Lq): a sink is a key with value 0.

    dS = P (dP - delta) with dP = 0. A fully masked row, whose logsumexp is -inf, contributes 0.
    """
    _, logsumexp, rest = outputs
    weights = mx.where(mx.isneginf(logsumexp), 0.0, mx.exp(sinks[:, None] - logsumexp - rest))
    return -weights * delta


def check(shape: CallShape, call: CallParams, logsumexp: bool = False) -> None:
    """Run the self-checks of both kernels, unless they have passed on this machine before.

    Args:
        shape: of the arrays.
        call: keywords of the call.
        logsumexp: whether the logsumexp has a cotangent.

    Raises:
        KernelUnavailable: a kernel cannot be compiled, or its results are wrong.
    """
    small = selfcheck.small_shape(shape, call.lists)
    small_params = selfcheck.check_params(call, small)

    def compare() -> str | None:
        given = selfcheck.inputs(small, small_params, logsumexp=logsumexp)
        arrays = given.arrays(small)
        outputs = launch.forward(arrays, small, small_params)
        made = by_kernel(arrays, given.cotangent, given.logsumexp_cotangent, outputs, small, small_params)
        return selfcheck.gradient_disagreement(given, small_params, made[: 4 if call.sinks else 3])

    trust.ensure(specialisation("backward_key", shape, call, logsumexp), compare)
