"""Masks of models reach an implementation as bounds or patterns, not as arrays as large as the scores; and Gemma 2."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import base, cache, gemma2, gemma3_text, gpt_oss, llama

import attention
from attention.core.events import WITHOUT_ATTENTION
from attention.implementations import load_implementation
from attention.mlx_lm.patch import _thread, replace_attention

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

    def __init__(self, takes_patterns: bool = False) -> None:
        self.takes_patterns = takes_patterns
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


@pytest.mark.sampled(0.3)
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


def _cut(mask):
    mask[..., :7] = False


def _joined_with(operator):
    return lambda mask: getattr(mask, operator)(mx.arange(mask.shape[-1]) >= 7)


@pytest.mark.parametrize("change", [_cut, _joined_with("__iand__"), _joined_with("__ior__")])
@pytest.mark.parametrize("cached", [False, True])
def test_a_mask_that_was_changed_in_place_is_seen_as_it_is(change, cached):
    q = mx.random.normal((2, 2, 80, 16), key=mx.random.key(0))
    with attention.patch_mlx_lm("practical") as patch:
        held = cache.BatchRotatingKVCache(100, [0, 5])
        mask = held.make_mask(80) if cached else base.create_causal_mask(80, window_size=30)
        change(mask)
        found = base.scaled_dot_product_attention(q, q, q, None, 0.25, mask)
    assert patch.calls_taken == 1
    wanted = attention.attention(q, q, q, scale=0.25, mask=mx.array(np.array(mask)))
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-5)


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
        assert len(patch._masks._known) == 1
        del mask
        assert not patch._masks._known
    assert base.create_causal_mask.__module__ == "mlx_lm.models.base"


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("rows", "offset"), [(80, 0), (70, 30), (3, 100)])
@pytest.mark.parametrize(
    "padding", [{"left_padding": [5, 0, 90]}, {"right_padding": [7, 0, 0]}, {"left_padding": [0] * 3}]
)
def test_padding_of_a_batch_is_a_pattern(padding, rows, offset, window):
    q, k = (mx.random.normal((3, 2, n, 16), key=mx.random.key(n)) for n in (rows, rows + offset))
    paddings = {side: mx.array(lengths) for side, lengths in padding.items()}
    recorder = Recorder(takes_patterns=True)
    with attention.patch_mlx_lm(recorder) as patch:
        mask = base.create_causal_mask(rows, offset, window_size=window, **paddings)
        found = base.scaled_dot_product_attention(q, k, k, None, 0.25, mask)
    assert patch.calls_taken == 1
    [given] = recorder.masks
    assert (given.array is None) == (rows >= 64)
    assert (given.pattern is not None) == (rows >= 64 and max(map(max, padding.values())) > 0)
    wanted = attention.attention(q, k, k, scale=0.25, mask=mask)
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-5)


def test_padding_of_length_0_takes_the_path_of_no_padding():
    q = mx.random.normal((2, 2, 80, 16), key=mx.random.key(0))
    paths = []
    for padding in ({}, {"left_padding": mx.array([0, 0])}):
        with attention.patch_mlx_lm("practical") as patch:
            base.scaled_dot_product_attention(q, q, q, None, 0.25, base.create_causal_mask(80, **padding))
        paths.append(patch.taken)
    assert paths[0] == paths[1]


def test_padding_stays_an_array_for_who_takes_no_patterns():
    q = mx.random.normal((2, 2, 80, 16), key=mx.random.key(0))
    recorder = Recorder()
    with attention.patch_mlx_lm(recorder):
        base.scaled_dot_product_attention(
            q, q, q, None, 0.25, base.create_causal_mask(80, left_padding=mx.array([5, 0]))
        )
    assert recorder.seen == [(False, None, False)]


@pytest.mark.compiles
def test_padding_that_is_traced_stays_an_array():
    q = mx.random.normal((2, 2, 80, 16), key=mx.random.key(0))

    def attend(padding):
        return base.scaled_dot_product_attention(q, q, q, None, 0.25, base.create_causal_mask(80, left_padding=padding))

    padding = mx.array([5, 0])
    with attention.patch_mlx_lm("practical"):
        np.testing.assert_allclose(np.array(mx.compile(attend)(padding)), np.array(attend(padding)), atol=1e-5)


def gemma2_model(key_heads=2, head_dim=16):
    more = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
    mx.random.seed(3)
    fields = SIZES | {"model_type": "gemma2", "num_key_value_heads": key_heads, "head_dim": head_dim} | more
    model = gemma2.Model(gemma2.ModelArgs.from_dict(fields))
    mx.eval(model.parameters())
    return model


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("name", ["practical", "poc"])
def test_gemma_2_attends_by_the_implementation(name, key_heads):
    model, tokens = gemma2_model(key_heads), mx.random.randint(0, 50, (1, 30), key=mx.random.key(1))

    def logits():
        held = [cache.KVCache() for _ in model.layers]
        return [model(part, cache=held) for part in (tokens[:, :20], tokens[:, 20:29], tokens[:, 29:])] + [
            model(tokens)
        ]

    wanted = logits()
    with attention.patch_mlx_lm(name) as patch:
        found = logits()
    assert (patch.calls_taken, patch.calls_handed) == (8, 0), patch.summary()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-4)
    assert gemma2.Attention.__call__.__module__ == "mlx_lm.models.gemma2"


def test_gemma_2_in_a_padded_batch_needs_no_array():
    model, recorder = (
        gemma2_model(key_heads=4),
        Recorder(takes_patterns=True),
    )  # with fewer mlx-lm mixes batch and heads
    tokens, padding = mx.random.randint(0, 50, (2, 70), key=mx.random.key(1)), [0, 9]

    def logits():
        held = [cache.BatchKVCache(padding) for _ in model.layers]
        return [model(tokens, cache=held), model(tokens[:, :1], cache=held)]

    wanted = logits()
    with attention.patch_mlx_lm(recorder) as patch:
        found = logits()
    assert patch.calls_handed == 0
    assert [mask.array is None for mask in recorder.masks] == [True, True, False, False]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one[0]), np.array(other[0]), atol=2e-4)
        np.testing.assert_allclose(np.array(one[1, 9:]), np.array(other[1, 9:]), atol=2e-4)


@pytest.mark.parametrize("rows", [70, 20])
def test_gemma_2_in_a_padded_batch_is_as_alone(rows):
    model, tokens = gemma2_model(key_heads=2), mx.random.randint(0, 50, (2, rows), key=mx.random.key(1))
    with attention.patch_mlx_lm("practical"):
        batch = model(tokens, cache=[cache.BatchKVCache([0, 9]) for _ in model.layers])
    for row, alone in ((batch[0], tokens[:1]), (batch[1, 9:], tokens[1:, 9:])):
        np.testing.assert_allclose(np.array(row), np.array(model(alone)[0]), atol=2e-4)


def test_gemma_2_attends_by_itself_for_who_takes_no_softcap():
    model, tokens = gemma2_model(), mx.random.randint(0, 50, (1, 12), key=mx.random.key(1))

    def logits():
        held = [cache.KVCache() for _ in model.layers]
        return [model(part, cache=held) for part in (tokens[:, :9], tokens[:, 9:])]

    wanted = logits()
    with attention.patch_mlx_lm("mlx") as patch:
        found = logits()
    assert (patch.calls_taken, patch.calls_handed) == (0, 4)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-6)


def test_gemma_2_without_attention_takes_a_quantized_cache():
    model, tokens = gemma2_model(head_dim=32), mx.random.randint(0, 50, (1, 12), key=mx.random.key(1))

    def logits(held):
        with replace_attention(WITHOUT_ATTENTION):
            return np.array(model(tokens, cache=held))

    dense = logits([cache.KVCache() for _ in model.layers])
    np.testing.assert_array_equal(logits([cache.QuantizedKVCache(32, 8) for _ in model.layers]), dense)


def test_an_unreadable_mask_leaves_direct_calls_intercepted(monkeypatch):
    with attention.patch_mlx_lm("practical") as patch:
        monkeypatch.setattr(patch._masks, "by_position", lambda call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gemma2_model()(mx.zeros((1, 3), mx.int32))
        assert not _thread.in_implementation


def test_gemma_2_has_its_gradients():
    model = gemma2_model()

    def loss(x):
        return (model.model.layers[0].self_attn(x, base.create_causal_mask(30)) ** 2).sum()

    x = mx.random.normal((1, 30, 64), key=mx.random.key(2))
    wanted = mx.grad(loss)(x)
    with attention.patch_mlx_lm("poc"):
        np.testing.assert_allclose(np.array(mx.grad(loss)(x)), np.array(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("parts", [(70, 90, 1), (200, 80, 1, 100), (3, 66)], ids=str)
def test_padded_rotating_caches_are_windows_with_padding(parts):
    window, padding, recorder = 40, [7, 0, 30], Recorder(takes_patterns=True)
    given = [[mx.random.normal((3, 2, n, 16), key=mx.random.key(10 * n + part)) for part in range(3)] for n in parts]

    def outputs():
        held, made = cache.BatchRotatingKVCache(window, padding), []
        for queries, key, value in given:
            mask = held.make_mask(queries.shape[2], window_size=window)
            keys, values = held.update_and_fetch(key, value)
            made.append(base.scaled_dot_product_attention(queries, keys, values, held, 0.25, mask))
        return made

    wanted = outputs()
    with attention.patch_mlx_lm(recorder) as patch:
        found = outputs()
    assert patch.calls_taken == len(parts)
    assert [mask.array is None for mask in recorder.masks] == [n >= 64 for n in parts]
    before = 0
    for n, one, other in zip(parts, found, wanted, strict=True):
        rows = slice(max(0, max(padding) - before), None)  # MLX has no zeros for rows of padding
        np.testing.assert_allclose(np.array(one[:, :, rows]), np.array(other[:, :, rows]), atol=1e-4)
        before += n
