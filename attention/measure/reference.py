"""The float64 reference: attention and its gradients in numpy, independent of the code it checks.

All functions take one query head; the caller loops over batches and heads. MLX's float64 exp has only float32 accuracy
on the CPU, so nothing here uses MLX.

`recipe_output` is attention in 8 bits by a published recipe, the measure of what an error in 8 bits should be:
SageAttention 2 on Hopper (Zhang et al., arXiv 2411.10958), Q and K in int8 by blocks of rows, K without its mean over
the keys, which softmax does not notice; P and V in e4m3, V by channel.
"""

from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from attention.core.mask_text import ALL_VISIBLE, BLOCK, MaskSpec, block_count, draw_blocks

Array = NDArray[np.float64]
INT8_QUERY_BLOCK: Final = 64
INT8_KEY_BLOCK: Final = 128
LARGEST_E4M3: Final = 448.0
MIN_STEP: Final = 1e-30


class Rules(Struct, frozen=True, kw_only=True):
    """Scale, mask, softcap and sink of one head's scores."""

    scale: float
    causal: bool = False
    window: int | None = None
    spec: MaskSpec = ALL_VISIBLE
    """The parts of a mask string."""
    head: int = 0
    """The head, which random blocks depend on."""
    mask: Any = None
    """(Lq, Lk) numpy array, bool or additive."""
    softcap: float | None = None
    sink: float | None = None
    """An extra logit in the softmax of every row, without a value."""


class Result(Struct, frozen=True):
    """The result of one query head, for the selected rows."""

    output: Array
    """(rows, Dv)"""
    probabilities: Array
    """(rows, Lk)"""
    slope: Array | float
    """Derivative of the capped score with respect to the scaled one, (rows, Lk) or 1."""
    logsumexp: Array
    """(rows,), -inf in fully masked rows."""


