"""Puts an implementation in the place of a model's own attention, or nothing at all."""

from functools import cache

import mlx.core as mx

from attention import implementations
from attention.device import Device
from attention.events import WITHOUT, CallsCounted
from attention.implementations.protocol import Implementation
from attention.masks import Mask
from attention.patch.model_patch import ModelPatch
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload


class PassThrough:
    """No attention: the query comes back at once; key and value are computed as for all others, and not used."""

    name = WITHOUT

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """Takes everything."""
        return Route(path="none", fused=True, reason="what a model takes without attention")

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Returns the query, in the output's shape."""
        width = v.shape[3]
        shaped = q if width == q.shape[3] else mx.broadcast_to(q[..., :1], (*q.shape[:3], width))
        kept: mx.array = mx.depends(shaped, [k, v])
        return kept


@cache
def replaced(name: str) -> ModelPatch:
    """A context in which models attend by an implementation; the same one each time, which remembers its routes."""
    implementation: Implementation = PassThrough() if name == WITHOUT else implementations.get(name)
    return ModelPatch(implementation)


class Calls:
    """Counts the calls of attention that an implementation gets from here on."""

    def __init__(self, name: str) -> None:
        """Begins to count."""
        self._name, self._patch = name, replaced(name)
        self._before = self._patch.calls_taken, self._patch.calls_handed

    def event(self, case: int) -> CallsCounted:
        """What was counted."""
        taken, handed = self._before
        reasons = self._patch.handed.most_common(1)
        return CallsCounted(
            case=case,
            implementation=self._name,
            replaced=self._patch.calls_taken - taken,
            passed_on=self._patch.calls_handed - handed,
            reason=reasons[0][0] if reasons else None,
        )
