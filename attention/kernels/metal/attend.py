"""Dispatch of a call to its kernels: self-check on first use, gradient, one cached decision per shape."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx

from attention.kernels.metal import gradients as metal_gradients
from attention.kernels.metal import launch, selfcheck
from attention.kernels.metal import trust as metal_trust
from attention.kernels.metal.call import (
    CallParams,
    CallShape,
    Specialisation,
    mask_kind,
    normalize,
    shape_of,
    specialisation,
)
from attention.kernels.metal.gradients import gradients
from attention.kernels.metal.launch import Arrays
from attention.kernels.metal.lists import lists_of_pattern
from attention.masks import Pattern
from attention.quantized_kv import KeyOrValue

Attend = Callable[..., Sequence[mx.array]]
SPLIT_KEYS = 523
"""Number of keys in a self-check of split keys."""


def attend(
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue,
    scale: float,
    causal: bool,
    window: int | None,
    mask: mx.array | None,
    softcap: float | None,
    sinks: mx.array | None,
    with_logsumexp: bool,
    pattern: Pattern | None = None,
    slopes: mx.array | None = None,
) -> Sequence[mx.array]:
    """Return output and logsumexp; arguments as in `flash_attention`.

    Raises:
        ValueError: shapes, dtypes or values are invalid or unsupported.
        KernelUnavailable: there is no Metal device, or the kernel failed its self-check.
    """
    shape = shape_of(q, k, v)
    if sinks is not None and sinks.shape != (shape.heads,):
        raise ValueError(f"[flash_attention] sinks have shape ({shape.heads},); got {sinks.shape}.")
    kind = mask_kind(mask, shape)
    if slopes is not None and slopes.shape != (shape.heads,):
        raise ValueError(f"[flash_attention] alibi's slopes have shape ({shape.heads},); got {slopes.shape}.")
    features = (sinks is not None, pattern is not None, slopes is not None)
    call = normalize(scale, causal, window, softcap, shape.keys, kind, *features)
    lists = None if pattern is None else lists_of_pattern(pattern, shape)
    return _function(shape, call, with_logsumexp)(*launch.arrays_of(q, k, v, mask, sinks, slopes, lists))[:2]


def special_of(shape: CallShape, call: CallParams) -> Specialisation:
    """Return the specialisation of a call's forward kernel."""
    return specialisation("decode" if call.splits_keys(shape) else "forward", shape, call)


@functools.lru_cache(maxsize=256)
def _function(shape: CallShape, call: CallParams, with_logsumexp: bool) -> Attend:
    """Return the differentiable, vmappable function; it always computes the logsumexp for the backward pass."""
    metal_trust.describe()
    check(shape, call)

    @mx.custom_function
    def function(*arrays: mx.array) -> launch.Forward:
        return launch.forward(Arrays(*arrays), shape, call)

    def pull_back(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        if shape.kv_format is not None:
            metal_gradients.refuse_quantized()
        d_lse = cotangents[1].astype(mx.float32) if with_logsumexp else None
        return gradients(Arrays(*primals), cotangents[0].astype(primals[0].dtype), d_lse, outputs, shape, call)

    function.vjp(pull_back)
    function.jvp(metal_gradients.refuse_jvp)
    function.vmap(metal_gradients.vmap_rule(shape, lambda batched: _function(batched, call, with_logsumexp)))
    return cast("Attend", function)


def check(shape: CallShape, call: CallParams) -> None:
    """Run the self-check of a call's kernel, unless it has passed on this machine before.

    Raises:
        KernelUnavailable: the kernel cannot be compiled, or its results are wrong.
    """
    special = special_of(shape, call)

    def compare() -> str | None:
        for small in _small(shape, special):
            small_params = selfcheck.check_params(call, small)
            given = selfcheck.inputs(small, small_params)
            output, logsumexp, _ = launch.forward(given.arrays(small), small, small_params)
            wrong = selfcheck.disagreement(given, small_params, output, logsumexp)
            if wrong:
                return wrong
        return None

    metal_trust.ensure(special, compare)


def _small(shape: CallShape, special: Specialisation) -> list[CallShape]:
    """Return small shapes that run the same kernel: for few queries, one with split keys and one without."""
    if special.tile.kind == "decode":
        few = replace(shape, batch=1, heads=4, kv_heads=2, queries=special.tile.block_q // 2)
        return [replace(few, keys=SPLIT_KEYS), replace(few, keys=selfcheck.KEYS)]
    return [selfcheck.small_shape(shape, special.lists)]
