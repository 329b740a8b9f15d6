"""From a call to its kernels: which of them, checked on first use, differentiable, cheap to repeat."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Literal, cast

import mlx.core as mx

from attention.errors import KernelUnavailable
from attention.kernels.cuda import launch, launcher, selfcheck, trust
from attention.kernels.cuda.call import ELEMENTS, Call, Shape
from attention.kernels.cuda.decode import MOST_ROWS
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.gradient import gradients
from attention.kernels.cuda.plan import INPUTS, OUTPUTS, Run, Stage, make_plan
from attention.kernels.cuda.program import Program
from attention.kernels.cuda.stages import few_stages, forward_plan, forward_stages

Path = Literal["decode", "forward"]
TRACE_AFTER = 2
"""Calls of a shape after which MLX keeps their graph; a decoding loop, with more keys each time, never gets there."""

Attend = Callable[[mx.array, mx.array, mx.array], Sequence[mx.array]]


def path_of(shape: Shape) -> Path:
    """Which kernel a call takes.

    Raises:
        KernelUnavailable: it has more queries than this GPU has a kernel for, or there is no launcher.
    """
    obstacle = launcher.obstacle()
    if obstacle:  # they take tensor maps, strides and serial numbers, which nobody else can hand over
        raise KernelUnavailable(f"the kernels need the launcher: {obstacle}")
    if shape.group * shape.queries <= MOST_ROWS:
        return "decode"
    if gpu().architecture != "sm_90a":
        raise KernelUnavailable(f"more than {MOST_ROWS} query rows need a Hopper GPU, and this is {gpu().name}")
    return "forward"


def program_of(shape: Shape, call: Call) -> Program:
    """The program that does the most of a call."""
    if path_of(shape) == "forward":
        return launch.forward_kernel(shape, call).program
    return launch.splitting(shape, call).kernel.program


def attend(q: mx.array, k: mx.array, v: mx.array, shape: Shape, call: Call) -> tuple[mx.array, mx.array]:
    """Queues the kernels of a call; output and logsumexp."""
    if path_of(shape) == "forward":
        output, logsumexp = forward_plan(shape, call)([q, k, v])[:2]
        return output, logsumexp
    return attend_few(q, k, v, shape, call, launch.splitting(shape, call))


def attend_few(
    q: mx.array, k: mx.array, v: mx.array, shape: Shape, call: Call, plan: launch.Splitting
) -> tuple[mx.array, mx.array]:
    """The same with the kernel for few queries, its keys split in a given way."""
    output, logsumexp = make_plan(INPUTS, OUTPUTS, few_stages(shape, call, plan))([q, k, v])[:2]
    return output, logsumexp


def stages(shape: Shape, call: Call, with_logsumexp: bool = True) -> list[Stage]:
    """The launches of a call."""
    if path_of(shape) == "forward":
        return forward_stages(shape, call, with_logsumexp)
    return few_stages(shape, call, launch.splitting(shape, call), with_logsumexp)


def planned(shape: Shape, call: Call, with_logsumexp: bool) -> Run:
    """The launches of a call as one operation, with its gradient: of the output, or of the logsumexp too."""
    launcher.module().set_gradient(_gradients_of)
    label = json.dumps([asdict(shape), asdict(call), with_logsumexp])
    untraced = None if with_logsumexp else make_plan(INPUTS, OUTPUTS[:1], stages(shape, call, False))
    return make_plan(INPUTS, OUTPUTS, stages(shape, call), label, untraced)


def _gradients_of(
    label: str, primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> list[mx.array]:
    """What launcher.cpp calls for the gradient of a plan; without the logsumexp its cotangent is zeros, of no use."""
    shape, call, with_logsumexp = json.loads(label)
    wanted = cotangents[: 2 if with_logsumexp else 1]
    return list(gradients(primals[:3], wanted, outputs[:2], Shape(**shape), Call(**call)))


def check(shape: Shape, call: Call) -> None:
    """Sees to it that the kernel of a call has shown on this GPU that it is right.

    Raises:
        KernelUnavailable: it cannot be compiled, or is wrong, or there is none.
    """
    few = path_of(shape) == "decode"
    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=shape.queries if few else 300, keys=523)
    tried = replace(call, scale=shape.head_dim**-0.5, window=100 if call.window is not None else None)

    def compare() -> str | None:
        made = selfcheck.inputs(small)
        q, k, v = made[:3]
        if few:
            found = attend_few(q, k, v, small, tried, launch.same_kernel(launch.splitting(shape, call), small, tried))
        else:
            made_of = forward_stages(small, tried, kernel=launch.forward_kernel(shape, call))
            output, logsumexp = make_plan(INPUTS, OUTPUTS, made_of)([q, k, v])[:2]
            found = output, logsumexp
        return selfcheck.disagreement(small, tried, *found, made)

    trust.ensure(program_of(shape, call), compare)


class Repeated:
    """The calls of one shape without our launcher: from the third on replayed from a graph that MLX keeps."""

    def __init__(self, shape: Shape, call: Call, with_logsumexp: bool) -> None:
        self._calls = 0
        self._function = _differentiable(shape, call, with_logsumexp)

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> Sequence[mx.array]:
        """Queues the call: output, and logsumexp."""
        if self._calls <= TRACE_AFTER:
            self._calls += 1
            if self._calls > TRACE_AFTER:
                self._function = cast("Attend", mx.compile(self._function))
        return self._function(q, k, v)


@functools.lru_cache(maxsize=256)
def repeated(q: tuple[int, ...], k: tuple[int, ...], dtype: str, call: Call, with_logsumexp: bool) -> Attend:
    """The calls of a shape, given as the shapes of q and k: decided and checked once.

    Raises:
        KernelUnavailable: no kernel of ours takes them, or it failed its check.
    """
    shape = Shape(q[0], q[1], k[1], q[2], k[2], q[3], ELEMENTS[dtype])
    check(shape, call)
    if launcher.missing() is not None:
        return Repeated(shape, call, with_logsumexp)
    plan = planned(shape, call, with_logsumexp)
    return lambda q, k, v: plan([q, k, v])


def _differentiable(shape: Shape, call: Call, with_logsumexp: bool) -> Attend:
    """The call with its gradient; the logsumexp is made in any case, since the backward pass needs it."""

    @mx.custom_function
    def function(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        return attend(q, k, v, shape, call)

    def pull_back(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        wanted = list(cotangents) if with_logsumexp else list(cotangents[:1])
        return gradients(primals, wanted, outputs, shape, call)

    function.vjp(pull_back)
    return cast("Attend", function)
