"""An implementation with a planted slowdown, for `benchmarks.gate`; a module of its own, which workers load quickly."""

import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from attention.core.workload import Workload
from attention.implementations.baseline import Baseline
from attention.implementations.calls import MlxRunner
from attention.measure.rounds import Runner


class DelayedRunner(MlxRunner):
    """Calls of the baseline; each sample is followed by a wait for a share of the time that it took."""

    delay = 0.0
    _began: float | None = None

    def queue(self) -> list[mx.array]:
        """Queue one call."""
        if self._began is None:
            self._began = time.perf_counter()
        return super().queue()

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs, then wait."""
        super().wait(outputs)
        now = time.perf_counter()
        began, self._began = self._began or now, None
        end = now + self.delay * (now - began)
        while time.perf_counter() < end:
            pass


class Delayed(Baseline):
    """The baseline with a planted slowdown."""

    name = "delayed"
    delay = 0.0

    def runner(self, workload: Workload, inputs: Sequence[Any], scale: float) -> Runner:
        """Bind the call."""
        made = DelayedRunner(self, workload, inputs, scale)
        made.delay = self.delay
        return made
