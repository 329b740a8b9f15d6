"""Attention in 8 bits by a published recipe, in float64: the measure of what an error in 8 bits should be.

SageAttention 2 on Hopper (Zhang et al., arXiv 2411.10958): Q and K in int8 by blocks of rows, K without its mean over
the keys, which softmax does not notice; P and V in e4m3, V by channel.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from attention.measure.reference import Array, Rules, forward

QUERY_BLOCK: Final = 64
KEY_BLOCK: Final = 128
LARGEST_E4M3: Final = 448.0
MIN_STEP: Final = 1e-30


def recipe_output(q: Array, k: Array, v: Array, rules: Rules, rows: NDArray[np.intp] | None = None) -> Array:
    """Return the recipe's output for one query head: (rows, Dv); arguments as in `reference.forward`."""
    step = np.maximum(np.abs(v).max(axis=0), MIN_STEP) / LARGEST_E4M3
    values = e4m3(v / step) * step
    found = forward(_int8(q, QUERY_BLOCK), _int8(k - k.mean(axis=0), KEY_BLOCK), values, rules, rows).probabilities
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
