"""Attention and its gradients in float64, and plain attention in the inputs' own precision."""

import os
from collections.abc import Callable
from typing import Final

import mlx.core as mx
import numpy as np

from tests.fuzz.problem import Floats, Problem, exact


def visible(problem: Problem) -> tuple[np.ndarray, Floats | None]:
    """Return which pairs are not ruled out, bool (B, H, Lq, Lk), and what is added to the scores, if anything."""
    shape = problem.score_shape
    keep = np.ones(shape, bool)
    position = np.arange(shape[2])[:, None] + shape[3] - shape[2]
    key = np.arange(shape[3])[None]
    if isinstance(problem.mask, str) or problem.window is not None:
        keep &= key <= position
    if problem.window is not None:
        keep &= key > position - problem.window
    if problem.seen is not None:
        keep &= problem.seen
    if problem.slopes is not None:
        return keep, np.array(problem.slopes)[None, :, None, None] * (key - position)
    if not isinstance(problem.mask, mx.array):
        return keep, None
    if problem.mask.dtype == mx.bool_:
        return keep & np.broadcast_to(np.array(problem.mask), shape), None
    return keep, np.broadcast_to(exact(problem.mask), shape)


def multiplies_in_tf32(problem: Problem) -> bool:
    """Return whether implementations may multiply the matrices of a problem in TF32: on CUDA, where MLX does.

    float16 is widened to float32 where its scores could overflow.
    """
    on_cuda = mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)
    is_on = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    return on_cuda and is_on and problem.q.dtype in (mx.float32, mx.float16)


def in_tf32(x: Floats) -> Floats:
    """Round to the 10 bits of TF32's fraction, to nearest and ties to even, as MLX's products do on an H200."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    half = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def largest_score(problem: Problem) -> float:
    """Return the largest magnitude of a score, before a softcap."""
    q, k = exact(problem.q), exact(problem.k)
    keys = np.repeat(k, q.shape[1] // k.shape[1], 1)
    return float(np.abs((q @ keys.swapaxes(-1, -2)) * problem.factor).max(initial=0))


def expected(
    problem: Problem,
    keep: np.ndarray,
    added: Floats | None,
    is_sum_in_float32: bool = False,
    is_product_in_tf32: bool = False,
) -> list[Floats]:
    """Return the output and, with a cotangent, the gradients of q, k, v and, where it is checked, the mask.

    `is_sum_in_float32` rounds the sums of scores and mask: beside a mask of -1e9 float32 cannot represent a score.
    `is_product_in_tf32` rounds the factors of all matrix products, and the query times the scale.
    """
    rounded = in_tf32 if is_product_in_tf32 else lambda x: x
    q, k, v = (rounded(exact(x)) for x in (problem.q, problem.k, problem.v))
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = rounded(exact(problem.q) * problem.factor) @ keys.swapaxes(-1, -2)
    slope: Floats | float = 1.0
    if problem.softcap is not None:
        squashed = np.tanh(scores / problem.softcap)
        scores, slope = problem.softcap * squashed, 1 - squashed * squashed
    if added is not None:
        scores = scores + added
        if is_sum_in_float32:
            scores = np.where(np.isinf(added), added, scores).astype(np.float32).astype(np.float64)
    scores = np.where(keep, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    output = rounded(weights) @ values
    if problem.cotangent is None:
        return [output]
    cotangent = rounded(exact(problem.cotangent))
    by_weight = cotangent @ values.swapaxes(-1, -2)
    by_masked = weights * (by_weight - (by_weight * weights).sum(-1, keepdims=True))
    by_score = by_masked * slope * problem.factor

    def of_shared(x: Floats) -> Floats:  # summed over the heads that share a key head
        return np.asarray(x.reshape(x.shape[0], k.shape[1], group, *x.shape[2:]).sum(2))

    by_key = rounded(by_score).swapaxes(-1, -2) @ q
    by_value = rounded(weights).swapaxes(-1, -2) @ cotangent
    made = [output, rounded(by_score) @ keys, of_shared(by_key), of_shared(by_value)][: 1 + problem.differentiated]
    if problem.has_mask_gradient and isinstance(problem.mask, mx.array):
        made.append(reduced(by_masked, problem.mask.shape))
    return made


MAX_PARTIAL_SUMS: Final = 32
"""Roundings of a sum in `recomputed_results`; a kernel's sums have as many or fewer."""


ORDERS: Final = ("backwards", "odd first")
"""Orders in which a recomputed score may be added up, beside that of the forward pass."""


