"""Attention in 8 bits in float64: the recipe of the CUDA kernels step by step, and SageAttention's published one.

Arrays are those of one head: q (Lq, D), k (Lk, D), v (Lk, D).
"""

import math

import numpy as np

LARGEST = 448.0
BLOCK = 128
QUERY_BLOCK = 64
SAMPLED = 32
WEIGHT = 2.0**5
HEADROOM = 3.75
WARP_ROWS = 16


def e4m3(x):
    """Round to the nearest e4m3 value, ties to even: 3 bits after the leading one, from 2^-9, saturating at 448."""
    x = np.asarray(x, np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-60)))
    step = 2.0 ** (np.maximum(exponent, -6) - 3)
    return np.clip(np.round(x / step) * step, -LARGEST, LARGEST)


def decode(codes):
    """Return the values of e4m3 codes (uint8)."""
    codes = np.asarray(codes).astype(np.int64)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, (1 + fraction / 8) * 2.0 ** (exponent - 7), fraction * 2.0**-9)
    return np.where(codes & 128, -size, size)


def exponent_for(largest):
    """Return the exponent of the smallest power of two by which `largest` is at most 448."""
    return int(np.clip(math.ceil(math.log2(largest / LARGEST)), -30, 60)) if largest > 0 else -30


def quantized(x, rows):
    """Return blocks of rows in e4m3, times their powers of two; and the exponents."""
    made, exponents = np.empty_like(x, np.float64), []
    for first in range(0, len(x), rows):
        exponents.append(exponent_for(np.abs(x[first : first + rows]).max()))
        made[first : first + rows] = e4m3(x[first : first + rows] * 2.0 ** -exponents[-1]) * 2.0 ** exponents[-1]
    return made, exponents


def sampled_mean(k):
    """Return the mean of keys from equal parts of the sequence, at another place in each."""
    count = min(len(k), SAMPLED)
    return k[[(SAMPLED * i + i * 19 % SAMPLED) * len(k) // (SAMPLED * count) for i in range(count)]].mean(axis=0)


def operands(q, k, v, scale):
    """Return q in exponents of 2, k without its mean, and v, all quantized."""
    return (
        quantized(q * scale * math.log2(math.e), QUERY_BLOCK)[0],
        quantized(k - sampled_mean(k), BLOCK)[0],
        quantized(v, BLOCK)[0],
    )


def visible(queries, keys, causal=False, window=None):
    """Return the visible pairs, lower-right aligned; a window implies causal."""
    at = np.arange(queries)[:, None] + keys - queries
    shown = np.ones((queries, keys), bool)
    if causal or window is not None:
        shown &= np.arange(keys) <= at
    if window is not None:
        shown &= np.arange(keys) > at - window
    return shown


def raised_base(base, most):
    """Return the bases of rows by the kernels' rule: a warp's are raised once a score exceeds one by HEADROOM."""
    exceeded = np.maximum(most, 0) > base + HEADROOM
    warps = np.arange(len(base)) // WARP_ROWS
    return np.where(np.isin(warps, warps[exceeded]), np.maximum(base, np.ceil(most)), base)


def attend_quantized(q, k, v, shown, round_weights=e4m3, base_of=raised_base, sum_rounded=True):
    """Return attention over quantized operands: tiles of keys from the last to the first, weights in e4m3.

    The kernels divide by the sum of the rounded weights.
    """
    scores = np.where(shown, q @ k.T, -np.inf)
    largest, total, out = np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros((len(q), v.shape[1]))
    for first in reversed(range(0, len(k), BLOCK)):
        part = scores[:, first : first + BLOCK]
        new = base_of(largest, part.max(axis=1))
        base = np.where(np.isfinite(new), new, 0)
        weights = np.exp2(part - base[:, None]) * WEIGHT
        rounded = round_weights(weights)
        factor = np.exp2(largest - base)
        total = total * factor + (rounded if sum_rounded else weights).sum(axis=1)
        out = out * factor[:, None] + rounded @ v[first : first + BLOCK]
        largest = new
    return np.divide(out, total[:, None], out=np.zeros_like(out), where=total[:, None] > 0)


def kernel_recipe(q, k, v, scale, causal=False, window=None):
    """Return the attention of the CUDA kernels' recipe."""
    return attend_quantized(*operands(q, k, v, scale), visible(len(q), len(k), causal, window))


def _int8(x, rows):
    made = np.empty_like(x, np.float64)
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        step = max(np.abs(part).max() / 127, 1e-30)
        made[first : first + rows] = np.round(part / step) * step
    return made


def sage(q, k, v, scale, causal=False, window=None):
    """Return the attention of SageAttention 2's recipe for Hopper.

    Q and K in int8 by blocks of 64 and 128 rows, K without its mean; V in e4m3 by channel; P in e4m3 times 448.
    """
    q8 = _int8(q * scale * math.log2(math.e), QUERY_BLOCK)
    k8 = _int8(k - k.mean(axis=0), BLOCK)
    step = np.maximum(np.abs(v).max(axis=0), 1e-30) / LARGEST
    v8 = e4m3(v / step) * step
    shown = visible(len(q), len(k), causal, window)

    def round_weights(weights):
        return e4m3(weights * LARGEST / WEIGHT) * WEIGHT / LARGEST

    return attend_quantized(q8, k8, v8, shown, round_weights, np.maximum, sum_rounded=False)


def exact(q, k, v, scale, causal=False, window=None):
    """Return attention in float64."""
    scores = np.where(visible(len(q), len(k), causal, window), q @ k.T * scale, -np.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights @ v, total, out=np.zeros((len(q), v.shape[1])), where=total > 0)


def relative_rmse(found, expected):
    """Return the root mean square error of a result relative to the root mean square of the expected one."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
