"""Small inputs and float64 results for the self-check on first use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention.kernels.metal.call import CallParams, CallShape
from attention.kernels.metal.launch import Arrays, arrays_of
from attention.kernels.metal.lists import ListArrays, lists_of_pattern
from attention.kernels.metal.tiles import LIST_QUERIES
from attention.masks import Pattern, blocks, dilated, dtype_name

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TOLERANCE = {"bfloat16": 1.2e-2, "float16": 1.5e-3, "float32": 2e-5}
"""Tolerance of a result relative to its norm: a few times the rounding error of its elements."""
LOGSUMEXP_TOLERANCE = 1e-3
"""Tolerance of a logsumexp, relative if it is larger than 1."""
QUERIES, KEYS = 70, 83
LISTED_QUERIES, LISTED_KEYS = 100, 150
"""With block lists: two by three tiles, the last of them incomplete."""
COVER = {"float32": -1e9, "bfloat16": -1e9, "float16": -6e4}
"""Large finite values of additive masks, by dtype."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a self-check; `mask` to `seen` if the call has them."""

    q: mx.array
    k: mx.array
    v: mx.array
    cotangent: mx.array
    mask: mx.array | None
    sinks: mx.array | None
    logsumexp_cotangent: mx.array | None = None
    slopes: mx.array | None = None
    lists: ListArrays | None = None
    seen: Bools | None = None
    """The visible pairs of the lists."""

    def arrays(self, shape: CallShape) -> Arrays:
        """Return the arguments of the forward kernel."""
        whole = (shape.batch, shape.heads, shape.queries, shape.keys)
        mask = None if self.mask is None else mx.broadcast_to(self.mask, whole)
        return arrays_of(self.q, self.k, self.v, mask, self.sinks, self.slopes, self.lists)


def small_shape(shape: CallShape, lists: bool) -> CallShape:
    """Return a small shape that runs the same kernels, unless these split the keys."""
    queries, keys = (LISTED_QUERIES, LISTED_KEYS) if lists else (QUERIES, KEYS)
    return replace(shape, batch=1, heads=4, kv_heads=2, queries=queries, keys=keys)


