"""The choice bound to its inputs, for the clock of a run to repeat."""

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
"""Of a run's samples, one in so many is looked at: even some microseconds of each would show."""
TRY_S: Final = 0.0003
"""What calls that are tried together take about: long against waiting for them, and short beside a sample."""


class DemoRunner(MlxRunner):
    """Repeats the choice; watches by the samples that are taken anyhow, so that nothing is evaluated for its sake."""

    def __init__(self, demo: "Demo", task: Task) -> None:
        """Binds the call, after a trial if there was none."""
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
        """Evaluates the outputs of all calls queued; then, within the share of calls for that, tries a challenger."""
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
        """Queues the first call of a sample that will be looked at; of the others nothing is asked, not even that."""
        del self.queue
        self._began = self._demo.clock()
        return self.queue()

    def _look_at(self, call_s: float, count: int) -> None:
        """Takes in what a call of a sample took, and how many calls the sample had."""
        standing = self._standing
        standing.calls, self._calls = standing.calls + self._calls, 0
        if count != self._usual:
            self._usual = count
            standing.watch.begin_anew()
        standing.watch.observe(call_s)
        # Both halves of a pair come on top of the calls that were asked for.
        self._few = max(1, min(count, round(TRY_S / max(call_s, SHORTEST_S))))
        if self._watching and standing.watch.may_try(standing.calls // (2 * self._few)):
            self._demo.attempt_pair(standing, self._try, self._task, queued=self._few > 1)
        self._implementation = standing.call

    def peak_bytes(self) -> int | None:
        """Peak memory of the choice alone."""
        self._watching = False
        try:
            return super().peak_bytes()
        finally:
            self._watching = True

    def _try(self, candidate: Implementation) -> None:
        """A few calls of a candidate, queued together as those of a sample are."""
        runner = BoundCall(candidate, self._task)
        runner.wait([runner.queue() for _ in range(self._few)])
