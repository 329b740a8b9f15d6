"""mlx-lm models with a few thousand random weights: a Qwen2, a Llama, a DeepSeek-V3 with dense layers, a GPT-OSS."""

import importlib
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import deepseek_v3, gpt_oss, llama, qwen2

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

WITH_SINKS: dict[str, Any] = {
    "head_dim": 32,
    "sliding_window": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Sinks, and a rotating cache in the first layer."""


def tiny(name: str, dtype: mx.Dtype = mx.float32, **sizes: Any) -> Any:
    """Return a model with reproducible weights: 4 query heads, head_dim 32, and 2 key heads or latent keys.

    `sizes` replace fields of its configuration.
    """
    mx.random.seed(7)
    module = {"qwen2": qwen2, "llama": llama, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss}[name]
    fields = SIZES | {"deepseek_v3": LATENT, "gpt_oss": WITH_SINKS}.get(name, {}) | sizes
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **fields}))
    if name == "gpt_oss":  # whose sinks are made as zeros
        for layer in model.layers:
            layer.self_attn.sinks = mx.random.normal((SIZES["num_attention_heads"],))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def built(name: str, **fields: Any) -> Any:
    """Return a model of any of mlx-lm's modules with reproducible weights; `fields` are its configuration."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **fields}))
    mx.eval(model.parameters())
    return model


def tokens(*shape: int) -> mx.array:
    """Return reproducible random tokens."""
    return mx.random.randint(0, VOCABULARY, shape, key=mx.random.key(3))
