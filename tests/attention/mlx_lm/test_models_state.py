"""Every run of a model starts from the same state, whatever its caches and layers; one that would not fails."""

from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_flatten
from mlx_lm.models import cache as caches

from attention.core.plan import Assignment, FineTuningPlan
from attention.core.workload import FineTuning, Generation
from attention.engine.record import record_of
from attention.mlx_lm import fine_tuning
from attention.mlx_lm.configuration import Configuration
from attention.mlx_lm.fine_tuning import FineTuningBench
from attention.mlx_lm.generation import DecodeRun, Prompts
from attention.mlx_lm.network import Network, StateChanged, copy_caches, digest_of_caches, digest_of_weights
from attention.mlx_lm.patch import CallCounter, replace_attention

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "intermediate_size": 48,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "qwen3_next": {
        "head_dim": 16,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [],
        "moe_intermediate_size": 16,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 128,
        "full_attention_interval": 4,
        "norm_topk_prob": True,
    },
}
EXPERTS = COMMON | {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
EXPERTS |= {"rope_theta": 1e6, "vocab_size": 300}


def decoding(name: str) -> tuple[DecodeRun, list[Any]]:
    network = Network(Configuration(name, COMMON | MODELS[name] | {"model_type": name}), "float32", seed=3)
    work = Generation(model=name, phase="decode", prompt=20, generate=5, layers=4, dtype="float32")
    prompts = Prompts(work, 64, seed=0)
    cache = caches.make_prompt_cache(network.model)
    token = mx.argmax(prompts.prefill(network.model, cache), axis=-1)
    return DecodeRun(network, cache, token, steps=5, layers=4), cache


@pytest.mark.parametrize("name", ["mlx", "poc"])
def test_calls_of_a_model_that_attends_by_itself_are_counted(name: str) -> None:
    fields = COMMON | {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16}
    fields |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    model = Network(Configuration("gemma2", fields), "float32").model
    with replace_attention(name), CallCounter(name) as calls:
        mx.eval(model(mx.array([[1, 2, 3]])))
    event = calls.event(0, "a path")
    assert (event.replaced, event.passed_on) == (COMMON["num_hidden_layers"], 0)
    assert event.path


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("name", MODELS)
def test_every_decode_run_starts_from_the_prompts_state(name: str) -> None:
    run, cache = decoding(name)
    before = digest_of_caches(cache)
    logits = run.results()[0]
    tokens = [run.queue()[0].tolist() for _ in range(2)]
    assert tokens[0] == tokens[1]
    assert mx.array_equal(run.results()[0], logits)
    assert digest_of_caches(cache) == before


def test_a_decode_run_from_another_state_is_an_error() -> None:
    run, cache = decoding("llama")
    cache[1].keys[0, 0, 3, 0] += 1
    with pytest.raises(StateChanged, match="not as the prompts left them"):
        run.prepare()


@pytest.mark.parametrize(
    "make",
    [
        caches.KVCache,
        lambda: caches.RotatingKVCache(max_size=6, keep=2),
        lambda: caches.QuantizedKVCache(group_size=32, bits=4),
        lambda: caches.BatchKVCache([0, 2]),
        lambda: caches.CacheList(caches.KVCache(), caches.RotatingKVCache(max_size=4)),
    ],
)
def test_a_copied_cache_shares_nothing(make: Any) -> None:
    def update(cache: Any) -> None:
        for one in cache.caches if isinstance(cache, caches.CacheList) else [cache]:
            one.update_and_fetch(mx.ones((2, 1, 3, 32)), mx.ones((2, 1, 3, 32)))

    cache = make()
    for _ in range(3):
        update(cache)
    before = digest_of_caches([cache])
    twin = copy_caches([cache])[0]
    assert digest_of_caches([twin]) == before
    update(twin)
    assert digest_of_caches([cache]) == before != digest_of_caches([twin])


def test_a_digest_sees_rows_that_changed_places() -> None:
    rows = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    cache = [caches.KVCache(), caches.KVCache()]
    cache[0].state, cache[1].state = (rows, rows, 3), (rows[mx.array([1, 0, 2])], rows, 3)
    assert digest_of_caches(cache[0]) != digest_of_caches(cache[1])


def experts() -> Network:
    return Network(Configuration("experts", EXPERTS), "float32", seed=5)


def test_the_model_is_as_it_was_after_its_experts_were_tuned() -> None:
    network = experts()
    modules, weights = dict(network.model.named_modules()), digest_of_weights(network.model)
    with fine_tuning._lora(network.model, FineTuning(model="m", layers=2, tuned_layers=2, rank=2), seed=0):
        names = [name for name, _ in tree_flatten(network.model.trainable_parameters())]
        assert any("switch_mlp" in name for name in names), "experts are tuned too"
        network.model.update({"model": {"norm": {"weight": network.model.model.norm.weight}}})
    assert dict(network.model.named_modules()) == modules
    assert digest_of_weights(network.model) == weights


@pytest.fixture
def tuned_experts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fine-tune a mixture of experts with two arms that compute the same."""
    monkeypatch.setattr(fine_tuning.configuration, "find_model", lambda model: Configuration("experts", EXPERTS))
    work = FineTuning(model="m", seq=8, batch=1, iters=2, rank=2, layers=2, tuned_layers=2, dtype="float32")
    plan = FineTuningPlan(cases=(work,), implementations=("mlx", "baseline"), seconds=60)

    def run() -> Any:
        record = record_of(plan)
        FineTuningBench(Assignment(plan=plan), plan, record.apply).run()
        return record.case(0).rows

    return run


@pytest.mark.slow
def test_a_mixture_of_experts_is_tuned_from_the_same_weights(tuned_experts: Any) -> None:
    baseline, ours = tuned_experts()
    assert baseline.losses[0] == pytest.approx(ours.losses[0], rel=1e-6)
    assert ours.loss_difference < 1e-4


@pytest.mark.thorough
def test_a_row_that_would_start_elsewhere_fails(tuned_experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "_restore_modules", lambda model, own: None)
    rows = tuned_experts()
    assert {row.status for row in rows} == {"failed"}
    assert "StateChanged: weights, optimizer or random numbers are not those" in rows[0].reason
