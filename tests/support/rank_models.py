"""Models over several ranks against one process; run as a program, once a rank. Prints a line for each failure."""

import sys
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.tuner import trainer
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from attention import patch_mlx_lm
from tests.support.tiny_models import VOCABULARY, tiny

failures: list[str] = []


def close(what: str, got: Any, wanted: Any, most: float = 2e-4) -> None:
    difference = float(np.abs(np.array(got, np.float64) - np.array(wanted, np.float64)).max())
    if np.shape(got) != np.shape(wanted) or not difference <= most:
        failures.append(f"{what}: {difference:.3g} beyond {most:.3g}")


def tokens(length: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, VOCABULARY, length))


def check_logits(group: Any, name: str, length: int, **sizes: Any) -> None:
    model = tiny(name, **sizes)
    prompt = tokens(2 * length).reshape(2, length)
    wanted = model(prompt)
    with patch_mlx_lm("poc", group=group) as patch:
        got = patch.sharded(model)(prompt)
        mx.eval(got)
    close(f"{name} {sizes}: logits of {length} tokens", got, wanted)


def check_generation(group: Any, length: int, prefill: int) -> None:
    """Logits of each step, with a prompt in several parts and a cache that is sharded."""
    model = tiny("llama")
    prompt = tokens(length)
    wanted = [np.array(logits) for _, logits in generate_step(prompt, model, max_tokens=6)]
    with patch_mlx_lm("poc", group=group) as patch:
        sharded = patch.sharded(model)
        cache = sharded.make_cache()
        steps = generate_step(prompt, sharded, max_tokens=6, prompt_cache=cache, prefill_step_size=prefill)
        got = [np.array(logits) for _, logits in steps]
    close(f"generation after {length} tokens by {prefill}", got, wanted)
    held = mx.distributed.all_sum(mx.array([cache[0].size()]), group=group).item()
    if held != cache[0].offset or cache[0].size() > 0.8 * held:
        failures.append(f"the cache of {cache[0].offset} tokens has {cache[0].size()} of {held} on a rank")


class Texts:
    """Random sequences as a training set of mlx-lm."""

    def __init__(self, count: int, length: int) -> None:
        self.texts = [(tokens(length, seed).tolist(), 3) for seed in range(count)]

    def __getitem__(self, index: int) -> Any:
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)


def train(patch: Any) -> list[float]:
    model = tiny("llama")
    model.freeze()
    mx.random.seed(3)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    losses: list[float] = []

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            losses.append(info["train_loss"])

    arguments = TrainingArgs(
        batch_size=2, iters=3, steps_per_report=1, steps_per_save=100, max_seq_length=128, adapter_file="/dev/null"
    )
    more = {} if patch is None else {"loss": patch.sequence_loss}
    # without a patch every rank trains alone: the group is one process, and batches are whole
    batches = whole_batches if patch is None else patch.whole_batches
    save, mx.save_safetensors = mx.save_safetensors, lambda *_: None
    try:
        trainer.train(
            model,
            optimizers.SGD(learning_rate=0.5),
            Texts(4, 90),
            None,
            arguments,
            iterate_batches=batches,
            training_callback=Callback(),
            **more,
        )
    finally:
        mx.save_safetensors = save
    return losses


def whole_batches(**arguments: Any) -> Any:
    return trainer.iterate_batches(**{**arguments, "seed": 0, "comm_group": None})


def check_training(group: Any) -> None:
    wanted = train(None)
    with patch_mlx_lm("poc", group=group) as patch:
        got = train(patch)
    close("LoRA losses", got, wanted, 1e-4)
    if not wanted[-1] < wanted[0] - 0.01:
        failures.append(f"the losses {wanted} do not fall")


def main() -> int:
    group = mx.distributed.init(strict=True, backend="ring")
    check_logits(group, "llama", 150)
    check_generation(group, 201, 70)
    check_training(group)
    if "many" in sys.argv:
        check_logits(group, "qwen2", 200)
        check_logits(group, "llama", 300, sliding_window=40, layer_types=["sliding_attention", "full_attention"])
        check_generation(group, 90, 2048)
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
