"""Models without a download and models of a folder: shapes and predicted memory."""

import json

import pytest

from attention.core.errors import UsageError
from attention.core.workload import FineTuning, Generation, generations
from attention.mlx_lm.configuration import Configuration, bundled_names, find_model
from attention.mlx_lm.generation import MemoryNeeds
from attention.mlx_lm.network import Network

PUBLISHED = {"tinyllama-1.1b": 1_100_048_384, "qwen2.5-1.5b": 1_543_714_304, "llama-7b-like": 6_738_415_616}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_has_the_published_parameter_count(name):
    assert Network(find_model(name), "bfloat16").weights_bytes == 2 * PUBLISHED[name]


def test_no_weight_is_made_before_it_is_requested():
    import mlx.core as mx

    before = mx.get_active_memory()
    network = Network(find_model("llama-7b-like"), "bfloat16", layers=2)
    assert mx.get_active_memory() - before < 2**20
    assert network.layers == 2
    assert network.own_bytes < network.weights_bytes / 5


def test_the_layers_are_whole_again_after_a_shortened_run():
    network = Network(find_model("tiny-llama"), "float32")
    with network.shortened(1) as model:
        assert len(model.layers) == 1
    assert network.layers == len(network.model.layers) == 4


def test_a_name_that_is_unknown_is_reported_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean 'tinyllama-1\.1b'"):
        find_model("tinyllama-1b")
    assert "tiny-llama" in bundled_names()


def test_a_folder_says_its_shapes_and_what_it_lacks(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        find_model(str(tmp_path))
    fields = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = find_model(str(tmp_path))
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (3, 4, 2, 16)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    with pytest.raises(UsageError, match="has no num_hidden_layers, num_attention_heads"):
        find_model(str(tmp_path))


TEXT_CONFIG = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}


def test_a_vision_models_folder_has_its_text_models_shapes(tmp_path):
    text = TEXT_CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    found = find_model(str(tmp_path))
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 2, 32)


def test_what_a_folder_does_not_say_is_mlx_lms_default(tmp_path):
    fields = {"model_type": "gemma3", "text_config": TEXT_CONFIG}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = find_model(str(tmp_path))
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 8, 4, 256)
    fields = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 3, "n_ctx": 64, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"layer_norm_epsilon": 1e-5, "vocab_size": 100}))
    found = find_model(str(tmp_path))
    assert (found.layers, found.heads, found.head_dim) == (3, 2, 16)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '"a"', '{"model_type": 3}', '{"model_type": "none such"}'])
def test_a_config_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json (has no hidden_size|cannot be read)") as caught:
        find_model(str(tmp_path))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gemma3", "text_config": TEXT_CONFIG | {"vocab_size": 64, "sliding_window_pattern": 6}},
        {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2, "n_ctx": 64, "n_positions": 64}
        | {"layer_norm_epsilon": 1e-5, "vocab_size": 64},
    ],
)
def test_layers_are_found_wherever_a_model_keeps_them(fields):
    import mlx.core as mx

    network = Network(Configuration("a model", fields), "float32")
    assert network.layers == 2
    with network.shortened(1) as model:
        logits = model(mx.array([[1, 2]]), cache=network.cache())
    assert logits.shape[:2] == (1, 2)


def test_a_refusal_gives_both_figures_and_layers_that_fit():
    work = Generation(model="llama-7b-like", phase="prefill", prompt=512, layers=32)
    needed = MemoryNeeds.of(find_model(work.model), work, Network(find_model(work.model), "bfloat16"), 0)
    assert 13e9 < needed.whole < 15e9
    assert needed.refusal(4 * 2**30, work).endswith("of 4; --layers 8 would fit, and estimate the whole model")
    assert needed.refusal(2**20, work).endswith("not even two layers fit")


def test_both_phases_run_at_every_batch_and_prompt_length():
    cases = generations(22, model="tinyllama-1.1b", prompts=[128, 512], batches=[1, 2])
    assert len(cases) == 8
    assert [(case.phase, case.prompt, case.batch) for case in cases[:3]] == [
        ("prefill", 128, 1),
        ("decode", 128, 1),
        ("prefill", 512, 1),
    ]
    assert [case.tokens for case in cases[4:6]] == [256, 2]


def test_as_many_layers_as_the_model_has_are_the_whole_model():
    (case, _) = generations(22, model="m", prompts=[8], batches=[1], measured_layers=22)
    assert not case.estimated
    (case, _) = generations(22, model="m", prompts=[8], batches=[1], measured_layers=4)
    assert case.estimated
    assert "estimated from 4 of 22 layers" in case.label


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UsageError) as caught:
        generations(22, model="m", prompts=[1, 0], batches=[1], measured_layers=1, dtype="int8")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["prompt", "layers", "dtype", "prompt"]
    with pytest.raises(UsageError, match="rank: got 0"):
        FineTuning(model="m", layers=4, tuned_layers=4, rank=0)
