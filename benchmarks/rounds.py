"""Timing of kernels and their peers in the engine's interleaved rounds (`attention.measure.rounds`).

Every round takes one sample of each, in random order. A sample follows an untimed one of the same call and length, so
that clocks, caches and power limits are its own.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import mlx.core as mx

from attention.measure.rounds import Arm, Limits, TimedCall, calls_for, run_rounds, take_sample

Call = Callable[[], Any]
ROUNDS: Final = 7
SAMPLE_S: Final = 0.03
WARM_UP_CALLS: Final = 3
"""Without the CUDA launcher, the third call is traced by `mx.compile`."""


class MlxCalls:
    """MLX calls, queued and evaluated together; cycles through several, whose inputs then do not stay in a cache."""

    def __init__(self, *calls: Call) -> None:
        self._calls = itertools.cycle(calls)

    def queue(self) -> object:
        """Return the outputs of the next call, unevaluated."""
        return next(self._calls)()

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs and wait for the device."""
        mx.eval(list(outputs))
        mx.synchronize()


class EagerMlxCalls(MlxCalls):
    """MLX calls that start when queued; their outputs are freed one by one, so that memory is that of one call."""

    def queue(self) -> object:
        """Start the next call."""
        mx.async_eval(next(self._calls)())  # type: ignore[no-untyped-call]
        return None

    def wait(self, outputs: Sequence[object]) -> None:
        """Wait for the device."""
        mx.synchronize()


class EvaluatedCalls(MlxCalls):
    """MLX calls that are each evaluated before the next is queued."""

    def queue(self) -> object:
        """Evaluate the next call."""
        mx.eval(next(self._calls)())
        return None

    def wait(self, outputs: Sequence[object]) -> None:
        """Do nothing: every call is done."""


class UntilEvaluated:
    """MLX calls of another runner, timed until their outputs are there, as a program waits for them.

    `mx.synchronize` then also waits until a thread of MLX has released what the calls kept: 50 to 100 us on an H200
    machine, which count in short samples.
    """

    def __init__(self, runner: TimedCall) -> None:
        self._runner = runner

    def queue(self) -> object:
        """Return the outputs of the runner's next call, unevaluated."""
        return self._runner.queue()

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs."""
        mx.eval(list(outputs))


class ChainedCalls:
    """MLX calls of which each takes the output of the one before, as a model's layers do: none runs beside another.

    They cycle through several, whose other inputs then do not stay in a cache. `LAYERS` at a time are started, as
    mlx-lm starts the layers of a token while the GPU computes the token before.
    """

    LAYERS: Final = 32

    def __init__(self, first: mx.array, *calls: Callable[[mx.array], mx.array]) -> None:
        self._first = self._latest = first
        self._calls = itertools.cycle(calls)
        self._made = 0

    def queue(self) -> mx.array:
        """Return the output of the next call."""
        self._latest = next(self._calls)(self._latest)
        self._made += 1
        if self._made % self.LAYERS == 0:
            mx.async_eval(self._latest)  # type: ignore[no-untyped-call]
        return self._latest

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the last output; the next chain begins anew."""
        mx.eval(self._latest)
        self._latest = self._first


class TorchCalls:
    """PyTorch calls; cycles through several. Outputs are freed at once."""

    def __init__(self, *calls: Call) -> None:
        import torch

        self._calls = itertools.cycle(calls)
        self._on_gpu = torch.cuda.is_available()
        self._synchronize = torch.cuda.synchronize

    def queue(self) -> object:
        """Start the next call."""
        next(self._calls)()
        return None

    def wait(self, outputs: Sequence[object]) -> None:
        """Wait for the GPU, if there is one; on the CPU a call ends before it returns."""
        if self._on_gpu:
            self._synchronize()


def sample(
    arms: Sequence[Arm],
    rounds: int,
    before: Callable[[Arm], None] = lambda arm: None,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Return seconds per call of each arm, one for each round.

    Args:
        arms: what is timed.
        rounds: number of rounds.
        before: called before each sample.
        after_round: called after each round.

    Raises:
        Exception: whatever a call raises.
    """

    def failed(arm: Arm, error: BaseException) -> None:
        raise error

    def after(_: list[Arm]) -> None:
        after_round()

    limits = Limits(seconds=0, precision=0, min_rounds=rounds)  # no time beyond the minimum of rounds
    run_rounds(list(arms), limits, seed=1, before=before, failed=failed, after=after)
    return {arm.name: arm.samples for arm in arms}


def medians(runs: Mapping[str, TimedCall]) -> dict[str, float]:
    """Return the median seconds per call of each run, in samples of about SAMPLE_S."""
    arms = []
    for name, run in runs.items():
        for _ in range(WARM_UP_CALLS):
            take_sample(run, 1)
        call_s = min(take_sample(run, 1), take_sample(run, 3))
        arms.append(Arm(name=name, runner=run, call_s=call_s, calls=calls_for(call_s, SAMPLE_S, 1), lead_in=True))
    return {name: statistics.median(times) for name, times in sample(arms, ROUNDS).items()}


def queued(runs: Mapping[str, TimedCall], calls: int, rounds: int = 12) -> dict[str, float]:
    """Return the median seconds per call of each run, in samples of so many calls, queued and evaluated together."""
    arms = []
    for name, run in runs.items():
        for _ in range(WARM_UP_CALLS):
            take_sample(run, 1)
        call_s = take_sample(run, calls)
        arms.append(Arm(name=name, runner=UntilEvaluated(run), call_s=call_s, calls=calls, lead_in=True))
    return {name: statistics.median(times) for name, times in sample(arms, rounds).items()}


def one_at_a_time(runs: Mapping[str, TimedCall], count: int = 200) -> dict[str, float]:
    """Return the median seconds of one queued and evaluated call of each run."""
    arms = [Arm(name=name, runner=run, call_s=take_sample(run, 1)) for name, run in runs.items()]
    return {name: statistics.median(times) for name, times in sample(arms, count).items()}
