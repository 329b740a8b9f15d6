"""Stages as one operation: a plan of the launcher, or without it one MLX operation per launch."""

from collections.abc import Sequence

import mlx.core as mx

from attention.kernels.cuda import launcher
from attention.kernels.cuda.plan import Run, Stage, make_plan


def run_of(inputs: Sequence[str], outputs: Sequence[str], stages: Sequence[Stage], label: str = "") -> Run:
    """Return an operation that runs the launches in sequence; not differentiable without a label.

    Args:
        inputs: names of the input arrays.
        outputs: names of the arrays returned first; others may follow.
        stages: the launches.
        label: label of the plan, see `plan_label`.
    """
    if launcher.missing() is None:
        return make_plan(inputs, outputs, stages, label)

    def one_by_one(arrays: list[mx.array]) -> list[mx.array]:
        known = dict(zip(inputs, arrays, strict=True))
        for stage in stages:
            known |= zip(stage.writes, stage.launch(*(known[name] for name in stage.reads)), strict=True)
        return [known[name] for name in outputs]

    return one_by_one
