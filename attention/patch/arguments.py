"""A call of mlx-lm's attention, and what an implementation can be given of it."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from attention.arguments import checked_mask, checked_shapes
from attention.device import probe
from attention.errors import UnsupportedError, UsageError
from attention.implementations.asked import asked_for
from attention.implementations.protocol import Implementation
from attention.route import Needs, Route
from attention.workload import Workload

if TYPE_CHECKING:
    from attention.masks import Mask

device = lru_cache(maxsize=1)(probe)


class ModelCall(NamedTuple):
    """What a model asks for."""

    q: mx.array
    k: Any
    """(B, Hkv, Lk, D), or what `mx.quantize` makes of that."""
    v: Any
    scale: float
    mask: "mx.array | str | None"
    sinks: "mx.array | None" = None
    packing: "tuple[int, int] | None" = None
    """Group size and bits of packed keys and values."""


class Offer(NamedTuple):
    """The same as an implementation takes it."""

    k: Any
    v: Any
    mask: "Mask"
    path: str


class Router:
    """Knows the paths of an implementation; a decoding loop asks for each of them once a layer."""

    def __init__(self, implementation: Implementation) -> None:
        """Takes the implementation."""
        self.route = lru_cache(maxsize=512)(self._route)
        self._implementation = implementation

    def _route(self, workload: Workload, needs: Needs) -> Route:
        return self._implementation.route(workload, device(), needs)


def offered(call: ModelCall, router: Router) -> Offer:
    """What the implementation is given.

    Raises:
        UnsupportedError: it does not take the call; the message is the reason, without figures of this one call.
    """
    if call.sinks is not None:
        raise UnsupportedError("attention sinks")
    k, v = (call.k, call.v) if call.packing is None else unpacked(call)
    try:
        checked_shapes(call.q, k, v)
        mask = checked_mask(call.mask, None, call.q, k)
    except UsageError as error:
        raise UnsupportedError(_kind(error)) from error
    route = router.route(*asked_for(call.q, k, v, mask, None))
    if not route.supported:
        raise UnsupportedError(route.reason)
    return Offer(k, v, mask, route.path)


def unpacked(call: ModelCall) -> tuple[mx.array, mx.array]:
    """Packed keys and values as plain ones, in the query's type."""
    assert call.packing is not None
    size, bits = call.packing
    (k, k_scales, k_biases), (v, v_scales, v_biases) = call.k, call.v
    k = mx.dequantize(k, k_scales, k_biases, group_size=size, bits=bits)
    v = mx.dequantize(v, v_scales, v_biases, group_size=size, bits=bits)
    return k.astype(call.q.dtype), v.astype(call.q.dtype)


def _kind(error: UsageError) -> str:
    """The first problem, without what this call alone has."""
    name, _, rest = error.problems[0].partition(": got ")
    return f"{name}: {rest.partition('; ')[2] or rest}"
