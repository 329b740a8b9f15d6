"""One call of `attention()` to be checked, and its arrays."""

from dataclasses import dataclass, field
from typing import Final, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention.masks import Pattern
from attention.quantized_kv import KeyOrValue, QuantizedArray
from tests.support import quantized_values

Floats = NDArray[np.float64]
Mode = Literal["forward", "gradient", "demo"]
DTYPES: Final = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
NUM_LAYOUTS: Final = 9


@dataclass
class Problem:
    """The arguments of a call, the transformation that it runs under, and the budgets given to `practical`."""

    q: mx.array
    k: KeyOrValue
    v: KeyOrValue
    """k and v are both quantized, or neither is."""
    mask: "mx.array | str | Pattern | None"
    scale: float | None
    window: int | None
    softcap: float | None
    cotangent: mx.array | None = None
    """Cotangent of the output, if gradients are checked."""
    transform: str = "plain"
    """One of `judge.TRANSFORMS`."""
    budgets: dict[str, int] = field(default_factory=lambda: {"practical64k": 65536, "practical1M": 1 << 20})
    seen: "NDArray[np.bool_] | None" = None
    """The pairs that a mask as a value shows, (B, H, Lq, Lk)."""
    slopes: tuple[float, ...] | None = None
    """Slopes of ALiBi, one per head."""
    has_mask_gradient: bool = False
    """Whether the gradient of the mask is checked too."""
    may_be_refused: bool = False
    """Whether a usage error is a correct result."""
    largest_score: float = 0.0
    """Size of scores that plain attention need not round; in gradients, times that of the keys they are summed with."""
    facts: dict[str, object] = field(default_factory=dict)
    """The parameters the case was drawn with, for the log."""

    @property
    def packed(self) -> bool:
        """Whether keys and values are quantized."""
        return isinstance(self.k, QuantizedArray)

    @property
    def differentiated(self) -> int:
        """How many of q, k and v have gradients that are checked."""
        return 1 if self.packed else 3

    @property
    def factor(self) -> float:
        """The scale of the scores."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        """(B, H, Lq, Lk)."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]


def exact(array: KeyOrValue) -> Floats:
    """Return the values of an array in float64."""
    if isinstance(array, QuantizedArray):
        values: Floats = quantized_values.exact(array)
        return values
    if array.dtype == mx.float64:
        return np.array(array)
    return np.array(array.astype(mx.float32)).astype(np.float64)


def relaid(array: mx.array, layout: int) -> mx.array:
    """Return a 4-D array of the same values in another memory layout, one of `NUM_LAYOUTS`."""
    if layout == 1:  # axes 1 and 2 swapped, as models have heads inside of rows
        return mx.contiguous(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if layout == 2:
        return mx.contiguous(array.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    if layout == 3:  # every second row
        whole = mx.repeat(array, 2, axis=2)
        mx.eval(whole)
        return whole[:, :, ::2]
    if layout == 4:  # the left part of longer rows
        whole = mx.concatenate([array, mx.full(array.shape, 7.0).astype(array.dtype)], axis=3)
        mx.eval(whole)
        return whole[..., : array.shape[3]]
    if layout == 5:  # every third column
        whole = mx.repeat(array, 3, axis=3)
        mx.eval(whole)
        return whole[..., ::3]
    if layout == 6:  # an offset into memory, after NaN
        front = mx.full((1, *array.shape[1:]), float("nan")).astype(array.dtype)
        whole = mx.concatenate([front, array], axis=0)
        mx.eval(whole)
        return whole[1:]
    if layout == 7:  # rows in reversed order, a negative stride
        whole = mx.contiguous(array[:, :, ::-1])
        mx.eval(whole)
        return whole[:, :, ::-1]
    if layout == 8:  # columns apart
        return mx.contiguous(array.swapaxes(2, 3)).swapaxes(2, 3)
    return array
