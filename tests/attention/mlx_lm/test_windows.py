"""Models with windows: their masks reach an implementation as bounds, and not as arrays as large as the scores."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import base, cache, gemma3_text, gpt_oss, llama

import attention
from attention.implementations import load_implementation

WINDOW = 8
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
MORE = {
    llama: {},
    gemma3_text: {"sliding_window_pattern": 2},
    gpt_oss: {"num_local_experts": 2, "num_experts_per_tok": 1},
}


class Recorder:
    """`practical`, which keeps the masks that it is called with."""

    name = "recorder"
    takes_sinks = True

    def __init__(self) -> None:
        self.masks: list[Any] = []
        self._by = load_implementation("practical")

    def route(self, *arguments: Any) -> Any:
        return self._by.route(*arguments)

    def __call__(self, *arrays: Any, mask: Any, **more: Any) -> Any:
        self.masks.append(mask)
        return self._by(*arrays, mask=mask, **more)

    @property
    def seen(self) -> list[tuple[bool, int | None, bool]]:
        return [(mask.causal, mask.window, mask.array is None) for mask in self.masks]


def model_of(module: Any) -> Any:
    mx.random.seed(3)
    name = module.__name__.rpartition(".")[2]
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES, **MORE[module]}))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("module", MORE, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_models_window_is_a_bound(module):
    model, tokens = model_of(module), mx.random.randint(0, 50, (1, 30), key=mx.random.key(1))
    parts = tokens[:, :20], tokens[:, 20:29], tokens[:, 29:]  # two of a prompt, and a decoded token

    def logits() -> list[mx.array]:
        held = model.make_cache() if hasattr(model, "make_cache") else [cache.KVCache() for _ in model.layers]
        return [model(part, cache=held) for part in parts]

    wanted = logits()
    recorder = Recorder()
    with attention.patch_mlx_lm(recorder) as patch:
        found = logits()
    assert patch.calls_handed == 0, patch.summary()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-4)
    assert recorder.seen[:4] == [(True, WINDOW, True), (True, None, True)] * 2


def test_a_mask_that_fits_no_more_stays_an_array():
    q = mx.random.normal((1, 2, 5, 16), key=mx.random.key(0))
    recorder = Recorder()
    with attention.patch_mlx_lm(recorder):
        mask = base.create_causal_mask(5, 3, window_size=2)
        base.scaled_dot_product_attention(q, q, q, None, 0.25, mask[:, 3:])
        padded = base.create_causal_mask(5, 0, left_padding=mx.array([2]))
        base.scaled_dot_product_attention(q, q, q, None, 0.25, padded)
        base.scaled_dot_product_attention(q, q, q, None, 0.25, base.create_causal_mask(5, window_size=2))
    assert recorder.seen == [(False, None, False), (False, None, False), (True, 2, True)]


def test_no_mask_is_computed_that_is_a_bound():
    length = 40_000
    q, k = (mx.random.normal((1, 1, n, 8), key=mx.random.key(0)) for n in (512, length))
    mx.eval(q, k)
    with attention.patch_mlx_lm("practical") as patch:
        mask = base.create_causal_mask(512, length - 512, window_size=64)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(base.scaled_dot_product_attention(q, k, k, None, 0.3, mask))
    assert patch.calls_taken == 1
    assert mx.get_peak_memory() - before < 512 * length / 2  # a byte per pair and more, otherwise


def test_arrays_that_are_gone_are_forgotten():
    patch = attention.patch_mlx_lm("practical")
    with patch:
        mask = base.create_causal_mask(5)
        assert len(patch._masks._bounds) == 1
        del mask
        assert not patch._masks._bounds
    assert base.create_causal_mask.__module__ == "mlx_lm.models.base"
