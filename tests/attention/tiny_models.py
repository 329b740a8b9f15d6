"""A Qwen2 and a Llama of mlx-lm with a few thousand random weights."""

from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import llama, qwen2

LAYERS = 2
VOCABULARY = 101
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}


def tiny(name: str, dtype: mx.Dtype = mx.float32) -> Any:
    """A model with the same weights each time: 4 query heads, 2 key heads, head_dim 32."""
    mx.random.seed(7)
    module = {"qwen2": qwen2, "llama": llama}[name]
    model = module.Model(module.ModelArgs(model_type=name, **SIZES))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def tokens(*shape: int) -> mx.array:
    """Random tokens, the same each time."""
    return mx.random.randint(0, VOCABULARY, shape, key=mx.random.key(3))
