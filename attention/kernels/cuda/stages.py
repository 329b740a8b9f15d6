"""Plan stages of the Hopper forward kernel and of the split-K kernel."""

import functools
from typing import Final

from attention.kernels.cuda import launch
from attention.kernels.cuda.call import Call, Shape
from attention.kernels.cuda.forward import WARPGROUP_ROWS, Forward
from attention.kernels.cuda.plan import INPUTS, OUTPUTS, Box, Run, Stage, make_plan

PARTS: Final = ("parts", "marks")
WRITTEN: Final = (*OUTPUTS, *PARTS)
"""Arrays written by both kernels; parts exist only if the keys of some queries are split over several blocks."""


def forward_stages(shape: Shape, call: Call, with_logsumexp: bool = True, kernel: Forward | None = None) -> list[Stage]:
    """Return the launch of the Hopper kernel, in a given specialisation or the one for the call."""
    kernel = kernel or launch.forward_kernel(shape, call)
    made = launch.forward(shape, call, kernel)
    keys = Box(kernel.block_n)
    return [
        Stage(
            made,
            INPUTS,
            WRITTEN,
            maps={"q": Box(WARPGROUP_ROWS), "k": keys, "v": keys},
            omitted=_omitted(made, with_logsumexp),
            serial=True,
        )
    ]


@functools.lru_cache(maxsize=256)
def forward_plan(shape: Shape, call: Call) -> Run:
    """Return the Hopper forward kernel as a plan without gradient: output, logsumexp and stats."""
    return make_plan(INPUTS, OUTPUTS, forward_stages(shape, call))


def few_stages(shape: Shape, call: Call, plan: launch.Splitting, with_logsumexp: bool = True) -> list[Stage]:
    """Return the launch of the split-K kernel with a given splitting."""
    made = launch.decode(shape, call, plan)
    return [Stage(made, INPUTS, WRITTEN, strided=INPUTS, omitted=_omitted(made, with_logsumexp), serial=True)]


def _omitted(made: launch.Launch, with_logsumexp: bool) -> frozenset[str]:
    """Return the arrays of `WRITTEN` that are not written."""
    unwanted = set() if with_logsumexp else {"logsumexp", "stats"}
    parts = made.keywords["output_shapes"][WRITTEN.index(PARTS[0])]
    return frozenset(unwanted if parts[0] else unwanted | set(PARTS))
