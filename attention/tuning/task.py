"""One call bound to its inputs, on which candidates are tried; and the check of their accuracy."""

from collections.abc import Sequence
from typing import Final

import mlx.core as mx
import numpy as np
from msgspec import Struct, structs

from attention import masks
from attention.implementations.asked import needs_of
from attention.implementations.baseline import Baseline
from attention.implementations.protocol import Implementation
from attention.implementations.runner import MlxRunner, make_inputs
from attention.masks import Mask
from attention.measure.accuracy import FORWARD_FACTOR, Judge, choose_sample
from attention.reference import Rules, forward
from attention.route import PLAIN, Needs
from attention.workload import Workload

MAX_EQUAL: Final = 0.5
"""Maximum share of an input that may be a single value such as zero: one-hot rows exceed it."""
SCORES: Final = 300_000
"""Number of scores checked against float64: some tens of milliseconds."""


class Task(Struct, frozen=True, kw_only=True, eq=False):
    """A call and its inputs."""

    workload: Workload
    inputs: Sequence[mx.array]
    """q (B, H, L, D), k and v (B, Hkv, Lk, D), and in training the output's gradient, all evaluated."""
    scale: float
    mask: Mask
    softcap: float | None = None

    @property
    def needs(self) -> Needs:
        """The features used that the workload does not describe."""
        return needs_of(self.softcap is not None, self.mask.array)

    def complete(self) -> "Task":
        """Return the task with an output gradient added if one is needed and missing."""
        if self.workload.pass_ != "training" or len(self.inputs) > 3:
            return self
        q, _, v = self.inputs
        return structs.replace(self, inputs=[*self.inputs, mx.ones((*q.shape[:3], v.shape[3]), q.dtype)])

    def telling(self, most_bytes: int | None = None) -> "Task":
        """Return a task on random inputs if these inputs are unsuitable for measuring accuracy and speed, else self.

        The inputs of a warm-up call are zeros or constants, for which wrong weights give the right output; infinities
        and NaN make every candidate wrong; and a GPU computes zeros faster than random values. If new inputs would
        take more than most_bytes, the task stays as it is.
        """
        if most_bytes is not None and self.workload.input_bytes > most_bytes:
            return self
        if all(_tells(array) for array in self.inputs[:3]):
            return self
        return structs.replace(self, inputs=make_inputs(self.workload, 0))

    def stand_in(self, most_bytes: int) -> "Task | None":
        """Return a task of the same shapes on random inputs, for a call being traced; None if too large.

        MLX can evaluate unrelated arrays during tracing. The stand-in for an array mask hides nothing.
        """
        if self.workload.input_bytes > most_bytes:
            return None
        array = self.mask.array
        if array is not None:
            array = (mx.ones if array.dtype == mx.bool_ else mx.zeros)(array.shape, array.dtype)
            mx.eval(array)
        mask = structs.replace(self.mask, array=array)
        return structs.replace(self, inputs=make_inputs(self.workload, 0), mask=mask)


def _tells(array: mx.array) -> bool:
    """Return whether an input (B, H, L, D) is finite, its rows differ, and no value fills more than half of it."""
    finite = mx.isfinite(array).all()
    differ = (array != array[:, :, :1]).any() if array.shape[2] > 1 else mx.array(True)
    mixed = mx.mean((array == array[:1, :1, :1, :1]).astype(mx.float32)) <= MAX_EQUAL
    empty = mx.mean((array == 0).astype(mx.float32)) <= MAX_EQUAL
    return bool(finite & differ & mixed & empty)


class BoundCall(MlxRunner):
    """A candidate bound to a task's inputs."""

    def __init__(self, candidate: Implementation, task: Task, inputs: Sequence[mx.array] | None = None) -> None:
        """Bind the candidate; `inputs` of the same shapes replace the task's."""
        super().__init__(candidate, task.workload, task.inputs if inputs is None else inputs, task.scale)
        self._mask = task.mask
        self._softcap = task.softcap

    def _attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return self._implementation(q, k, v, scale=self._scale, mask=self._mask, softcap=self._softcap)


class Check:
    """Check candidates on one task by FlashAttention 3's error rule; the reference is computed once."""

    def __init__(self, task: Task) -> None:
        """Create it; unsuitable inputs are replaced by random ones, and the reference is computed on first use."""
        self._task = task.telling()
        self._judge: Judge | None = None

    def error(self, candidate: Implementation) -> tuple[float, str]:
        """Return a candidate's largest error and what is wrong with it, empty if it is accurate."""
        task = self._task
        results = BoundCall(candidate, task).results()
        if task.needs != PLAIN:
            return _against_reference(task, results[0])
        if self._judge is None:
            self._judge = Judge(task.workload, task.inputs, task.scale, scores=SCORES)
        rows = self._judge.row_inputs
        of_rows = BoundCall(candidate, task, rows).results() if rows else None
        judgement = self._judge.check(results, of_rows)
        return judgement.max_error, "" if judgement.accurate else judgement.detail


def _against_reference(task: Task, output: mx.array) -> tuple[float, str]:
    """Apply the same rule with a softcap or an array mask: on the heads of one group, and on the output only."""
    sample = choose_sample(task.workload, 0, SCORES)
    batch, group = sample.groups[0]
    share = task.workload.heads // task.workload.kv_heads
    heads = slice(group * share, (group + 1) * share)
    q, k, v = task.inputs[0][batch, heads], task.inputs[1][batch, group], task.inputs[2][batch, group]
    array = task.mask.array
    part = None
    if array is not None:
        whole = slice(None)
        part = masks.part(masks.as_4d(array), slice(batch, batch + 1), heads, whole, whole)
    mask = Mask(causal=task.mask.causal, window=task.mask.window, array=part)
    plain = Baseline()(q[None], k[None, None], v[None, None], scale=task.scale, mask=mask, softcap=task.softcap)[0]
    worst, allowed = 0.0, 0.0
    for head in range(share):
        per_head = None
        if part is not None:
            of_head = _numpy(part[0, head if part.shape[1] > 1 else 0])
            per_head = np.broadcast_to(of_head, (task.workload.seq, task.workload.kv_seq))
        rules = Rules(scale=task.scale, causal=mask.causal, window=mask.window, mask=per_head, softcap=task.softcap)
        exact = forward(_numpy(q[head]), _numpy(k), _numpy(v), rules, sample.rows).output
        rows = mx.array(sample.rows)
        own = np.abs(_numpy(output[batch, group * share + head][rows]) - exact).max()
        peer = np.abs(_numpy(plain[head][rows]) - exact).max()
        worst = max(worst, float(own)) if np.isfinite(own) else float("inf")
        allowed = max(allowed, FORWARD_FACTOR * float(peer) + float(mx.finfo(output.dtype).eps))
    return worst, "" if worst <= allowed else f"output: {worst:.2g} off, {allowed:.2g} allowed"


def _numpy(array: mx.array) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    if array.dtype == mx.bool_:
        return np.array(array)
    return np.asarray(np.array(array.astype(mx.float32)), dtype=np.float64)
