"""A tuned call bound to its inputs, as a benchmark run repeats it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import mlx.core as mx

from attention.implementations.protocol import Implementation
from attention.implementations.runner import MlxRunner
from attention.tuning.sighting import SHORTEST_S
from attention.tuning.task import BoundCall, Task

if TYPE_CHECKING:
    from attention.tuning.demo import Demo

SAMPLES_A_LOOK: Final = 8
"""One in this many samples is observed by the tuner: a few microseconds in each sample would distort the result."""
TRY_S: Final = 0.0003
"""Approximate length of a group of calls of a challenger: long against a wait for the device, short beside a sample."""


class DemoRunner(MlxRunner):
    """Repeat the tuned choice; monitor it with the samples of the run, so that nothing extra is evaluated."""

    def __init__(self, demo: "Demo", task: Task) -> None:
        """Bind the call; runs a trial if there was none."""
        super().__init__(demo, task.workload, task.inputs, task.scale)
        self._demo = demo
        self._task = task
        self._standing = demo.standing(task)
        self._implementation = self._standing.call
        self._watching = True
        self._began: float | None = None
        self._usual = self._waits = self._calls = 0
        self._few = 1

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs of all queued calls; then try a challenger, within the share of calls allowed."""
        super().wait(outputs)
        calls = len(outputs) if isinstance(outputs[0], list) else 1
        self._calls += calls
        self._waits += 1
        if self._began is not None:
            self._look_at((self._demo.clock() - self._began) / calls, calls)
            self._began = None
        if self._waits % SAMPLES_A_LOOK == 0:
            self.queue = self._queue_first  # type: ignore[method-assign]

    def _queue_first(self) -> list[mx.array]:
        """Queue the first call of an observed sample; the calls of other samples bypass this method altogether."""
        del self.queue
        self._began = self._demo.clock()
        return self.queue()

    def _look_at(self, call_s: float, count: int) -> None:
        """Record the time of one call of a sample, and the sample's number of calls."""
        standing = self._standing
        standing.calls, self._calls = standing.calls + self._calls, 0
        if count != self._usual:
            self._usual = count
            standing.watch.begin_anew()
        standing.watch.observe(call_s)
        # Both halves of a pair are extra calls, beyond those of the run.
        self._few = max(1, min(count, round(TRY_S / max(call_s, SHORTEST_S))))
        if self._watching and standing.watch.may_try(standing.calls // (2 * self._few)):
            self._demo.attempt_pair(standing, self._try, self._task, queued=self._few > 1)
        self._implementation = standing.call

    def peak_bytes(self) -> int | None:
        """Return the peak memory of the choice alone, in bytes."""
        self._watching = False
        try:
            return super().peak_bytes()
        finally:
            self._watching = True

    def _try(self, candidate: Implementation) -> None:
        """Run a few calls of a candidate, queued together like those of a sample."""
        runner = BoundCall(candidate, self._task)
        runner.wait([runner.queue() for _ in range(self._few)])
