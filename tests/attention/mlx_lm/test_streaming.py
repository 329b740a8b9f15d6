"""Models of mlx-lm with streaming caches."""

from copy import deepcopy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cohere2, smollm3
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from attention import StreamingKV, UsageError, patch_mlx_lm
from attention.mlx_lm.configuration import find_model
from attention.mlx_lm.network import Network
from attention.mlx_lm.streaming import StreamingCache, make_prompt_cache, rope_of
from tests.support.marks import thorough
from tests.support.tiny_models import built

PROMPT = mx.array([[(7 * i) % 41 for i in range(60)]])


@pytest.fixture(scope="module")
def model():
    """A Llama of two layers with random weights."""
    network = Network(find_model("tiny-llama"), "float32", layers=2)
    network.make()
    return network.model


def test_a_window_longer_than_the_text_changes_nothing(model):
    """While nothing is forgotten, tokens are those of a model with its own cache."""
    own = [token for token, _ in generate_step(PROMPT[0], model, max_tokens=4)]
    caches = make_prompt_cache(model, first=4, window=100)
    with patch_mlx_lm("practical") as patch:
        made = [token for token, _ in generate_step(PROMPT[0], model, max_tokens=4, prompt_cache=caches)]
    assert made == own
    assert patch.calls_handed == 0
    assert all(path.endswith("first and latest tokens") for path in patch.taken)


@pytest.mark.parametrize("implementation", [thorough("practical"), "poc"])
def test_a_prompt_at_once_is_a_prompt_token_by_token(model, implementation):
    """Positions within the window are the same, however the tokens arrive."""
    with patch_mlx_lm(implementation) as patch:
        at_once = model(PROMPT, cache=make_prompt_cache(model, first=3, window=12))
        caches = make_prompt_cache(model, first=3, window=12)
        steps = [model(PROMPT[:, t : t + 1], cache=caches) for t in range(PROMPT.shape[1])]
    stepped = any("step of a stream" in path for path in patch.taken)
    assert stepped == (implementation == "poc")
    assert mx.allclose(at_once, mx.concatenate(steps, 1), atol=2e-5)
    assert caches[0].position == 60
    assert caches[0].offset == 3 + (60 - 3) % 12
    assert caches[0].size() == 15


def test_saved_with_the_functions_of_mlx_lm(model, tmp_path):
    """A prompt cache goes on from its file."""
    with patch_mlx_lm("practical"):
        caches = make_prompt_cache(model, first=3, window=12, format="int8:32")
        model(PROMPT, cache=caches)
        save_prompt_cache(str(tmp_path / "c.safetensors"), caches)
        loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
        assert mx.array_equal(model(PROMPT[:, :1], cache=caches), model(PROMPT[:, :1], cache=loaded))


def test_unpatched_mlx_lm_is_reported_what_is_missing(model):
    """Without a patch the error names it."""
    with pytest.raises(UsageError, match="inside attention"):
        model(PROMPT, cache=make_prompt_cache(model))


