"""The merge of partial results, which ranks have of their own keys, by their logsumexps."""

from functools import reduce

import mlx.core as mx


@mx.compile
def merged(outs: mx.array, sums: mx.array) -> tuple[mx.array, mx.array]:
    """Return output and logsumexp of partial results; ranks are unrolled, so that it is one elementwise kernel.

    Args:
        outs: (ranks, B, H, rows, Dv).
        sums: the logsumexp of each, (ranks, B, H, rows); -inf where a rank's keys are not visible.
    """
    ranks = range(outs.shape[0])
    top = reduce(mx.maximum, [sums[rank] for rank in ranks])
    base = mx.where(top == -mx.inf, 0.0, top)
    weights = [mx.exp(sums[rank] - base) for rank in ranks]
    total = reduce(mx.add, weights)
    nothing = total == 0
    divisor = mx.where(nothing, 1.0, total)
    parts = [outs[rank].astype(mx.float32) * (weights[rank] / divisor)[..., None] for rank in ranks]
    logsumexp = mx.where(nothing, -mx.inf, base + mx.log(divisor))
    return reduce(mx.add, parts).astype(outs.dtype), logsumexp
