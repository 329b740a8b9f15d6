"""A call of a workload by all ranks of a group, bound to its inputs, for timing."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
from msgspec import structs

from attention.core.workload import Workload
from attention.distributed import collectives
from attention.distributed.attend import Problem, attend
from attention.distributed.decision import Decision
from attention.distributed.layout import Layout, make_layout
from attention.distributed.shards import layout_for, own_rows, shard, unshard
from attention.implementations import load_implementation
from attention.implementations.calls import make_inputs
from attention.implementations.protocol import Implementation
from attention.masks import of_workload


class BoundCall:
    """One rank's part of a call; every rank makes the same, in the same order.

    Attributes:
        decision: how the ranks share the call.
        layout: layout of the keys, and of the rows unless every rank has them all.
        bytes_sent: bytes that this rank sends in a call.
    """

    def __init__(
        self,
        workload: Workload,
        group: collectives.Group,
        decision: Decision,
        implementation: str | Implementation,
        *,
        seed: int = 0,
        communicate: bool = True,
        inputs: Sequence[mx.array] | None = None,
    ) -> None:
        """Make the inputs, the same on every rank, and keep this rank's part of them.

        `inputs`: q, k, v, and in training the output's gradient, in place of those from the seed.

        Without `communicate` nothing is sent: other ranks' keys have wrong values, and the group need not exist.

        Raises:
            UsageError: the decision does not fit the workload or the group.
        """
        self.decision, self._group, self._training = decision, group, workload.pass_ == "training"
        chosen = load_implementation(implementation) if isinstance(implementation, str) else implementation
        scale, mask = workload.head_dim**-0.5, of_workload(workload)
        q, k, v, *cotangent = make_inputs(workload, seed) if inputs is None else inputs
        rows: Layout
        if decision.method == "alone":
            self.layout = make_layout(workload.kv_seq, group.size(), "replicated")
            rows = make_layout(workload.seq, group.size(), "replicated")
            self._inputs = [q, k, v, *cotangent]
        elif decision.method == "split keys":
            self.layout = make_layout(workload.kv_seq, group.size(), decision.layout, weights=decision.weights)
            rows = make_layout(workload.seq, group.size(), "replicated")
            self._inputs = [q, *(own_rows(x, self.layout, group.rank()) for x in (k, v))]
        else:
            named = mask.pattern if mask.pattern is not None else workload.mask
            self.layout = rows = layout_for(
                decision.layout,
                workload.seq,
                group,
                mask=named,
                planes=(workload.batch, workload.heads),
                weights=decision.weights,
            )
            parts = shard(q, k, v, group, rows)
            self._inputs = [parts.q, parts.k, parts.v]
            if cotangent:
                self._inputs.append(shard(cotangent[0], cotangent[0], cotangent[0], group, rows).q)
        self._inputs = [mx.contiguous(x) for x in self._inputs]
        mx.eval(self._inputs)
        self._problem = Problem(chosen, scale, mask, None, rows, self.layout, group, communicate=communicate)
        self._computing = structs.replace(self._problem, communicate=False)
        # what a call is made to wait with for the one before: what is moved, or the rows where nothing is
        self._late = slice(0, 1) if decision.method in ("split keys", "alone") else slice(1, 3)
        self._previous: list[mx.array] = []
        before = collectives.statistics().bytes_sent
        self.wait(self.queue())
        self.bytes_sent = collectives.statistics().bytes_sent - before

    def queue(self) -> list[mx.array]:
        """Queue one call; return this rank's output, and in training its dQ, dK and dV, unevaluated.

        It begins when the call before has ended, as in a model, so that no call hides another's communication; and the
        ranks' collectives are in one order, as they have to be.
        """
        with collectives.in_sequence():
            self._previous = self._queue(self._problem)
        return self._previous

    def queue_compute(self) -> list[mx.array]:
        """Queue what this rank computes in a call, without communication."""
        return self._queue(self._computing)

    def _queue(self, problem: Problem) -> list[mx.array]:
        arrays = self._inputs
        if self._previous:
            arrays = arrays.copy()
            arrays[self._late] = [cast("mx.array", mx.depends(x, self._previous)) for x in arrays[self._late]]
        q, k, v, *cotangent = arrays
        if not self._training:
            return [attend(q, k, v, problem)[0]]

        def call(*arrays: mx.array) -> mx.array:
            return attend(arrays[0], arrays[1], arrays[2], problem)[0]

        outputs, gradients = mx.vjp(call, [q, k, v], cotangent)
        return [*outputs, *gradients]

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs of all queued calls."""
        mx.eval(cast("list[mx.array]", list(outputs)))

    def gather_results(self) -> list[mx.array]:
        """Run a call and return its whole output, and in training dQ, dK and dV, on every rank."""
        results = self.queue()
        if self.decision.method not in ("split keys", "alone"):
            results = [unshard(part, self.layout, self._group) for part in results]
        mx.eval(results)
        return results

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._group.size() > 1:
            mx.eval(mx.distributed.all_sum(mx.array([1.0]), group=self._group))
            mx.synchronize()

    def of_ranks(self, number: float) -> list[float]:
        """Return all ranks' numbers, on each of them."""
        if self._group.size() == 1:
            return [number]
        numbers = mx.distributed.all_gather(mx.array([number], mx.float32), group=self._group)
        return cast("list[float]", numbers.tolist())
