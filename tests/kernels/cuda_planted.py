"""A launcher that only keeps what it is told, and forgetting what was decided for a GPU that was made up."""

from types import SimpleNamespace

import mlx.core as mx

from attention.kernels import cuda
from attention.kernels.cuda import (
    attend,
    general_gradient,
    general_launch,
    gradient,
    launch,
    program,
    pullback,
    stages,
)


class Recorder:
    """Stands in for the compiled launcher: keeps the plans, and answers calls with zeros."""

    def __init__(self):
        self.plans, self.calls = [], {}

    def set_gradient(self, function):
        self.gradient = function

    def keep_call(self, q, k, v, *keywords_and_plan):
        *keywords, plan = keywords_and_plan
        self.calls[q.shape, k.shape, v.shape, *keywords] = plan

    def find_call(self, q, k, v, *keywords):
        plan = self.calls.get((q.shape, k.shape, v.shape, *keywords))
        return plan and plan(q, k, v)[0]

    def forget_calls(self):
        self.calls.clear()

    def make_plan(self, steps, inputs, shapes, types, constants, label, untraced):
        self.plans.append(SimpleNamespace(steps=steps, label=label, untraced=untraced, shapes=shapes, types=types))
        return lambda *arrays: [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]


def forget():
    """All that these modules keep: it is of a GPU that is about to come or to go."""
    cuda.forget_calls()
    for module in (attend, general_gradient, general_launch, gradient, launch, program, pullback, stages):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
