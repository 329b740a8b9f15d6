"""Quantized caches compute what mlx-lm's dense caches of the same layout do, if those hold the dequantized values."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
)

import attention
from attention.core.kv_format import Format, parse_kv_format
from attention.mlx_lm import caches
from tests.support.tiny_models import LAYERS, tiny, tokens

WINDOW = 24
LEFT_PADDING = [5, 0]
LAYOUTS: dict[str, Callable[[], Any]] = {
    "plain": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=WINDOW),
    "rotating, 4 kept": lambda: RotatingKVCache(max_size=WINDOW, keep=4),
    "batch": lambda: BatchKVCache(LEFT_PADDING),
    "rotating batch": lambda: BatchRotatingKVCache(WINDOW, LEFT_PADDING),
}
FORMATS = ["int8:32", "int4:32", "int8:32+int4:32", "mxfp4", "mxfp4+int6:32", "nvfp4"]
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 1e-1}
Chunks = list[int]
CHUNKS: Chunks = [29, 11, *[1] * 6, 13, *[1] * 3]
"""Lengths of a model's calls: around the window there are chunks, single tokens, and a chunk after them."""


def rounded(x: mx.array, form: Format) -> mx.array:
    """Quantize and dequantize."""
    numbers, scales, *biases = mx.quantize(x, form.group_size, form.bits, form.mode)
    return mx.dequantize(numbers, scales, *(biases or [None]), form.group_size, form.bits, form.mode, dtype=x.dtype)


def dense(layout: str, kv_format: str) -> Any:
    """Return mlx-lm's dense cache, which gets rounded keys and values."""
    made = LAYOUTS[layout]()
    store, formats = made.update_and_fetch, parse_kv_format(kv_format)
    assert formats is not None
    made.update_and_fetch = lambda k, v: store(rounded(k, formats.key), rounded(v, formats.value))
    return made


def packed(layout: str, kv_format: str) -> Any:
    return caches.to_quantized(LAYOUTS[layout](), kv_format)


def logits(model: Any, cache: list[Any], chunks: Chunks) -> np.ndarray:
    """Return the logits of two sequences, without padding positions."""
    ids = tokens(2, sum(chunks))
    ends = np.cumsum(chunks).tolist()
    parts = [model(ids[:, end - size : end], cache=cache) for end, size in zip(ends, chunks, strict=True)]
    return np.array(mx.concatenate(parts, axis=1).astype(mx.float32))[:, max(LEFT_PADDING) :]


def assert_same(model_name: str, layout: str, kv_format: str, chunks: Chunks, dtype: mx.Dtype = mx.float32) -> None:
    model = tiny(model_name, dtype)
    wanted = logits(model, [dense(layout, kv_format) for _ in range(LAYERS)], chunks)
    with attention.patch_mlx_lm("practical") as patch:
        got = logits(model, [packed(layout, kv_format) for _ in range(LAYERS)], chunks)
    assert patch.calls_taken == len(chunks) * LAYERS
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("layout", "kv_format"), [*zip(LAYOUTS, FORMATS, strict=False), ("rotating", "nvfp4"), ("batch", "int3:32")]
)
def test_logits_are_those_of_the_dequantized_cache(layout: str, kv_format: str) -> None:
    assert_same("qwen2", layout, kv_format, CHUNKS)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_logits_agree_over_300_steps(model: str, layout: str, kv_format: str) -> None:
    assert_same(model, layout, kv_format, [40, *[1] * 300])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_agree_in_bfloat16(layout: str) -> None:
    assert_same("llama", layout, "int8:32+int4:32", CHUNKS, mx.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlx_lms_own_attention_reads_one_affine_format(layout: str) -> None:
    model = tiny("llama")
    wanted = logits(model, [dense(layout, "int6:32") for _ in range(LAYERS)], CHUNKS)
    got = logits(model, [packed(layout, "int6:32") for _ in range(LAYERS)], CHUNKS)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[mx.float32])
