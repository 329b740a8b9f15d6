"""Comparison of kernels' results with float64 on small inputs, for the self-checks on first use.

The exact results are those of `measure.reference`, head by head. Query heads that share a key head follow each other.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from attention.measure import reference
from attention.measure.reference import Rules

if TYPE_CHECKING:
    import mlx.core as mx

Floats = NDArray[np.float64]
RulesOf = Callable[[int, int], Rules]
"""Returns the scale, mask, softcap and sink of a batch's head."""
TOLERANCE: Final = {"bfloat16": 1.2e-2, "float16": 1.5e-3, "float32": 2e-5}
"""Tolerance of a result relative to its norm: a few times the rounding error of its elements."""
LOGSUMEXP_TOLERANCE: Final = 1e-3


def exact(array: "mx.array") -> Floats:
    """Return an array's values in float64."""
    import mlx.core as mx

    return np.array(array.astype(mx.float32)).astype(np.float64)


def additive(mask: "mx.array") -> Floats:
    """Return a bool or additive mask as an additive one in float64."""
    import mlx.core as mx

    return np.where(np.array(mask), 0.0, -np.inf) if mask.dtype == mx.bool_ else exact(mask)


def results(q: Floats, k: Floats, v: Floats, rules_of: RulesOf) -> tuple[Floats, Floats]:
    """Return output (B, H, Lq, Dv) and logsumexp (B, H, Lq); fully masked rows give 0 and -inf."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    output, logsumexp = np.empty((batch, heads, queries, v.shape[3])), np.empty((batch, heads, queries))
    for b, h in np.ndindex(batch, heads):
        found = reference.forward(q[b, h], k[b, h // group], v[b, h // group], rules_of(b, h))
        output[b, h], logsumexp[b, h] = found.output, found.logsumexp
    return output, logsumexp


def gradients(
    q: Floats, k: Floats, v: Floats, cotangent: Floats, rules_of: RulesOf, of_logsumexp: Floats | None = None
) -> list[Floats]:
    """Return dQ, dK and dV, and each row's contribution to the gradient of its head's sink, (B, H, Lq).

    Args:
        q: (B, H, Lq, D).
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, Dv).
        cotangent: of the output.
        rules_of: the rules of each head.
        of_logsumexp: cotangent of the logsumexp (B, H, Lq), if it has one.
    """
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    made = [np.empty_like(q), np.zeros_like(k), np.zeros_like(v), np.empty(q.shape[:3])]
    for b, h in np.ndindex(batch, heads):
        by_logsumexp = None if of_logsumexp is None else of_logsumexp[b, h]
        arrays = (q[b, h], k[b, h // group], v[b, h // group], cotangent[b, h])
        d_q, d_k, d_v, d_sink = reference.all_gradients(*arrays, rules_of(b, h), by_logsumexp)
        made[0][b, h], made[3][b, h] = d_q, d_sink
        made[1][b, h // group] += d_k
        made[2][b, h // group] += d_v
    return made


def relative_error(found: "mx.array", expected: Floats, floor: float = 1e-30) -> float:
    """Return ||found - expected|| / ||expected||, elements of the latter at least `floor`; NaN if any element is."""
    whole = max(float(np.linalg.norm(expected)), floor * math.sqrt(expected.size))
    return float(np.linalg.norm(exact(found) - expected)) / whole


def logsumexp_gap(found: Floats, expected: Floats, relative_above: float = 1.0) -> float:
    """Return the largest difference where a value is expected, relative to values above `relative_above`."""
    masked = np.isneginf(expected)
    right = np.where(masked, 0, expected)
    apart = np.abs(np.where(masked, 0, found) - right)
    return float((apart / np.maximum(1, np.abs(right) / relative_above)).max())


def disagreement(
    output: "mx.array", logsumexp: "mx.array", expected: tuple[Floats, Floats], dtype: str, relative_above: float = 1.0
) -> str | None:
    """Return what is wrong with a forward pass of inputs in a dtype, in one line, or None."""
    error = relative_error(output, expected[0])
    if not error <= TOLERANCE[dtype]:
        return f"its output disagrees with the reference by {error:.2g}"
    found = exact(logsumexp)
    gap = logsumexp_gap(found, expected[1], relative_above)
    if not gap <= LOGSUMEXP_TOLERANCE or not np.array_equal(np.isneginf(found), np.isneginf(expected[1])):
        return f"its logsumexp disagrees with the reference by {gap:.2g}"
    return None


def gradient_disagreement(found: Sequence["mx.array"], expected: Sequence[Floats], dtype: str) -> str | None:
    """Return what is wrong with dQ, dK, dV, and the gradient of the sinks if present, in one line, or None."""
    names = ("dQ", "dK", "dV", "the gradient of the sinks")
    for name, gradient, right in zip(names[: len(expected)], found, expected, strict=True):
        error = relative_error(gradient, right, floor=0.1)
        if not error <= 2 * TOLERANCE[dtype]:
            return f"its {name} disagrees with the reference by {error:.2g}"
    return None