def _product(a: np.ndarray, b: np.ndarray, order: str = "forwards") -> np.ndarray:
    """Return a b in float32; the products are added up in an order of `ORDERS`."""
    width = a.shape[-1]
    step = max(1, -(-width // MAX_PARTIAL_SUMS))
    made = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    starts = range(0, width, step)
    for first in {"forwards": starts, "backwards": starts[::-1], "odd first": [*starts[1::2], *starts[::2]]}[order]:
        made += a[..., first : first + step] @ b[..., first : first + step, :]
    return made


def recomputed_results(problem: Problem, keep: np.ndarray, added: Floats | None, order: str) -> list[Floats]:
    """Return the results in float32 as a backward pass has them that recomputes the weights, without a mask's gradient.

    As in FlashAttention, the rows' maxima and sums are those of the forward pass, and the scores are computed again,
    here with the factor on the query and the products added up in another order of `ORDERS`. A score s, the sum of
    q_d k_d, has an error of about 2**-24 (|s| + sum |q_d k_d|), another one in each pass, and a weight exp(s - max)/sum
    has the difference of the two as its relative error; with a softcap c, the factor 1 - tanh(s / c)**2 of a gradient
    has up to 2 / c times that. Plain attention uses one rounded score throughout, and its weights add to 1:
    where they nearly are 0 and 1, its gradients have no such error at all.
    """
    q, k, v = (exact(x).astype(np.float32) for x in (problem.q, problem.k, problem.v))
    group = q.shape[1] // k.shape[1]
    keys, values, factor = np.repeat(k, group, 1), np.repeat(v, group, 1), np.float32(problem.factor)
    finite = None
    if added is not None:
        most = float(np.finfo(np.float32).max) / 2
        finite = np.where(np.isinf(added), added, np.clip(added, -most, most)).astype(np.float32)

    def scores(order: str) -> tuple[np.ndarray, np.ndarray | float]:
        if order == "forwards":
            made = _product(q, keys.swapaxes(-1, -2)) * factor
        else:
            made = _product(q * factor, keys.swapaxes(-1, -2), order)
        slope = 1.0
        if problem.softcap is not None:
            squashed = np.tanh(made / np.float32(problem.softcap))
            made, slope = np.float32(problem.softcap) * squashed, 1 - squashed * squashed
        return np.where(keep, made if finite is None else made + finite, np.float32(-np.inf)), slope

    first, _ = scores("forwards")
    top = first.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), np.float32(0), top)
    total = np.exp(first - top).sum(-1, keepdims=True)
    inverse = 1 / np.where(total == 0, np.float32(1), total)
    output = _product(np.exp(first - top) * inverse, values)
    if problem.cotangent is None:
        return [output.astype(np.float64)]
    again, slope = scores(order)
    weights, cotangent = np.exp(again - top) * inverse, exact(problem.cotangent).astype(np.float32)
    by_weight = _product(cotangent, values.swapaxes(-1, -2))
    by_score = weights * (by_weight - (cotangent * output).sum(-1, keepdims=True)) * slope * factor

    def of_shared(x: np.ndarray) -> np.ndarray:
        return np.asarray(x.reshape(x.shape[0], k.shape[1], group, *x.shape[2:]).sum(2))

    of_keys = of_shared(_product(by_score.swapaxes(-1, -2), q))
    made = [output, _product(by_score, keys), of_keys, of_shared(_product(weights.swapaxes(-1, -2), cotangent))]
    return [x.astype(np.float64) for x in made[: 1 + problem.differentiated]]


def reduced(x: Floats, shape: tuple[int, ...]) -> Floats:
    """Sum an array over the axes along which an array of a shape was broadcast to it."""
    x = np.asarray(x.sum(axis=tuple(range(x.ndim - len(shape)))))
    spread = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return np.asarray(x.sum(axis=spread, keepdims=True))


def plain_results(problem: Problem, keep: np.ndarray, added: Floats | None, is_shifted: bool = False) -> list[Floats]:
    """Return the same as `expected` by plain attention in the inputs' own type.

    `is_shifted` subtracts the largest value of each row of an additive mask: beside -1e9 a 16-bit type keeps no score,
    so that without it gradients that cancel are exactly 0 by accident.
    """
    if added is not None and is_shifted:
        largest = np.where(keep, added, -np.inf).max(-1, keepdims=True)
        added = added - np.where(np.isfinite(largest), largest, 0.0)
    attend = _plain_attention(problem, keep, added)
    shift = mx.zeros((), problem.q.dtype)
    if problem.has_mask_gradient and isinstance(problem.mask, mx.array):
        shift = mx.zeros(problem.mask.shape, problem.q.dtype)
    dtype = problem.q.dtype
    keys, values = (
        mx.array(exact(x).astype(np.float32)).astype(dtype) if problem.packed else x for x in (problem.k, problem.v)
    )
    primals = [problem.q, keys, values, shift]
    if problem.cotangent is None:
        return [exact(attend(*primals))]
    outputs, gradients = mx.vjp(attend, primals, [problem.cotangent])
    of_mask = gradients[3:] if problem.has_mask_gradient else []
    return [exact(x) for x in (*outputs, *gradients[: problem.differentiated], *of_mask)]


def _plain_attention(problem: Problem, keep: np.ndarray, added: Floats | None) -> Callable[..., mx.array]:
    """Return plain attention of q, k, v and numbers, usually 0, that are added to the mask."""
    dtype = problem.q.dtype
    highest = np.where(keep, 0.0 if added is None else added, -np.inf).max(-1, keepdims=True)
    seen, sighted = mx.array(keep), mx.array(highest > -np.inf)
    finite = None
    if added is not None:  # any implementation has to keep a sum with the mask within its type
        most = float(mx.finfo(dtype).max) / 2
        clipped = np.where(np.isinf(added), added, np.clip(added, -most, most))
        finite = mx.array(clipped.astype(np.float32)).astype(dtype)

    def attend(q: mx.array, k: mx.array, v: mx.array, shift: mx.array) -> mx.array:
        group = q.shape[1] // k.shape[1]
        keys, values = mx.repeat(k, group, 1), mx.repeat(v, group, 1)
        scores = (q * mx.array(problem.factor, dtype)) @ keys.swapaxes(-1, -2)
        if problem.softcap is not None:
            scores = mx.tanh(scores / mx.array(problem.softcap, dtype)) * mx.array(problem.softcap, dtype)
        if finite is not None:
            scores = scores + mx.where(sighted, finite, mx.zeros((), dtype)) + shift
        scores = mx.where(seen | ~sighted, scores, mx.array(-mx.inf, dtype))
        output = mx.softmax(scores, axis=-1, precise=True) @ values
        return mx.where(sighted, output, mx.zeros((), dtype))

    return attend
