"""Benchmark fine-tuning: one implementation after the other on the same batches, the first one twice."""

import math
from collections.abc import Callable
from statistics import median
from typing import Final

import mlx.core as mx

from attention import events as on
from attention.case_runner import CaseRunner
from attention.device import Device, probe
from attention.models import configuration, text
from attention.models.network import Network
from attention.models.replacing import Calls, replaced
from attention.models.state import StateChanged
from attention.models.training import fine_tune
from attention.models.workloads import FineTuning
from attention.plan import FineTuningPlan
from attention.report import MIN_ROUNDS
from attention.workload import Workload

AGAIN_SHARE: Final = 4
FEWEST_AGAIN: Final = 10
"""The reference's second fine-tuning, for the noise floor, runs a quarter of the iterations but at least ten."""
WARM_UP_ITERATIONS: Final = 2
LOGIT_BYTES: Final = 12
"""Bytes per entry of the logits: in the model's dtype, in float32, and their gradient."""


class FineTuningBench(CaseRunner[FineTuningPlan]):
    """The part of a run of fine-tunings that one worker executes."""

    def _prepare_all(self, device: Device) -> None:
        first = self._plan.cases[0]
        self._configuration = configuration.find(first.model)
        self._tokens = text.tokenizer_of(self._configuration).encode(text.read(first.data))
        self._paths: dict[str, str] = {}
        self._network = Network(self._configuration, first.dtype, seed=self._plan.seed)
        self._limit = self._plan.memory_limit_bytes or device.available_bytes

    def _run_case(self, case: int) -> str:
        work = self._plan.cases[case]
        device = probe()
        self._teller.emit(on.WeightsMade(case=case, weights_bytes=self._network.weights_bytes))
        names = [name for name in self._assignment.remaining(case) if self._is_to_run(name, work, device)]
        if not names:
            return "nothing to run"
        if self._shared(names, self._made_network) is None:
            return "failed"
        layer = self._layer(work)
        self._build([name for name in names if self._needs_building(name, layer, device)], layer, device)
        return self._train_all(names, work)

    def _layer(self, work: FineTuning) -> Workload:
        return self._configuration.workload("training", work.dtype, batch=work.batch, seq=work.seq)

    def _is_to_run(self, name: str, work: FineTuning, device: Device) -> bool:
        route = self._taken_route(name, self._layer(work), device)
        if route is None:
            return False
        self._paths[name] = route.path
        needed = self._needed(work) + (route.predicted_bytes or 0)
        if needed > self._limit and not self._plan.force:
            reason = f"needs about {needed / 2**30:.4g} GiB of {self._limit / 2**30:.4g}"
            self._teller.end_row(name, "refused", f"{reason}; a smaller --batch or --seq needs less")
            return False
        return True

    def _needed(self, work: FineTuning) -> int:
        """Return the bytes of weights, activations kept for the gradient and logits, without attention's."""
        kept = work.tuned_layers * self._configuration.working_bytes(work.tokens, work.dtype)
        logits = work.tokens * int(self._configuration.fields.get("vocab_size", 0)) * LOGIT_BYTES
        return self._network.weights_bytes + kept + logits

    def _made_network(self) -> Network:
        if not self._network.made:
            self._teller.progress(f"making {self._network.weights_bytes / 2**30:.3g} GiB of weights")
            self._network.make()
        return self._network

    def _train_all(self, names: list[str], work: FineTuning) -> str:
        self._start: str | None = None
        if work.iters <= MIN_ROUNDS:
            self._teller.say(
                f"{work.iters} iterations are too few for a verdict: the first one compiles, "
                f"and {MIN_ROUNDS} more are needed; --iters {MIN_ROUNDS + 1} or more gives one"
            )
        self._compiling_s = 0.0
        self._to_come = [work.iters] * len(names) + [_iterations_again(work)]
        self._warm_up(work)
        reference, complete = None, True
        for name in names:
            done = self._train(name, work)
            complete = complete and done is not False
            if done is not None and reference is None:
                reference = name
                self._teller.emit(on.ReferenceChosen(case=self._teller.case, implementation=name))
        if reference is None:
            return "failed"
        self._train_again(reference, work)
        return "iterations" if complete else "time"

    def _warm_up(self, work: FineTuning) -> None:
        """Run two iterations with mlx-lm's own attention: one compiles the shared kernels, one is timed."""
        self._teller.progress("compiling what all share")
        self._teller.say("compiling what all implementations share, and timing an iteration")
        times: list[float] = []
        try:
            self._fine_tune(work, WARM_UP_ITERATIONS, lambda loss, seconds: times.append(seconds))
        except Exception as error:
            self._teller.say(f"mlx-lm's own attention cannot be fine-tuned here: {type(error).__name__}: {error}")
            return
        self._compiling_s, iteration_s = times[0], times[-1]
        seconds = self._left_s(iteration_s)
        self._teller.progress(f"an iteration takes {iteration_s:.3g} s", seconds)
        count = len(self._to_come) - 1
        self._teller.emit(on.Expected(case=self._teller.case, seconds=seconds, implementations=count))

    def _left_s(self, iteration_s: float) -> float:
        """Estimate the seconds of the remaining fine-tunings; each one's time is limited after its first iteration."""
        each = (min((iters - 1) * iteration_s, self._plan.seconds) for iters in self._to_come)
        return sum(self._compiling_s + seconds for seconds in each)

    def _train(self, name: str, work: FineTuning) -> bool | None:
        """Fine-tune with an implementation; return whether all iterations were made, None if it failed."""
        self._teller.step(name, "training")
        mx.clear_cache()
        calls, base = Calls(name, training=True), mx.get_active_memory()
        mx.reset_peak_memory()  # sets the peak to 0, not to what is active
        try:
            with replaced(name, training=True), calls:
                complete = self._fine_tune(work, work.iters, self._told(name, work.iters))
        except Exception as error:
            self._fail(name, error)
            return None
        case, peak = self._teller.case, max(0, mx.get_peak_memory() - base)
        self._teller.emit(calls.event(case, self._paths.get(name)))
        self._teller.emit(on.MemoryMeasured(case=case, implementation=name, peak_bytes=peak))
        self._taken_route(name, self._layer(work), probe())  # an autotuner knows its path only now
        return complete

    def _train_again(self, reference: str, work: FineTuning) -> None:
        """Repeat the reference after all others; the difference from its first run is the noise floor."""
        self._teller.at_rest()
        iters = _iterations_again(work)
        try:
            with replaced(reference, training=True):
                self._fine_tune(work, iters, self._told(on.AGAIN, iters))
        except Exception as error:
            self._teller.say(f"{reference} could not be repeated, so there is no noise floor: {error}")

    def _fine_tune(self, work: FineTuning, iters: int, told: Callable[[float, float], None]) -> bool:
        data = text.sequences(self._tokens, work.seq, least=work.batch)
        return fine_tune(
            self._network,
            work,
            data,
            iters=iters,
            seconds=self._plan.seconds,
            seed=self._plan.seed,
            told=told,
            begin=self._begin,
        )

    def _begin(self, digest: str) -> None:
        """Raise StateChanged if a fine-tuning starts from another state than the first one of the case."""
        if self._start is None:
            self._start = digest
        elif digest != self._start:
            raise StateChanged("weights, optimizer or random numbers are not those that the first row started with")

    def _told(self, name: str, iters: int) -> Callable[[float, float], None]:
        count, times = 0, list[float]()
        self._to_come.pop(0)

        def told(loss: float, seconds: float) -> None:
            nonlocal count
            count += 1
            self._teller.emit(
                on.IterationDone(
                    case=self._teller.case,
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
            self._teller.progress(f"{name}: iteration {count} of {iters}, {rate}", left_s + self._left_s(each_s))

        return told


def _iterations_again(work: FineTuning) -> int:
    return min(work.iters, max(FEWEST_AGAIN, work.iters // AGAIN_SHARE))