def forward(q: Array, k: Array, v: Array, rules: Rules, rows: NDArray[np.intp] | None = None) -> Result:
    """Compute attention for one query head.

    Args:
        q: (Lq, D).
        k: (Lk, D).
        v: (Lk, Dv).
        rules: scale, masks and softcap.
        rows: the query rows to compute; all by default.

    Returns:
        The output, zero in fully masked rows, and what the backward pass needs.
    """
    rows = np.arange(len(q)) if rows is None else rows
    scores = (q[rows] @ k.T) * rules.scale
    slope: Array | float = 1.0
    if rules.softcap is not None:
        squashed = np.tanh(scores / rules.softcap)
        scores, slope = rules.softcap * squashed, 1.0 - squashed**2
    if rules.mask is not None:
        chosen = rules.mask[rows]
        scores = np.where(chosen, scores, -np.inf) if chosen.dtype == np.bool_ else scores + chosen
    scores = np.where(_seen(rows, len(q), len(k), rules), scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = top if rules.sink is None else np.maximum(top, rules.sink)
    finite_top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(scores - finite_top)
    total = weights.sum(axis=-1, keepdims=True)
    total = total if rules.sink is None else total + np.exp(rules.sink - finite_top)
    probabilities = weights / np.where(total == 0.0, 1.0, total)
    with np.errstate(divide="ignore"):
        return Result(probabilities @ v, probabilities, slope, (top + np.log(total))[:, 0])


def sensitivity(
    q: Array, k: Array, v: Array, rules: Rules, result: Result, rows: NDArray[np.intp] | None = None
) -> Array:
    """Return a first-order bound of each row's rounding error, in units of the relative rounding error: (rows,).

    A relative rounding error e of query, key, score and mask changes the weight of key j by at most
    e p_j (1 + |scale| |q| |k_j| + |mask_j|), with Euclidean norms, and the output by that times the largest |v_j|.
    Arguments as in `forward`, whose result this takes.
    """
    rows = np.arange(len(q)) if rows is None else rows
    sizes = abs(rules.scale) * np.linalg.norm(q[rows], axis=-1)[:, None] * np.linalg.norm(k, axis=-1)[None]
    sizes = 1.0 + result.slope * sizes
    if rules.softcap is not None:
        sizes = sizes + rules.softcap * np.sqrt(np.maximum(0.0, 1.0 - result.slope))  # the capped score itself
    if rules.mask is not None and rules.mask.dtype != np.bool_:
        added = np.abs(rules.mask[rows])
        sizes = sizes + np.where(np.isinf(added), 0.0, added)
    bound: Array = (result.probabilities * sizes) @ np.abs(v).max(axis=-1, initial=0.0)
    return bound


def gradients(
    q: Array, k: Array, v: Array, cotangent: Array, rules: Rules, rows: NDArray[np.intp] | None = None
) -> tuple[Array, Array, Array]:
    """Differentiate sum(output * cotangent), where the cotangent is zero outside the given rows.

    Args:
        q: (Lq, D).
        k: (Lk, D).
        v: (Lk, Dv).
        cotangent: (Lq, Dv).
        rules: scale, masks and softcap.
        rows: the query rows whose cotangent is not zero; all by default.

    Returns:
        dQ (rows, D), dK (Lk, D), dV (Lk, Dv).
    """
    return all_gradients(q, k, v, cotangent, rules, rows=rows)[:3]


def all_gradients(
    q: Array,
    k: Array,
    v: Array,
    cotangent: Array,
    rules: Rules,
    of_logsumexp: Array | None = None,
    rows: NDArray[np.intp] | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Differentiate sum(output * cotangent) + sum(logsumexp * of_logsumexp); arguments as in `gradients`.

    Args:
        q: (Lq, D).
        k: (Lk, D).
        v: (Lk, Dv).
        cotangent: (Lq, Dv).
        rules: scale, masks, softcap and sink.
        of_logsumexp: (rows,), the cotangent of the logsumexp; 0 by default.
        rows: the query rows whose cotangent is not zero; all by default.

    Returns:
        dQ (rows, D), dK (Lk, D), dV (Lk, Dv), and each row's contribution to the sink's gradient (rows,), 0 without a
        sink.
    """
    rows = np.arange(len(q)) if rows is None else rows
    result = forward(q, k, v, rules, rows)
    probabilities, upstream = result.probabilities, cotangent[rows]
    d_probabilities = upstream @ v.T
    mean = (d_probabilities * probabilities).sum(axis=-1, keepdims=True)
    mean = mean if of_logsumexp is None else mean - of_logsumexp[:, None]
    d_scores = probabilities * (d_probabilities - mean) * result.slope * rules.scale
    # a sink is a key with value 0: dP is 0
    d_sink = np.zeros(len(rows)) if rules.sink is None else -np.exp(rules.sink - result.logsumexp) * mean[:, 0]
    return d_scores @ k, d_scores.T @ q[rows], probabilities.T @ upstream, d_sink


def _seen(rows: NDArray[np.intp], seq: int, kv_seq: int, rules: Rules) -> NDArray[np.bool_]:
    position = rows[:, None] + (kv_seq - seq)
    key = np.arange(kv_seq)[None, :]
    seen = np.ones((len(rows), kv_seq), dtype=np.bool_)
    if rules.causal or rules.window is not None:
        seen &= key <= position
    if rules.window is not None:
        seen &= key > position - rules.window
    if rules.spec != ALL_VISIBLE:
        seen &= visible(rules.spec, rows, seq, kv_seq, rules.head)
    return seen


def visible(spec: MaskSpec, rows: NDArray[np.intp], seq: int, kv_seq: int, head: int = 0) -> NDArray[np.bool_]:
    """Return the pairs that a mask string shows to some query rows of a head: bool (rows, Lk).

    It follows the definitions in `core.mask_text`, and shares nothing with `attention.masks` but the random blocks.
    """
    position, key = rows[:, None] + (kv_seq - seq), np.arange(kv_seq)[None, :]
    seen = np.full((len(rows), kv_seq), spec == ALL_VISIBLE)
    if spec.causal:
        seen |= key <= position
    if spec.window:
        seen |= (key <= position) & (key > position - spec.window)
    if spec.documents:
        seen |= (key <= position) & (key // spec.documents == position // spec.documents)
    if spec.strided:
        count, stride = spec.strided
        distance = position - key
        seen |= (distance >= 0) & (distance % stride == 0) & (distance < count * stride)
    if spec.prefix:
        seen |= key < spec.prefix
    if spec.blocks:
        choice = draw_blocks(spec.blocks, seq, kv_seq, head)
        shown = np.zeros((len(choice), block_count(kv_seq)), dtype=np.bool_)
        np.put_along_axis(shown, np.array(choice), values=True, axis=1)
        seen |= shown[rows // BLOCK].repeat(BLOCK, axis=1)[:, :kv_seq]
    return seen


def recipe_output(q: Array, k: Array, v: Array, rules: Rules, rows: NDArray[np.intp] | None = None) -> Array:
    """Return the recipe's output for one query head: (rows, Dv); arguments as in `reference.forward`."""
    step = np.maximum(np.abs(v).max(axis=0), MIN_STEP) / LARGEST_E4M3
    values = e4m3(v / step) * step
    found = forward(
        _int8(q, INT8_QUERY_BLOCK), _int8(k - k.mean(axis=0), INT8_KEY_BLOCK), values, rules, rows
    ).probabilities
    largest = np.maximum(found.max(axis=-1, keepdims=True), MIN_STEP) / LARGEST_E4M3
    output: Array = (e4m3(found / largest) * largest) @ values
    return output


def e4m3(x: Array) -> Array:
    """Round to the nearest e4m3 value, saturating."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-20)))
    step = 2.0 ** (np.maximum(exponent, -6.0) - 3.0)
    rounded: Array = np.clip(np.round(x / step) * step, -LARGEST_E4M3, LARGEST_E4M3)
    return rounded


def _int8(x: Array, block: int) -> Array:
    """Round blocks of rows to 127 steps of each sign."""
    made = np.empty_like(x)
    for first in range(0, len(x), block):
        part = x[first : first + block]
        step = max(float(np.abs(part).max()) / 127, MIN_STEP)
        made[first : first + block] = np.round(part / step) * step
    return made
