"""The launches of a call as stages of a plan."""

import functools

from attention.kernels.cuda import launch
from attention.kernels.cuda.call import Call, Shape
from attention.kernels.cuda.forward import WARPGROUP_ROWS
from attention.kernels.cuda.plan import INPUTS, OUTPUTS, Box, Run, Stage, make_plan


def forward_stages(shape: Shape, call: Call, with_logsumexp: bool = True) -> list[Stage]:
    """The launch of the Hopper kernel."""
    made = launch.forward(shape, call)
    kernel = launch.forward_kernel(shape, call)
    keys = Box(kernel.block_n)
    omitted = {"logsumexp"} if not with_logsumexp else set()
    if not made.keywords["output_shapes"][2][0]:
        omitted |= {"parts", "marks"}
    return [
        Stage(
            made,
            INPUTS,
            (*OUTPUTS, "parts", "marks"),
            maps={"q": Box(WARPGROUP_ROWS), "k": keys, "v": keys},
            omitted=frozenset(omitted),
            serial=True,
        )
    ]


@functools.lru_cache(maxsize=256)
def forward_plan(shape: Shape, call: Call) -> Run:
    """The Hopper kernel alone, without a gradient: it gives output and logsumexp."""
    return make_plan(INPUTS, OUTPUTS, forward_stages(shape, call))


def few_stages(shape: Shape, call: Call, plan: launch.Splitting) -> list[Stage]:
    """The launches of a call of few queries."""
    splitting = launch.decode(shape, call, plan)
    if plan.splits == 1:
        return [Stage(splitting, INPUTS, OUTPUTS)]
    parts = ("outputs", "logsumexps")
    return [Stage(splitting, INPUTS, parts), Stage(launch.join(shape, plan.splits), parts, OUTPUTS)]
