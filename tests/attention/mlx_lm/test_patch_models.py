"""Models of mlx-lm compute the same with attention replaced."""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.tuner.trainer import CacheDataset, TrainingArgs, TrainingCallback, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import attention
from attention.implementations.bounded.implementation import Practical
from tests.support.marks import slow, thorough
from tests.support.tiny_models import LAYERS, tiny, tokens

IMPLEMENTATIONS = ["baseline", "poc", "practical", "demo", "practical in blocks"]
LEFT_PADDING = [5, 0]
CACHES: dict[str, Callable[[], Any]] = {
    "plain": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=24, keep=4),
    "batched": lambda: BatchKVCache(LEFT_PADDING),
    "batched rotating": lambda: BatchRotatingKVCache(24, LEFT_PADDING),
    "quantized": lambda: QuantizedKVCache(group_size=32, bits=8),
}
MODELS_AND_IMPLEMENTATIONS = [
    (model, name) if name == "practical" or (model, name) == ("llama", "poc") else slow(model, name)
    for model in ("qwen2", "llama")
    for name in IMPLEMENTATIONS
]
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}


def patched(name: str) -> Any:
    """A patch; "blocks" cuts every call into tiles from one row and one key upwards."""
    return attention.patch_mlx_lm(Practical(64 << 10) if name == "practical in blocks" else name)


def logits(model: Any, cache_name: str) -> np.ndarray:
    """Return the logits of a prompt in two chunks and of three single tokens after it, without padding positions."""
    cache = [CACHES[cache_name]() for _ in range(LAYERS)]
    prompt = tokens(2, 43)
    parts = [model(prompt[:, :29], cache=cache)[:, max(LEFT_PADDING) :], model(prompt[:, 29:40], cache=cache)]
    parts += [model(prompt[:, i : i + 1], cache=cache) for i in range(40, 43)]
    return np.array(mx.concatenate(parts, axis=1).astype(mx.float32))


@cache
def unpatched(model_name: str, dtype: mx.Dtype, cache_name: str) -> tuple[Any, np.ndarray]:
    """Return a model and its logits with MLX's own attention."""
    model = tiny(model_name, dtype)
    return model, logits(model, cache_name)


@pytest.mark.sampled(0.25)
@pytest.mark.parametrize(("model_name", "implementation"), MODELS_AND_IMPLEMENTATIONS)
@pytest.mark.parametrize("held", CACHES)
def test_prefill_and_decode_give_the_same_logits(model_name: str, held: str, implementation: str) -> None:
    model, wanted = unpatched(model_name, mx.float32, held)
    with patched(implementation) as patch:
        got = logits(model, held)
    assert patch.calls_taken == 5 * LAYERS
    assert patch.calls_handed == 0
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[mx.float32])


@pytest.mark.sampled(0.25)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("held", ["plain", "quantized"])
def test_half_precision_stays_within_its_tolerance(dtype: mx.Dtype, held: str) -> None:
    model, wanted = unpatched("llama", dtype, held)
    with patched("practical in blocks") as patch:
        got = logits(model, held)
    assert any(path.startswith(("blocks", "packed")) for path in patch.taken)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[dtype])


class Losses(TrainingCallback):
    """A callback that keeps the loss curve."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.losses.append(train_info["train_loss"])

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        pass


class Sequences(list[list[int]]):
    """Token lists as accepted by mlx-lm's CacheDataset."""

    def process(self, item: list[int]) -> tuple[list[int], int]:
        return item, 0


def lora_losses(model_name: str, folder: Any) -> list[float]:
    """Return the losses of a few steps of mlx-lm's LoRA training, whose step is compiled."""
    model = tiny(model_name)
    model.freeze()
    mx.random.seed(1)
    np.random.seed(1)  # mlx-lm shuffles its batches with it
    linear_to_lora_layers(model, LAYERS, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    rows = CacheDataset(Sequences(tokens(4, 33).tolist()))
    arguments = TrainingArgs(
        batch_size=2,
        iters=3,
        val_batches=0,
        steps_per_report=1,
        steps_per_eval=100,
        steps_per_save=100,
        max_seq_length=64,
        adapter_file=folder / "adapters.safetensors",
    )
    seen = Losses()
    train(model, optim.Adam(learning_rate=1e-2), rows, rows, arguments, training_callback=seen)
    return seen.losses


def assert_same_curve(model_name: str, implementation: str, folder: Any) -> None:
    wanted = lora_losses(model_name, folder)
    assert len(set(wanted)) == 3
    with patched(implementation) as patch:
        assert lora_losses(model_name, folder) == pytest.approx(wanted, rel=1e-3)
    assert patch.calls_taken > 0
    assert patch.calls_handed == 0


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["qwen2", "llama"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lora_training_gives_the_same_loss_curve(model_name: str, implementation: str, tmp_path: Any) -> None:
    assert_same_curve(model_name, implementation, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_compiled_training_step_gives_the_same_losses(implementation: str) -> None:
    def curve() -> list[float]:
        model, optimizer, data = tiny("qwen2"), optim.SGD(learning_rate=0.1), tokens(2, 24)

        def loss(model: Any, data: mx.array) -> mx.array:
            return nn.losses.cross_entropy(model(data[:, :-1]), data[:, 1:]).mean()

        def step(data: mx.array) -> mx.array:
            value, gradient = nn.value_and_grad(model, loss)(model, data)
            optimizer.update(model, gradient)
            return value

        state = [model.state, optimizer.state]
        compiled = mx.compile(step, inputs=state, outputs=state)
        losses = []
        for _ in range(3):
            losses.append(compiled(data))
            mx.eval(losses[-1], state)
        return [loss.item() for loss in losses]

    wanted = curve()
    with patched(implementation) as patch:
        assert curve() == pytest.approx(wanted, rel=1e-4)
    assert patch.calls_taken > 0
    assert patch.calls_handed == 0


def gradients_of_latent_attention() -> dict[str, np.ndarray]:
    """Return the gradients of all weights of a model whose rotary scores reach attention as an additive mask."""
    model, data = tiny("deepseek_v3"), tokens(2, 49)

    def loss(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        return nn.losses.cross_entropy(model(data[:, :-1]), data[:, 1:]).mean()

    named: Any = tree_flatten(mx.grad(loss)(model.trainable_parameters()))
    return {name: np.array(value) for name, value in named}


@pytest.fixture(scope="module")
def unpatched_gradients() -> dict[str, np.ndarray]:
    """Return the gradients with MLX's own attention."""
    gradients = gradients_of_latent_attention()
    assert np.abs(gradients["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][-8:]).max() > 1e-3
    return gradients


@pytest.mark.parametrize("implementation", [name if name == "poc" else thorough(name) for name in IMPLEMENTATIONS])
def test_gradients_pass_through_an_additive_mask(
    implementation: str, unpatched_gradients: dict[str, np.ndarray]
) -> None:
    with patched(implementation) as patch:
        got = gradients_of_latent_attention()
    assert patch.calls_taken + patch.calls_handed == LAYERS
    if implementation == "practical in blocks":
        assert all(path.startswith("blocks") for path in patch.taken), patch.taken
    for name, wanted in unpatched_gradients.items():
        np.testing.assert_allclose(got[name], wanted, atol=1e-5 + 1e-3 * np.abs(wanted).max(), err_msg=name)
