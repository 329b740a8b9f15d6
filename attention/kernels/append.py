"""Quantization of new keys and values into the buffers of a cache."""

import functools
from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from attention.core.kv_format import Format, KVFormat
from attention.kernels import cpu

Parts = tuple[mx.array, ...]
"""The arrays of `mx.quantize`: numbers, scales and, in mode affine, biases."""
_TRIED_ROWS: Final = 3


def append_quantized(
    buffers: tuple[Sequence[mx.array], Sequence[mx.array]],
    keys: mx.array,
    values: mx.array,
    kv_format: KVFormat,
    *,
    row: int,
    used: int,
) -> tuple[tuple[Parts, Parts], tuple[Parts, Parts]]:
    """Quantize rows as `mx.quantize` does, and write them into buffers of packed keys and values.

    On MLX's CPU device this is one operation if the CPU kernel has been compiled, with results that equal those of
    `mx.quantize` bit for bit; elsewhere it is `mx.quantize` of both, and for each array an assignment and a slice. It
    is lazy, and has neither gradients nor vmap. A buffer is overwritten in place if nothing else refers to it when the
    operation is evaluated, no other array and no view, as in MLX's own assignments; otherwise it is copied first. So a
    cache replaces its arrays by those returned, and keeps no views from one call to the next.

    Args:
        buffers: the arrays of keys, and those of values: (B, Hkv, capacity, .). The arrays themselves may change.
        keys: (B, Hkv, S, D).
        values: (B, Hkv, S, Dv).
        kv_format: of keys and of values.
        row: the first row that is written.
        used: number of rows in use afterwards, counted from the first row of the buffers: at least row + S.

    Returns:
        The buffers, and views of their rows in use; of both the arrays of keys and those of values.
    """
    held = [*buffers[0], *buffers[1]]
    if mx.default_device() == mx.cpu and _is_fused(kv_format, keys, values, buffers):
        made = cpu.append_quantized(held, keys, values, kv_format, row, used)
    else:
        new = (*quantize(keys, kv_format.key), *quantize(values, kv_format.value))
        for buffer, part in zip(held, new, strict=True):
            buffer[..., row : row + part.shape[2], :] = part
        made = held if used == held[0].shape[2] else [*held, *(buffer[..., :used, :] for buffer in held)]
    count, split = len(held), len(buffers[0])
    whole, views = tuple(made[:count]), tuple(made[-count:])
    return (whole[:split], whole[split:]), (views[:split], views[split:])


def quantize(x: mx.array, form: Format) -> Parts:
    """Return `mx.quantize` of an array in a format."""
    return tuple(mx.quantize(x, form.group_size, form.bits, form.mode))


def _is_fused(
    kv_format: KVFormat, keys: mx.array, values: mx.array, buffers: tuple[Sequence[mx.array], Sequence[mx.array]]
) -> bool:
    if not (_loads() or cpu.is_loaded(("quantized",))):
        return False
    pairs = (kv_format.key, keys, buffers[0]), (kv_format.value, values, buffers[1])
    return all(
        _rounds_alike(form, rows.dtype) and (parts[1].dtype == rows.dtype or not form.has_biases)
        for form, rows, parts in pairs
    )


@functools.cache
def _loads() -> bool:
    """Return whether the CPU kernel has been compiled before, and loads; a cache does not wait for a compilation."""
    return cpu.load_compiled(("quantized",))


@functools.lru_cache(maxsize=64)
def _rounds_alike(form: Format, dtype: mx.Dtype) -> bool:
    """Return whether the operation quantizes as this version of MLX does: tried once for a format and a dtype."""
    rows = mx.random.normal((1, 1, _TRIED_ROWS, 8 * form.group_size), key=mx.random.key(0)).astype(dtype)
    expected = quantize(rows, form) * 2
    buffers = [mx.zeros(part.shape, part.dtype) for part in expected]
    made = cpu.append_quantized(buffers, rows, rows, KVFormat(form, form), 0, _TRIED_ROWS)
    return all(bool(mx.array_equal(a, b)) for a, b in zip(made, expected, strict=True))
