"""FlashAttention 3's rule for every kind of call: at most twice the error of plain attention in the same precision.

Rounding is added, and for gradients the factor is three. The exact results are computed in float64.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from attention.kernels.common.selfcheck import Floats, exact
from attention.kernels.metal import selfcheck
from attention.kernels.metal.call import CallParams
from attention.kernels.metal.selfcheck import Inputs
from attention.masks import Mask, cast_additive
from attention.quantized_kv import QuantizedArray

NAMES = ("output", "dQ", "dK", "dV", "rows of the sinks' gradient")
"""For sinks, which are few, the contribution of each row: a sum over all rows may be right or wrong by chance."""


def wrong(given: Inputs, call: CallParams, found: Sequence[mx.array]) -> list[str]:
    """Return the results that break the rule, of output, dQ, dK, dV, and the rows of the sinks' gradient, if given."""
    right = [selfcheck.reference(given, call)[0], *selfcheck.reference_gradients(given, call)][: len(found)]
    plain = plain_results(given, call)
    problems = []
    for index, (result, expected, rough) in enumerate(zip(found, right, plain, strict=False)):
        error = largest(exact(result) - expected)
        allowed = (3 if index else 2) * largest(exact(rough) - expected) + rounding(expected, given.q.dtype)
        if not error <= allowed:
            problems.append(f"{NAMES[index]}: {error:.2g} off, {allowed:.2g} allowed")
    return problems


def plain_results(given: Inputs, call: CallParams) -> list[mx.array]:
    """Return output and gradients of plain attention in the inputs' own precision, in the order of `NAMES`."""
    group = given.q.shape[1] // given.k.shape[1]
    seen, sighted = _seen(given, call)
    queries, keys = given.q.shape[2], given.k.shape[2]
    distance = mx.arange(keys) - (mx.arange(queries)[:, None] + keys - queries)

    def attend_plainly(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> list[mx.array]:
        scores = (q * call.scale) @ mx.repeat(k, group, axis=1).swapaxes(-1, -2)
        if call.softcap is not None:
            scores = call.softcap * mx.tanh(scores / call.softcap)
        if given.slopes is not None:
            scores = scores + (given.slopes[:, None, None] * distance).astype(q.dtype)
        if given.mask is not None and given.mask.dtype != mx.bool_:
            scores = scores + mx.where(seen, cast_additive(given.mask, q.dtype), mx.zeros((), q.dtype))
        scores = mx.where(seen | ~sighted, scores, mx.array(-mx.inf, q.dtype))
        if call.sinks:
            column = mx.broadcast_to(sinks[..., None].astype(q.dtype), (*scores.shape[:3], 1))
            scores = mx.concatenate([scores, column], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)[..., : k.shape[2]]
        output = mx.where(sighted, weights @ mx.repeat(v, group, axis=1), mx.zeros((), q.dtype))
        return [output, mx.where(sighted[..., 0], mx.logsumexp(scores, axis=-1), mx.zeros((), q.dtype))]

    rows = given.q.shape[:3]  # each of them has a sink of its own, so that each has a gradient of its own
    sinks = mx.zeros(rows) if given.sinks is None else mx.broadcast_to(given.sinks[:, None], rows)
    by_sum = mx.zeros(rows) if given.logsumexp_cotangent is None else given.logsumexp_cotangent
    cotangents = [given.cotangent, by_sum.astype(given.q.dtype)]
    k, v = (x.dequantized(given.q.dtype) if isinstance(x, QuantizedArray) else x for x in (given.k, given.v))
    outputs, pulled = mx.vjp(attend_plainly, [given.q, k, v, sinks], cotangents)
    return [outputs[0], *pulled]


def _seen(given: Inputs, call: CallParams) -> tuple[mx.array, mx.array]:
    """Return the keys that each query attends to, and the queries that attend to any; a sink is always attended to."""
    whole = Mask(causal=call.causal, window=call.window).materialize(given.q.shape[2], given.k.shape[2])
    seen = mx.ones((given.q.shape[2], given.k.shape[2]), mx.bool_) if whole is None else whole
    if given.seen is not None:
        seen = seen & mx.array(given.seen)
    if given.mask is not None:
        seen = seen & (given.mask if given.mask.dtype == mx.bool_ else ~mx.isneginf(given.mask))
    return seen, mx.ones((1, 1), mx.bool_) if call.sinks else seen.any(axis=-1, keepdims=True)


def rounding(expected: Floats, dtype: mx.Dtype) -> float:
    """Return 2 max|ref + 0.3 - 0.3 - ref| in the given precision."""
    low = mx.array(expected.astype(np.float32)).astype(dtype)
    return 2 * largest(exact((low + mx.array(0.3, dtype)) - mx.array(0.3, dtype)) - exact(low))


def largest(difference: Floats) -> float:
    return float(np.abs(difference).max())  # NaN if any is NaN
