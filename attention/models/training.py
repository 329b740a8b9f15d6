"""A LoRA fine-tuning by mlx-lm's trainer, with a callback per iteration."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.optimizers import Adam
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from attention.models.network import Network
from attention.models.state import digest
from attention.models.text import Sequence
from attention.models.workloads import FineTuning

SCALE: Final = 20.0
"""mlx-lm's default, like the types of layers that get LoRA weights and the absence of dropout."""
LEARNING_RATE: Final = 1e-4
Told = Callable[[float, float], None]
"""Called with the loss of an iteration and its seconds."""


class OutOfTime(Exception):
    """A fine-tuning reached its time limit."""


class _Teller(TrainingCallback):
    """Forward each iteration, and end the training when its time is up."""

    def __init__(self, told: Told, seconds: float) -> None:
        self._told, self._seconds = told, seconds
        self._end: float | None = None

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._told(train_info["train_loss"], 1 / train_info["iterations_per_second"])
        if self._end is None:
            self._end = time.perf_counter() + self._seconds  # the first one compiles and is not measured
        elif time.perf_counter() > self._end:
            raise OutOfTime


def fine_tune(
    network: Network,
    work: FineTuning,
    data: list[Sequence],
    *,
    iters: int,
    seconds: float,
    seed: int,
    told: Told,
    begin: Callable[[str], None],
) -> bool:
    """Train new LoRA weights from the seed, on the same batches each time, and restore the model.

    Args:
        network, work, data: the model with its weights, the workload, and the training sequences.
        iters: number of iterations.
        seconds: time limit after the first iteration, which compiles; checked after each iteration.
        seed: of the LoRA weights and of the order of the batches.
        told: called after every iteration.
        begin: called with a digest of the state that the training starts from; it may raise.

    Returns:
        Whether all iterations were made.
    """
    with _lora(network.model, work, seed), tempfile.TemporaryDirectory() as folder, _silence():
        np.random.seed(seed)  # the trainer draws the order of its batches from here
        settings = TrainingArgs(
            batch_size=work.batch,
            iters=iters,
            steps_per_report=1,
            steps_per_save=iters + 1,
            max_seq_length=work.seq + 1,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        optimizer = Adam(learning_rate=LEARNING_RATE)
        begin(_digest_of_start(network.model, optimizer, data))
        try:
            train(network.model, optimizer, data, args=settings, training_callback=_Teller(told, seconds))
        except OutOfTime:
            return False
    return True


def _digest_of_start(model: Any, optimizer: Adam, data: list[Sequence]) -> str:
    """Return a digest of all weights, the optimizer, both random number generators, and the sequences."""
    arrays: Any = {"weights": model.parameters(), "optimizer": optimizer.state, "mlx": mx.random.state}
    named: Any = tree_flatten(arrays)
    return digest([*named, ("numpy", np.random.get_state()), ("data", data)])


@contextlib.contextmanager
def _lora(model: Any, work: FineTuning, seed: int) -> Iterator[None]:
    """Add trainable LoRA weights and freeze all others; the original modules are restored on exit.

    mlx-lm's `remove_lora_layers` restores linear layers only: experts and embeddings would keep their LoRA weights.
    """
    own = dict(model.named_modules())
    model.freeze()
    mx.random.seed(seed)
    try:
        linear_to_lora_layers(model, work.tuned_layers, {"rank": work.rank, "scale": SCALE, "dropout": 0.0})
        mx.eval(model.trainable_parameters())
        yield
    finally:
        _put_back(model, own)
        model.eval()


def _put_back(model: Any, own: dict[str, Any]) -> None:
    """Restore modules wherever they have been replaced."""
    now = dict(model.named_modules())
    replaced = [name for name, module in own.items() if now.get(name) is not module]
    # Restoring a module restores its submodules.
    outermost = [name for name in replaced if not any(name.startswith(f"{other}.") for other in replaced)]
    if outermost:
        model.update_modules(tree_unflatten([(name, own[name]) for name in outermost]))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the trainer's output on stdout."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
        yield
