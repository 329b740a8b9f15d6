"""Benchmark fine-tuning: one implementation after the other on the same batches, the first one twice."""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.optimizers import Adam
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from attention.core import events as on
from attention.core.plan import FineTuningPlan
from attention.core.results import MIN_ROUNDS
from attention.core.workload import FineTuning, Workload
from attention.engine.case_runner import CaseRunner, shortage_text
from attention.measure.device import Device, probe
from attention.mlx_lm import configuration, text
from attention.mlx_lm.network import Network, StateChanged, digest
from attention.mlx_lm.patch import CallCounter, replace_attention
from attention.mlx_lm.text import Sequence

SCALE: Final = 20.0
"""mlx-lm's default, like the types of layers that get LoRA weights and the absence of dropout."""
LEARNING_RATE: Final = 1e-4
OnIteration = Callable[[float, float], None]
"""Called with the loss of an iteration and its seconds."""


class OutOfTime(Exception):
    """A fine-tuning reached its time limit."""


class _Callback(TrainingCallback):
    """Forward each iteration, and end the training when its time is up."""

    def __init__(self, on_iteration: OnIteration, seconds: float) -> None:
        self._on_iteration, self._seconds = on_iteration, seconds
        self._end: float | None = None

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._on_iteration(train_info["train_loss"], 1 / train_info["iterations_per_second"])
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
    on_iteration: OnIteration,
    begin: Callable[[str], None],
) -> bool:
    """Train new LoRA weights from the seed, on the same batches each time, and restore the model.

    Args:
        network, work, data: the model with its weights, the workload, and the training sequences.
        iters: number of iterations.
        seconds: time limit after the first iteration, which compiles; checked after each iteration.
        seed: of the LoRA weights and of the order of the batches.
        on_iteration: called after every iteration.
        begin: called with a digest of the state that the training starts from; it may raise.

    Returns:
        Whether all iterations were made.
    """
    with _lora(network.model, work, seed), tempfile.TemporaryDirectory() as folder, _silence_stdout():
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
            train(network.model, optimizer, data, args=settings, training_callback=_Callback(on_iteration, seconds))
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
        _restore_modules(model, own)
        model.eval()


def _restore_modules(model: Any, own: dict[str, Any]) -> None:
    """Restore modules wherever they have been replaced."""
    now = dict(model.named_modules())
    replaced = [name for name, module in own.items() if now.get(name) is not module]
    # Restoring a module restores its submodules.
    outermost = [name for name in replaced if not any(name.startswith(f"{other}.") for other in replaced)]
    if outermost:
        model.update_modules(tree_unflatten([(name, own[name]) for name in outermost]))


@contextlib.contextmanager
def _silence_stdout() -> Iterator[None]:
    """Suppress the trainer's output on stdout."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
        yield


REPEATED_SHARE: Final = 4
MIN_REPEATED_ITERATIONS: Final = 10
"""The reference's second fine-tuning, for the noise floor, runs a quarter of the iterations but at least ten."""
WARM_UP_ITERATIONS: Final = 2
LOGIT_BYTES: Final = 12
"""Bytes per entry of the logits: in the model's dtype, in float32, and their gradient."""


