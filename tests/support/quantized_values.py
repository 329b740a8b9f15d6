"""Quantized arrays in numpy: their exact values in float64, decoded from the parts, and views of longer buffers."""

import mlx.core as mx
import numpy as np

from attention.quantized_kv import QuantizedArray, quantized

FORMATS = (
    *(f"int{bits}:{group}" for bits in (8, 6, 5, 4, 3, 2) for group in (32, 64, 128)),
    *("mxfp8", "mxfp4", "nvfp4"),
)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(bits: np.ndarray) -> np.ndarray:
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10))
    return np.where(bits & 127 == 127, np.nan, np.where(bits & 128, -size, size))


def _codes(x: QuantizedArray) -> np.ndarray:
    """Return the number of each value, bit by bit from the words."""
    words = np.array(mx.contiguous(x.numbers))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    each = bits.reshape(*words.shape[:-1], -1, x.format.bits).astype(np.int64)
    return (each << np.arange(x.format.bits)).sum(-1)


def exact(x: QuantizedArray) -> np.ndarray:
    """Return the values in float64."""
    codes, mode = _codes(x), x.format.mode
    if mode == "affine":
        scale, bias = (np.array(part.astype(mx.float32)).astype(float) for part in (x.scales, x.biases))
        return codes * scale.repeat(x.format.group_size, -1) + bias.repeat(x.format.group_size, -1)
    numbers = e4m3(codes) if mode == "mxfp8" else np.where(codes & 8, -1, 1) * _E2M1[codes & 7]
    raw = np.array(x.scales).astype(np.int64)
    scale = e4m3(raw) if mode == "nvfp4" else 2.0 ** (raw - 127.0)
    return numbers * scale.repeat(x.format.group_size, -1)


def laid_out(x: QuantizedArray, layout: int) -> QuantizedArray:
    """Return the array in another memory layout.

    1: heads side by side, (B, L, H, D). 2: a view of a longer buffer, as of a cache that grows in steps. 3: the last
    axis not contiguous.
    """

    def moved(part: mx.array) -> mx.array:
        if layout == 1:
            return mx.contiguous(part.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        if layout == 2:
            return mx.pad(part, [(0, 0), (0, 0), (3, 40), (0, 0)], constant_values=77)[:, :, 3:-40]
        if layout == 3:
            return mx.contiguous(part.swapaxes(2, 3)).swapaxes(2, 3)
        return part

    return x.with_arrays([moved(part) for part in x.arrays])


def normal(seed: int, shape: tuple[int, ...], dtype: mx.Dtype, form: str) -> QuantizedArray:
    """Return normal numbers with a few large channels, as keys of models have, quantized."""
    random = np.random.default_rng(seed)
    numbers = random.standard_normal(shape) * np.where(np.arange(shape[-1]) % 37 == 5, 6.0, 1.0)
    return quantized(mx.array(numbers.astype(np.float32)).astype(dtype), form)
