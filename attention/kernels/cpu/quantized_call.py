"""Calls of the compiled kernel for quantized keys and values."""

from types import ModuleType
from typing import Final

import mlx.core as mx

from attention.core.kv_format import Format
from attention.quantized_kv import QuantizedArray

_MODES: Final = ("none", "affine", "mxfp8", "mxfp4", "nvfp4")
"""As in problem.hpp."""
NO_LISTS: Final = (None, None, None, None, 0, 0)
"""Slopes, the arrays of block lists and their planes, where there are none."""


def code(form: Format) -> tuple[int, int, int]:
    """Return a format as the kernel takes it: mode, bits and group size."""
    return _MODES.index(form.mode), form.bits, form.group_size


def is_quantized(k: object, v: object) -> bool:
    """Return whether keys or values are quantized."""
    return type(k) is QuantizedArray or type(v) is QuantizedArray


def attend(
    module: ModuleType,
    q: mx.array,
    k: mx.array | QuantizedArray,
    v: mx.array | QuantizedArray,
    options: tuple[object, ...],
    listed: tuple[object, ...] = NO_LISTS,
    *,
    logsumexp: bool = False,
) -> tuple[mx.array, mx.array | None]:
    """Return the output, and the logsumexp if it is requested.

    Args:
        module: the compiled kernel.
        q: (B, H, Lq, D).
        k: quantized, of width D.
        v: quantized.
        options: scale, causal, window, softcap, mask and number of items.
        listed: slopes and block lists.
        logsumexp: whether it is requested.

    Raises:
        ValueError: one of k and v is not quantized, or shapes, dtypes or values are invalid.
    """
    if not (isinstance(k, QuantizedArray) and isinstance(v, QuantizedArray)):
        raise ValueError("k, v: got one quantized and one not; both are, or neither")  # noqa: TRY004
    parts = (k.scales, k.biases, v.scales, v.biases)
    formats = [code(x.format) for x in (k, v)]
    results: tuple[mx.array, mx.array | None] = module.flash_attention_quantized(
        q, k.numbers, v.numbers, *options, *listed, *parts, *formats, logsumexp
    )
    return results
