"""Puts an implementation in the place of a model's own attention, or nothing at all."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from attention import implementations
from attention.device import Device
from attention.events import WITHOUT, CallsCounted
from attention.implementations.protocol import Implementation
from attention.masks import Mask
from attention.patch import Counters, patch_mlx_lm
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


def of_name(name: str) -> Implementation:
    """An implementation of the catalogue or the user's own, or the one that does nothing."""
    return PassThrough() if name == WITHOUT else implementations.get(name)


@contextmanager
def replaced(name: str) -> Iterator[Counters]:
    """As long as the context lasts, models attend by an implementation; yields how often."""
    with patch_mlx_lm(of_name(name)) as counters:
        yield counters


def calls_of(counters: Counters, case: int, name: str) -> CallsCounted:
    """What was counted, as an event."""
    return CallsCounted(case=case, implementation=name, replaced=counters.replaced, passed_on=counters.passed_on)
