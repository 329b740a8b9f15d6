"""One call of the kernels on random inputs, forward and backward, and what is wrong with it."""

from dataclasses import dataclass

import kernels_judge
import mlx.core as mx
import numpy as np

from attention.kernels.metal import gradient, launch, selfcheck
from attention.kernels.metal.call import Call, MaskKind, Shape


@dataclass(frozen=True)
class Kind:
    """The features of a call."""

    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: MaskKind = "none"
    sinks: bool = False

    def call(self, head_dim: int) -> Call:
        return Call(head_dim**-0.5, self.causal, self.window, self.softcap, self.mask, self.sinks)


KINDS = {
    "full": Kind(),
    "causal": Kind(causal=True),
    "window": Kind(causal=True, window=13),
    "softcap": Kind(softcap=2.0),
    "bool mask": Kind(mask="bool"),
    "additive mask": Kind(mask="float32", causal=True),
    "sinks": Kind(causal=True, sinks=True),
    "all at once": Kind(causal=True, window=29, softcap=3.0, mask="float16", sinks=True),
}


def problems(shape: Shape, call: Call, backward: bool = True, seed: int = 3) -> list[str]:
    """What is wrong with output, logsumexp and gradients; findings of the verifier are raised."""
    given = selfcheck.inputs(shape, call, seed)
    arrays = given.arrays(shape)
    outputs = launch.forward(*arrays, shape, call)
    found = [outputs[0]]
    if backward:
        made = gradient.by_kernel(arrays, given.cotangent, None, outputs, shape, call)
        found += [*made[:3], *([made[4]] if call.sinks else [])]
    expected = selfcheck.reference(given, call)[1]
    lse = selfcheck.exact(outputs[1])
    blind = np.isneginf(expected)
    gap = np.abs(np.where(blind, 0, lse) - np.where(blind, 0, expected)).max()
    wrong = [] if gap < 1e-4 and (np.isneginf(lse) == blind).all() else [f"logsumexp: {gap:.2g} off"]
    return wrong + kernels_judge.wrong(given, call, found)


def arrays_of(shape: Shape, seed: int = 5) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """q, k, v and a gradient of the output."""
    given = selfcheck.inputs(shape, Call(1.0), seed)
    return given.q, given.k, given.v, given.cotangent
