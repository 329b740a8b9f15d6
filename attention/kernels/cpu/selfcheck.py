"""The self-check on first use: small inputs, forward and gradients, against float64."""

from types import ModuleType
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention import masks
from attention.core.errors import KernelUnavailable
from attention.core.kv_format import parse_kv_format
from attention.kernels.common.selfcheck import Floats, exact, gradients, results
from attention.kernels.cpu import quantized_call
from attention.kernels.cpu.mask_lists import Builder
from attention.masks import Shape, dtype_name
from attention.masks import block_list as lists
from attention.masks.tiles import Grid
from attention.measure.reference import Rules
from attention.quantized_kv import quantized

RULES: Final = Rules(scale=0.2, causal=True)
_TOLERANCE: Final = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def _disagreement(module: ModuleType, dtype: mx.Dtype, queries: int, with_gradients: bool) -> float:
    """Return the largest difference in output and gradients of a causal call with shared K/V heads and odd lengths."""
    keys = mx.random.split(mx.random.key(7), 4)
    shapes = [(1, 4, queries, 24), (1, 2, 83, 24), (1, 2, 83, 20), (1, 4, queries, 20)]
    inputs = [mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True)]

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out: mx.array = module.flash_attention(q, k, v, RULES.scale, True, 0, 0.0, None)
        return out

    q, k, v, cotangent = (exact(x) for x in inputs)
    expected = [results(q, k, v, lambda b, h: RULES)[0]]
    if with_gradients:
        found = [each for made in mx.vjp(ours, inputs[:3], inputs[3:]) for each in made]
        expected += gradients(q, k, v, cotangent, lambda b, h: RULES)[:3]
    else:
        found = [ours(*inputs[:3])]
    return max(float(np.abs(exact(a) - b).max()) for a, b in zip(found, expected, strict=True))


_FORMATS: Final = ("int8", "int3:32", "int4+mxfp4", "mxfp8+nvfp4")


def _disagreement_quantized(module: ModuleType, dtype: mx.Dtype, text: str, queries: int) -> float:
    """Return the largest difference in the output of a causal call over quantized keys and values."""
    kv = parse_kv_format(text)
    assert kv is not None
    keys = mx.random.split(mx.random.key(8), 3)
    shapes = [(1, 4, queries, 64), (1, 2, 83, 64), (1, 2, 83, 64)]
    q, *dense = (mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True))
    k, v = (quantized(x, form) for x, form in zip(dense, (kv.key, kv.value), strict=True))
    out, _ = quantized_call.attend(module, q, k, v, (RULES.scale, True, 0, 0.0, None, 0))
    expected = results(exact(q), exact(k.dequantized()), exact(v.dequantized()), lambda b, h: RULES)[0]
    return float(np.abs(exact(out) - expected).max())


def _disagreement_appended(module: ModuleType, dtype: mx.Dtype, text: str) -> float:
    """Return by how much new rows that a cache quantizes are further from their values than those of mx.quantize."""
    kv = parse_kv_format(text)
    assert kv is not None
    before, rows = 3, 5
    drawn = [mx.random.normal((1, 2, rows, 128), key=key).astype(dtype) for key in mx.random.split(mx.random.key(9))]
    right = [quantized(x, form) for x, form in zip(drawn, (kv.key, kv.value), strict=True)]
    buffers = [mx.zeros((1, 2, before + rows, part.shape[3]), part.dtype) for x in right for part in x.arrays]
    codes = quantized_call.code(kv.key), quantized_call.code(kv.value)
    made = module.append_quantized(buffers, *drawn, *codes, before, before + rows)[: len(buffers)]
    worse = []
    for x, expected in zip(drawn, right, strict=True):
        arrays, made = made[: len(expected.arrays)], made[len(expected.arrays) :]
        found = expected.with_arrays([part[:, :, before:] for part in arrays])
        errors = [float(np.abs(exact(each.dequantized()) - exact(x)).max()) for each in (found, expected)]
        worse.append(errors[0] - errors[1])
    return float(np.max(worse))  # NaN if any is


_FIRST, _WINDOW, _STEPS = 2, 5, 13


