"""FlashAttention 3's rule for every kind of call: at most twice the error of plain attention in the same precision.

Rounding is added, and for gradients it is three times. What is exact is computed in float64.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from attention.kernels.metal import selfcheck
from attention.kernels.metal.call import Call
from attention.kernels.metal.selfcheck import Floats, Inputs, exact
from attention.masks import Mask, in_type

NAMES = ("output", "dQ", "dK", "dV", "gradient of the sinks")


def wrong(given: Inputs, call: Call, found: Sequence[mx.array]) -> list[str]:
    """What breaks the rule: output, dQ, dK, dV, and the sinks' gradient, as far as they are given."""
    right = [selfcheck.reference(given, call)[0], *selfcheck.reference_gradients(given, call)][: len(found)]
    plain = plain_results(given, call)
    dtype = str(given.q.dtype).removeprefix("mlx.core.")
    problems = []
    for index, (result, expected, rough) in enumerate(zip(found, right, plain, strict=False)):
        if index == 4:  # float32 whatever the type of q, and so not what the rule is made for
            error, allowed = selfcheck.relative_error(result, expected, floor=0.1), selfcheck.TOLERANCE[dtype]
        else:
            error = largest(exact(result) - expected)
            allowed = (3 if index else 2) * largest(exact(rough) - expected) + rounding(expected, rough.dtype)
        if not error <= allowed:
            problems.append(f"{NAMES[index]}: {error:.2g} off, {allowed:.2g} allowed")
    return problems


def plain_results(given: Inputs, call: Call) -> list[mx.array]:
    """Output and gradients by plain attention in the inputs' own precision."""
    group = given.q.shape[1] // given.k.shape[1]
    whole = Mask(causal=call.causal, window=call.window).whole(given.q.shape[2], given.k.shape[2])
    seen = mx.ones((given.q.shape[2], given.k.shape[2]), mx.bool_) if whole is None else whole
    if given.mask is not None:
        seen = seen & (given.mask if given.mask.dtype == mx.bool_ else ~mx.isneginf(given.mask))
    sighted = seen.any(axis=-1, keepdims=True)

    def attend_plainly(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> mx.array:
        scores = (q * call.scale) @ mx.repeat(k, group, axis=1).swapaxes(-1, -2)
        if call.softcap is not None:
            scores = call.softcap * mx.tanh(scores / call.softcap)
        if given.mask is not None and given.mask.dtype != mx.bool_:
            scores = scores + mx.where(seen, in_type(given.mask, q.dtype), mx.zeros((), q.dtype))
        scores = mx.where(seen | ~sighted, scores, mx.array(-mx.inf, q.dtype))
        if call.sinks:
            column = mx.broadcast_to(sinks[:, None, None].astype(q.dtype), (*scores.shape[:3], 1))
            scores = mx.concatenate([scores, column], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)[..., : k.shape[2]]
        return mx.where(sighted, weights @ mx.repeat(v, group, axis=1), mx.zeros((), q.dtype))

    sinks = mx.zeros(given.q.shape[1]) if given.sinks is None else given.sinks
    outputs, pulled = mx.vjp(attend_plainly, [given.q, given.k, given.v, sinks], [given.cotangent])
    return [*outputs, *pulled]


def rounding(expected: Floats, dtype: mx.Dtype) -> float:
    """2 max|ref + 0.3 - 0.3 - ref| in the precision in question."""
    low = mx.array(expected.astype(np.float32)).astype(dtype)
    return 2 * largest(exact((low + mx.array(0.3, dtype)) - mx.array(0.3, dtype)) - exact(low))


def largest(difference: Floats) -> float:
    return float(np.abs(difference).max())  # NaN if any is NaN
