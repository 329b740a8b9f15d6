"""Calls bound to their inputs, for repeated timing."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from attention.core.workload import Workload
from attention.implementations.protocol import Implementation, ProvidesRunner
from attention.masks import of_workload
from attention.measure.clock import Runner


class MlxRunner:
    """Runner of an MLX implementation on one set of evaluated inputs."""

    def __init__(
        self, implementation: Implementation, workload: Workload, inputs: Sequence[mx.array], scale: float
    ) -> None:
        """Bind the call.

        Args:
            implementation: the implementation to call.
            workload: gives the mask, and whether gradients are computed.
            inputs: q, k, v, and in training the output's gradient, evaluated.
            scale: factor of the scores.
        """
        self._implementation = implementation
        self._training = workload.pass_ == "training"
        self._inputs = list(inputs)
        self._scale = scale
        self._mask = of_workload(workload)

    def queue(self) -> list[mx.array]:
        """Queue one call; return the output, and in training dQ, dK and dV, unevaluated."""
        if not self._training:
            return [self._attend(*self._inputs[:3])]
        outputs, gradients = mx.vjp(self._attend, self._inputs[:3], self._inputs[3:4])
        return [*outputs, *gradients]

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs of all queued calls."""
        mx.eval(cast("list[mx.array]", list(outputs)))

    def results(self) -> list[mx.array]:
        """Run one call and return its evaluated results."""
        outputs = self.queue()
        self.wait(outputs)
        return outputs

    def peak_bytes(self) -> int | None:
        """Run one call with an empty cache and return MLX's peak memory above the memory active before, in bytes."""
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()  # sets the peak to 0, not to the active memory
        self.results()
        return max(0, mx.get_peak_memory() - before)

    def _attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return self._implementation(q, k, v, scale=self._scale, mask=self._mask)


def make_inputs(workload: Workload, seed: int) -> list[mx.array]:
    """Return normally distributed, evaluated inputs: q, k, v, and in training the output's gradient."""
    shapes = [
        (workload.batch, workload.heads, workload.seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.value_dim),
    ]
    if workload.pass_ == "training":
        shapes.append((workload.batch, workload.heads, workload.seq, workload.value_dim))
    dtype = getattr(mx, workload.dtype)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    inputs = []
    for shape, key in zip(shapes, keys, strict=True):
        inputs.append(mx.random.normal(shape, dtype=dtype, key=key))
        mx.eval(inputs[-1])  # one by one, so that the generator's scratch is not needed four times at once
    return inputs


def runner_for(implementation: Implementation, workload: Workload, inputs: Sequence[mx.array], scale: float) -> Runner:
    """Bind an implementation to its inputs, with its own runner if it has one."""
    if isinstance(implementation, ProvidesRunner):
        return implementation.runner(workload, inputs, scale)
    return MlxRunner(implementation, workload, inputs, scale)