def _disagreement_streamed(module: ModuleType, dtype: mx.Dtype) -> float:
    """Return the largest difference in the outputs of a stream's steps with rotary positions, over two laps."""
    width, pairs = 24, 8
    keys = mx.random.split(mx.random.key(10), 3)
    shapes = [(1, 4, _STEPS, width), (1, 2, _STEPS, width), (1, 2, _STEPS, width)]
    q, k, v = (mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True))
    radians = np.logspace(0, -3, pairs)
    by_float = mx.array(radians.astype(np.float32))
    slots = [module.own_copy(x) for x in _evaluated(*(x[:, :, : _FIRST + _WINDOW] for x in (k, v)))]
    options = ((0, 0, 0), (0, 0, 0), _FIRST, _WINDOW, _WINDOW)
    mx.eval(by_float)
    errors = []
    for position in range(_STEPS):
        token = _evaluated(*(x[:, :, position : position + 1] for x in (q, k, v)))
        oldest = max(0, position - _WINDOW) if position > _FIRST + _WINDOW else min(position, _FIRST)
        out = module.stream_step(
            *token, slots, *options, [(position, oldest)], RULES.scale, 0.0, by_float, False, False
        )
        if out is None:
            return float("inf")
        kept = [n for n in range(position + 1) if n < _FIRST or n > position - _WINDOW]
        at = np.arange(len(kept))
        turned_q, turned_k = (
            _rotated(x, places, radians) for x, places in ((exact(token[0]), at[-1:]), (exact(k)[:, :, kept], at))
        )
        expected = results(turned_q, turned_k, exact(v)[:, :, kept], lambda b, h: Rules(scale=RULES.scale))[0]
        errors.append(np.abs(exact(out) - expected).max())
    return float(np.max(errors))  # NaN if any is


def _evaluated(*arrays: mx.array) -> list[mx.array]:
    copies = [mx.contiguous(array) for array in arrays]
    mx.eval(copies)
    return copies


def _rotated(x: Floats, positions: NDArray[np.int64], radians: Floats) -> Floats:
    """Return x (B, H, n, D) with its first dims rotated, as pairs of two halves, to their positions."""
    pairs = len(radians)
    angles = positions[:, None] * radians
    low, high, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = (low * np.cos(angles) - high * np.sin(angles), low * np.sin(angles) + high * np.cos(angles))
    return np.concatenate([*turned, rest], -1)


def _listed_masks() -> dict[masks.Pattern, Shape]:
    """Return masks whose lists compiled code makes, with full, partial and cut tiles, and rows that see nothing."""
    flags = np.arange(2 * 3 * 5).reshape(1, 2, 3, 5) % 3 == 0
    packed_documents = masks.documents([[70, 30, 160], [1, 99, 160]])
    return {
        masks.blocks(flags, block=128): (1, 2, 384, 640),
        masks.window(100): (1, 1, 300, 260),
        masks.causal() & packed_documents: (2, 1, 260, 260),
        masks.padding([200, 17]) & masks.prefix(150): (2, 1, 130, 260),
    }


def _check_lists(module: ModuleType) -> str:
    """Return what differs between lists made by compiled code and by NumPy; empty if nothing does."""
    builder = Builder(module)
    for mask, shape in _listed_masks().items():
        grid = Grid(*shape, 64, 128)
        expected, found = lists.build(mask, grid, None), lists.build(mask, grid, builder)
        same = expected.pairs == found.pairs and np.array_equal(expected.offsets, found.offsets)
        if not same or not np.array_equal(expected.dense(), found.dense()):
            return repr(mask)
    return ""


def run(module: ModuleType, parts: frozenset[str]) -> None:
    """Check a compiled kernel in the dtypes that it has, over quantized keys and values, and in streams.

    Raises:
        KernelUnavailable: a result differs from the reference by more than rounding.
    """

    def check(error: float, tolerance: float, what: object) -> None:
        if not error <= tolerance:
            raise KernelUnavailable(f"the compiled kernel disagrees with the reference by {error:.2g} ({what})")

    if "lists" in parts and (mask := _check_lists(module)):
        raise KernelUnavailable(f"the compiled kernel makes another block list of {mask}")
    dtypes = [dtype for dtype in _TOLERANCE if dtype_name(dtype) in parts]
    with mx.stream(mx.cpu):
        for dtype in dtypes:
            check(_disagreement(module, dtype, 37, "gradients" in parts), _TOLERANCE[dtype], dtype)
            if "few" in parts:
                check(_disagreement(module, dtype, 1, with_gradients=False), _TOLERANCE[dtype], dtype)
        for dtype in dtypes[:1] if "quantized" in parts else []:  # what is quantized is read alike in all dtypes
            for text in _FORMATS:
                for queries in (1, 37) if "few" in parts else (37,):
                    check(_disagreement_quantized(module, dtype, text, queries), _TOLERANCE[dtype], text)
        for dtype in _TOLERANCE if "quantized" in parts else []:  # caches append without a call of attention
            for text in _FORMATS:
                check(_disagreement_appended(module, dtype, text), 1e-6, f"quantization of {dtype} to {text}")
        for dtype in dtypes if parts.issuperset({"few", "streams"}) else []:
            check(_disagreement_streamed(module, dtype), _TOLERANCE[dtype], f"a stream of {dtype}")