class FineTuningBench(CaseRunner[FineTuningPlan]):
    """The part of a run of fine-tunings that one worker executes."""

    def _prepare_all(self, device: Device) -> None:
        first = self._plan.cases[0]
        self._configuration = configuration.find_model(first.model)
        self._tokens = text.tokenizer_of(self._configuration).encode(text.read(first.data, "data"))
        self._paths: dict[str, str] = {}
        self._network = Network(self._configuration, first.dtype, seed=self._plan.seed)
        self._limit = self._plan.memory_limit_bytes or device.available_bytes

    def _run_case(self, case: int) -> str:
        work = self._plan.cases[case]
        device = probe()
        self._progress.emit(on.WeightsLoaded(case=case, weights_bytes=self._network.weights_bytes))
        names = [name for name in self._assignment.remaining(case) if self._admit(name, work, device)]
        if not names:
            return "nothing to run"
        if self._make_shared(names, self._make_network) is None:
            return "failed"
        layer = self._layer(work)
        self._build([name for name in names if self._needs_building(name, layer, device)], layer, device)
        return self._train_all(names, work)

    def _layer(self, work: FineTuning) -> Workload:
        return self._configuration.workload("training", work.dtype, batch=work.batch, seq=work.seq)

    def _admit(self, name: str, work: FineTuning, device: Device) -> bool:
        route = self._supported_route(name, self._layer(work), device)
        if route is None:
            return False
        self._paths[name] = route.path
        needed = self._needed_bytes(work) + (route.predicted_bytes or 0)
        if needed > self._limit and not self._plan.force:
            reason = shortage_text(needed, self._limit, about=True)
            self._progress.end_row(name, "refused", f"{reason}; a smaller --batch or --seq needs less")
            return False
        return True

    def _needed_bytes(self, work: FineTuning) -> int:
        """Return the bytes of weights, activations kept for the gradient and logits, without attention's."""
        kept = work.tuned_layers * self._configuration.activation_bytes(work.tokens, work.dtype)
        logits = work.tokens * int(self._configuration.fields.get("vocab_size", 0)) * LOGIT_BYTES
        return self._network.weights_bytes + kept + logits

    def _make_network(self) -> Network:
        if not self._network.made:
            self._progress.emit_progress(f"making {self._network.weights_bytes / 2**30:.3g} GiB of weights")
            self._network.make()
        return self._network

    def _train_all(self, names: list[str], work: FineTuning) -> str:
        self._start: str | None = None
        if work.iters <= MIN_ROUNDS:
            self._progress.log(
                f"{work.iters} iterations are too few for a verdict: the first one compiles, "
                f"and {MIN_ROUNDS} more are needed; --iters {MIN_ROUNDS + 1} or more gives one"
            )
        self._compiling_s = 0.0
        self._remaining_iterations = [work.iters] * len(names) + [_iterations_again(work)]
        self._warm_up(work)
        reference, complete = None, True
        for name in names:
            done = self._train(name, work)
            complete = complete and done is not False
            if done is not None and reference is None:
                reference = name
                self._progress.emit(on.ReferenceChosen(case=self._progress.case, implementation=name))
        if reference is None:
            return "failed"
        self._train_again(reference, work)
        return "iterations" if complete else "time"

    def _warm_up(self, work: FineTuning) -> None:
        """Run two iterations with mlx-lm's own attention: one compiles the shared kernels, one is timed."""
        self._progress.emit_progress("compiling what all share")
        self._progress.log("compiling what all implementations share, and timing an iteration")
        times: list[float] = []
        try:
            self._fine_tune(work, WARM_UP_ITERATIONS, lambda loss, seconds: times.append(seconds))
        except Exception as error:
            self._progress.log(f"mlx-lm's own attention cannot be fine-tuned here: {type(error).__name__}: {error}")
            return
        self._compiling_s, iteration_s = times[0], times[-1]
        seconds = self._left_s(iteration_s)
        self._progress.emit_progress(f"an iteration takes {iteration_s:.3g} s", seconds)
        count = len(self._remaining_iterations) - 1
        self._progress.emit(on.CaseTimeEstimated(case=self._progress.case, seconds=seconds, implementations=count))

    def _left_s(self, iteration_s: float) -> float:
        """Estimate the seconds of the remaining fine-tunings; each one's time is limited after its first iteration."""
        each = (min((iters - 1) * iteration_s, self._plan.seconds) for iters in self._remaining_iterations)
        return sum(self._compiling_s + seconds for seconds in each)

    def _train(self, name: str, work: FineTuning) -> bool | None:
        """Fine-tune with an implementation; return whether all iterations were made, None if it failed."""
        self._progress.begin_step(name, "training")
        mx.clear_cache()
        calls, base = CallCounter(name, training=True), mx.get_active_memory()
        mx.reset_peak_memory()  # sets the peak to 0, not to the active memory
        try:
            with replace_attention(name, training=True), calls:
                complete = self._fine_tune(work, work.iters, self._on_iteration(name, work.iters))
        except Exception as error:
            self._fail(name, error)
            return None
        case, peak = self._progress.case, max(0, mx.get_peak_memory() - base)
        self._progress.emit(calls.event(case, self._paths.get(name)))
        self._progress.emit(on.MemoryMeasured(case=case, implementation=name, peak_bytes=peak))
        self._supported_route(name, self._layer(work), probe())  # an autotuner knows its path only now
        return complete

    def _train_again(self, reference: str, work: FineTuning) -> None:
        """Repeat the reference after all others; the difference from its first run is the noise floor."""
        self._progress.mark_idle()
        iters = _iterations_again(work)
        try:
            with replace_attention(reference, training=True):
                self._fine_tune(work, iters, self._on_iteration(on.REPEATED_REFERENCE, iters))
        except Exception as error:
            self._progress.log(f"{reference} could not be repeated, so there is no noise floor: {error}")

    def _fine_tune(self, work: FineTuning, iters: int, on_iteration: Callable[[float, float], None]) -> bool:
        data = text.sequences(self._tokens, work.seq, min_count=work.batch)
        return fine_tune(
            self._network,
            work,
            data,
            iters=iters,
            seconds=self._plan.seconds,
            seed=self._plan.seed,
            on_iteration=on_iteration,
            begin=self._check_start,
        )

    def _check_start(self, digest: str) -> None:
        """Raise StateChanged if a fine-tuning starts from another state than the first one of the case."""
        if self._start is None:
            self._start = digest
        elif digest != self._start:
            raise StateChanged("weights, optimizer or random numbers are not those that the first row started with")

    def _on_iteration(self, name: str, iters: int) -> Callable[[float, float], None]:
        count, times = 0, list[float]()
        self._remaining_iterations.pop(0)

        def on_iteration(loss: float, seconds: float) -> None:
            nonlocal count
            count += 1
            self._progress.emit(
                on.IterationDone(
                    case=self._progress.case,
                    implementation=name,
                    number=count,
                    loss=loss if math.isfinite(loss) else None,
                    seconds=seconds,
                    active_bytes=mx.get_active_memory(),
                    peak_bytes=mx.get_peak_memory(),
                )
            )
            times.append(seconds)
            rate = f"loss {loss:.3f}, {1 / seconds:.3g} it/s"
            each_s = median(times[1:] or times)
            left_s = max(0.0, min((iters - count) * each_s, self._plan.seconds - sum(times[1:])))
            self._progress.emit_progress(f"{name}: iteration {count} of {iters}, {rate}", left_s + self._left_s(each_s))

        return on_iteration


def _iterations_again(work: FineTuning) -> int:
    return min(work.iters, max(MIN_REPEATED_ITERATIONS, work.iters // REPEATED_SHARE))