def _pattern(shape: CallShape, random: np.random.Generator) -> Pattern:
    """Return a pattern with full, partial and empty tiles, which differ between heads, and empty rows of tiles."""

    def drawn(block: int, density: float) -> Pattern:
        cells = random.random((1, shape.heads, -(-shape.queries // block), -(-shape.keys // block))) < density
        if block == LIST_QUERIES:
            cells[:, 0, -1] = False
        return blocks(cells, block)

    return drawn(LIST_QUERIES, 0.7) & (drawn(LIST_QUERIES, 0.3) | drawn(16, 0.3) | dilated(shape.keys, 3))


def check_params(call: CallParams, small: CallShape) -> CallParams:
    """Return the call used to check another: equal compile-time constants, other values."""
    return replace(call, scale=small.head_dim**-0.5, window=None if call.window is None else 40)


def inputs(shape: CallShape, call: CallParams, seed: int = 7, logsumexp: bool = False) -> Inputs:
    """Return random inputs, optionally with a cotangent of the logsumexp.

    The mask hides all of row 0. An additive one fills row 1 with a large finite value, where the query is 0, so that
    the weights are equal. No array is contiguous: q is a slice within its rows, k and the cotangent have the heads
    axis inside the rows, as in models, and the columns of v are strided.
    """
    random = np.random.default_rng(seed)
    batch, dim, dtype = shape.batch, shape.head_dim, getattr(mx, shape.dtype)
    sizes = (
        (batch, shape.heads, shape.queries, dim + 8),
        (batch, shape.keys, shape.kv_heads, dim),
        (batch, shape.kv_heads, shape.keys, 2 * dim),
        (batch, shape.queries, shape.heads, dim),
    )
    q, k, v, cotangent = (mx.array(random.standard_normal(s, np.float32)).astype(dtype) for s in sizes)
    mask = None
    if call.mask in COVER:
        q[:, :, 1:2] = 0
    if call.mask != "none":
        seen = random.random((shape.heads, shape.queries, shape.keys)) < 0.7
        seen[:, 0] = False
        added = np.where(seen, random.standard_normal(seen.shape), -np.inf).astype(np.float32)
        added[:, 1:2] = COVER.get(call.mask, 0)
        mask = mx.array(seen) if call.mask == "bool" else mx.array(added).astype(getattr(mx, call.mask))
    sinks = mx.array(random.standard_normal(shape.heads, np.float32)) if call.sinks else None
    by_sum = mx.array(random.standard_normal((batch, shape.heads, shape.queries), np.float32)) if logsumexp else None
    slopes = mx.array(0.1 * random.random(shape.heads, np.float32)) if call.alibi else None
    arrays = (q[..., 4:-4], k.swapaxes(1, 2), v[..., ::2], cotangent.swapaxes(1, 2))
    given = Inputs(*arrays, mask, sinks, by_sum, slopes)
    if not call.lists:
        return given
    pattern = _pattern(shape, random)
    seen = np.array(pattern.dense((batch, shape.heads, shape.queries, shape.keys)))
    return replace(given, lists=lists_of_pattern(pattern, shape), seen=seen)


def exact(array: mx.array) -> Floats:
    """Return an array's values in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weights(given: Inputs, call: CallParams) -> tuple[Floats, Floats, Floats]:
    """Return softmax weights, logsumexp, and the derivative of the capped scores by the dot products."""
    q, k = exact(given.q), exact(given.k)
    scores = q @ np.repeat(k, q.shape[1] // k.shape[1], axis=1).swapaxes(-1, -2) * call.scale
    slope = np.full_like(scores, call.scale)
    if call.softcap is not None:
        squashed = np.tanh(scores / call.softcap)
        scores, slope = call.softcap * squashed, slope * (1 - squashed**2)
    queries, keys = scores.shape[2:]
    position, key = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
    if given.slopes is not None:
        scores = scores + exact(given.slopes)[:, None, None] * (key - position)
    if given.seen is not None:
        scores = np.where(given.seen, scores, -np.inf)
    if given.mask is not None:
        bool_mask = given.mask.dtype == mx.bool_
        scores = np.where(np.array(given.mask), scores, -np.inf) if bool_mask else scores + exact(given.mask)
    if call.causal:
        scores = np.where(key > position, -np.inf, scores)
    if call.window is not None:
        scores = np.where(key <= position - call.window, -np.inf, scores)
    if given.sinks is not None:
        sink = np.broadcast_to(exact(given.sinks)[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    largest = scores.max(axis=-1, keepdims=True)
    made = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    total = made.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return (made / np.where(total == 0, 1, total))[..., :keys], (largest + np.log(total))[..., 0], slope


def reference(given: Inputs, call: CallParams) -> tuple[Floats, Floats]:
    """Return output and logsumexp; fully masked rows give 0 and -inf."""
    found, logsumexp, _ = weights(given, call)
    v = exact(given.v)
    return found @ np.repeat(v, found.shape[1] // v.shape[1], axis=1), logsumexp


def reference_gradients(given: Inputs, call: CallParams) -> list[Floats]:
    """Return the gradients of q, k and v, and with sinks each row's contribution to theirs, (B, H, Lq)."""
    q, k, v, cotangent = (exact(x) for x in (given.q, given.k, given.v, given.cotangent))
    batch, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    found, logsumexp, slope = weights(given, call)
    by_weight = cotangent @ np.repeat(v, group, axis=1).swapaxes(-1, -2)
    mean = (found * by_weight).sum(axis=-1, keepdims=True)
    if given.logsumexp_cotangent is not None:
        mean = mean - exact(given.logsumexp_cotangent)[..., None]
    by_score = found * (by_weight - mean) * slope

    def summed(x: Floats) -> Floats:  # over the heads that share a key head
        return np.asarray(x.reshape(batch, kv_heads, group, *x.shape[2:]).sum(axis=2))

    by_key, by_value = by_score.swapaxes(-1, -2) @ q, found.swapaxes(-1, -2) @ cotangent
    made = [by_score @ np.repeat(k, group, axis=1), summed(by_key), summed(by_value)]
    if given.sinks is not None:
        made.append(np.asarray(-np.exp(exact(given.sinks)[:, None] - logsumexp) * mean[..., 0]))
    return made


def relative_error(found: mx.array, expected: Floats, floor: float = 1e-30) -> float:
    """Return ||found - expected|| / ||expected||, elements of the latter at least `floor`; NaN if any element is."""
    whole = max(float(np.linalg.norm(expected)), floor * math.sqrt(expected.size))
    return float(np.linalg.norm(exact(found) - expected)) / whole


def logsumexp_gap(found: Floats, expected: Floats) -> float:
    """Return the largest difference, relative if the expected value exceeds 1, without fully masked rows."""
    right = np.where(np.isneginf(expected), 0, expected)
    apart = np.where(np.isneginf(expected), 0, found) - right
    return float((np.abs(apart) / np.maximum(1, np.abs(right))).max())


def disagreement(given: Inputs, call: CallParams, output: mx.array, logsumexp: mx.array) -> str | None:
    """Return what is wrong with a call's results, in one line, or None."""
    expected, expected_logsumexp = reference(given, call)
    dtype = dtype_name(given.q.dtype)
    error = relative_error(output, expected)
    if not error <= TOLERANCE[dtype]:
        return f"its output disagrees with the reference by {error:.2g}"
    found, unseen = exact(logsumexp), np.isneginf(expected_logsumexp)
    gap = logsumexp_gap(found, expected_logsumexp)
    if not gap <= LOGSUMEXP_TOLERANCE or not np.array_equal(np.isneginf(found), unseen):
        return f"its logsumexp disagrees with the reference by {gap:.2g}"
    return None


def gradient_disagreement(given: Inputs, call: CallParams, found: Sequence[mx.array]) -> str | None:
    """Return what is wrong with the gradients of q, k, v and the sinks if present, in one line, or None."""
    dtype = dtype_name(given.q.dtype)
    names = ("dQ", "dK", "dV", "the gradient of the sinks")
    expected = reference_gradients(given, call)
    expected = [*expected[:3], *(rows.sum(axis=(0, 2)) for rows in expected[3:])]
    for name, gradient, right in zip(names[: len(expected)], found, expected, strict=True):
        error = relative_error(gradient, right, floor=0.1)
        if not error <= 2 * TOLERANCE[dtype]:
            return f"its {name} disagrees with the reference by {error:.2g}"
    return None
