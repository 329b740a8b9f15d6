"""mlx-lm models with a few thousand random weights: a Qwen2, a Llama, and a DeepSeek-V3 with dense layers."""

from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import deepseek_v3, llama, qwen2

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

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": None,
}
"""Multi-head latent attention, which passes its rotary scores to attention as an additive mask."""


def tiny(name: str, dtype: mx.Dtype = mx.float32) -> Any:
    """Return a model with reproducible weights: 4 query heads, head_dim 32, and 2 key heads or latent keys."""
    mx.random.seed(7)
    module = {"qwen2": qwen2, "llama": llama, "deepseek_v3": deepseek_v3}[name]
    sizes = SIZES | LATENT if name == "deepseek_v3" else SIZES
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **sizes}))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def tokens(*shape: int) -> mx.array:
    """Return reproducible random tokens."""
    return mx.random.randint(0, VOCABULARY, shape, key=mx.random.key(3))