@pytest.mark.parametrize("sliding", [True, False])
def test_rope_that_a_layer_of_cohere2_does_not_use(sliding):
    """Its layers with full attention have a rotary embedding, and do not rotate."""
    arguments = cohere2.ModelArgs("cohere2", hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    layer = cohere2.TransformerBlock(arguments, layer_idx=0 if sliding else 3)
    assert (rope_of(layer) is not None) == sliding


def test_layers_of_smollm3_without_positions():
    """Layers whose positions were taken out have none."""
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.rope = smollm3.NoPE()
    assert rope_of(layer) is None


SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
GROUPED = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
PHIXTRAL = {"model_dim": 32, "num_layers": 1, "num_heads": 2, "num_vocab": 50, "rotary_dim": 8, "num_local_experts": 2}
HUNYUAN = {**SIZES, **GROUPED, "max_position_embeddings": 99}
GPT2 = {"n_ctx": 9, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 9, "vocab_size": 50}
GPT2 |= {"layer_norm_epsilon": 1e-5}
BAILING = {**HUNYUAN, "num_hidden_layers": 2, "layer_group_size": 2, "group_norm_size": 1, "moe_intermediate_size": 32}
BAILING |= {"num_experts_per_tok": 1, "num_experts": 2, "norm_topk_prob": True, "num_shared_experts": 1}
BAILING |= {"rope_theta": 1000, "first_k_dense_replace": 0}
OTHER_PLACES = {
    "nanochat": {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "phixtral": PHIXTRAL,
    "plamo2": {**SIZES, **GROUPED, "num_hidden_layers": 2, "hidden_size_per_head": 16, "mamba_enabled": False},
}
"""Models whose rotary embedding is no `self_attn.rope`: frequencies alone, a layer's `mixer`."""


@pytest.mark.parametrize("name", OTHER_PLACES)
def test_rotary_positions_in_other_places_are_found(name):
    """Tokens one by one give what they give at once, although the ring is filled three times."""
    model = built(name, **OTHER_PLACES[name])
    prompt = mx.array([[(7 * i) % 41 for i in range(30)]])
    with patch_mlx_lm("practical"):
        at_once = model(prompt, cache=make_prompt_cache(model, first=2, window=8))
        caches = make_prompt_cache(model, first=2, window=8)
        steps = [model(prompt[:, t : t + 1], cache=caches) for t in range(30)]
    assert caches[0].state_kv.rope is not None
    assert mx.allclose(at_once, mx.concatenate(steps, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hunyuan_v1_dense", HUNYUAN, "after rotating them"),
        ("gpt2", GPT2, "learned positions"),
        ("bailing_moe_linear", BAILING, "linear attention rotates"),
    ],
)
def test_models_without_bounded_positions_are_refused(name, fields, message):
    """Weights after the rotation, and positions that are added once for all."""
    with pytest.raises(UsageError, match=message):
        make_prompt_cache(built(name, **fields))


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_window_beyond_that_of_a_layer_is_refused(tokens):
    """Layers with a window and without a rotating cache, whose mask says what they attend to."""
    cache = StreamingCache(StreamingKV(2, 9))
    hidden = mx.zeros((1, tokens, 4))
    with pytest.raises(UsageError, match="got 9, and a layer of the model attends to 8 tokens; it takes up to 8"):
        create_attention_mask(hidden, cache, window_size=8)
    create_attention_mask(hidden, cache, window_size=9)


def test_the_end_can_be_trimmed_while_it_is_exact():
    """mlx-lm ignores how many tokens were removed: fewer than it asked for would be a wrong prompt."""
    k = mx.random.normal((1, 2, 20, 16))
    cache = StreamingCache(StreamingKV(2, 6))
    cache.state_kv.append(k[:, :, :8], k[:, :, :8])
    assert cache.is_trimmable()
    assert cache.trim(3) == 3
    cache.state_kv.append(k, k)
    assert not cache.is_trimmable()
    with pytest.raises(UsageError, match=r"cache: got 7 tokens to remove; .* to remove 0; .*spare=7"):
        cache.trim(7)
    spare = StreamingCache(StreamingKV(2, 6, spare=3))
    spare.state_kv.append(k, k)
    assert spare.is_trimmable()
    with pytest.raises(UsageError, match=r"cache: got 4 tokens to remove; .* to remove 3; .*spare=4"):
        spare.trim(4)
    assert spare.trim(3) == 3
    assert not spare.is_trimmable()


class Unreliable:
    """A draft model: every third token is another than the model's."""

    def __init__(self, model):
        self.model, self.layers, self.calls = model, model.layers, 0

    def __call__(self, tokens, cache):
        self.calls += 1
        made = self.model(tokens, cache=cache)
        return made if self.calls % 3 else mx.roll(made, 1, axis=-1)


def test_speculative_decoding_takes_spare_slots(model):
    """Rejected tokens are taken back from a full ring; without spare slots mlx-lm refuses the caches."""
    with patch_mlx_lm("practical"):
        caches = make_prompt_cache(model, first=4, window=24, spare=3)
        wanted = [token for token, _ in generate_step(PROMPT[0], model, max_tokens=12, prompt_cache=caches)]
        caches = [one for _ in range(2) for one in make_prompt_cache(model, first=4, window=24, spare=3)]
        named = {"num_draft_tokens": 3, "max_tokens": 12, "prompt_cache": caches}
        got = [*speculative_generate_step(PROMPT[0], model, Unreliable(model), **named)]
        assert [token for token, *_ in got] == wanted
        assert {drafted for *_, drafted in got} == {True, False}
        caches = make_prompt_cache(model, first=4, window=24)
        with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
            next(speculative_generate_step(PROMPT[0], model, model, prompt_cache=[*caches, *caches]))


def test_deep_copies_are_forks():
    """mlx-lm copies the cache of a prompt before it goes on with it."""
    k = mx.random.normal((1, 2, 20, 16))
    cache = StreamingCache(StreamingKV(2, 6))
    cache.state_kv.append(k, k)
    copy = deepcopy(cache)
    kept = mx.array(copy.state_kv.described()[0]["streaming.keys.0"])
    cache.state_kv.append(k[:, :, :5], k[:, :, :5])
    assert (cache.position, copy.position) == (25, 20)
    assert mx.array_equal(copy.state_kv.described()[0]["streaming.keys.0"], kept)
