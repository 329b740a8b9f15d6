"""`poc` as registered: supports attention sinks where its kernel does, and respects the results of `demo`'s trials."""

from contextlib import suppress
from functools import cache, partial
from typing import Protocol, runtime_checkable

import mlx.core as mx
from msgspec import structs

from attention.core.errors import KernelUnavailable
from attention.core.route import NO_NEEDS, Needs, Route, unsupported
from attention.core.workload import Workload
from attention.implementations.autotune.store import Store, candidate_fingerprint, class_of
from attention.implementations.calls import call_signature, current_backend
from attention.implementations.fused import MAX_KNOWN_CALLS, TO_PRACTICAL, TO_SDPA, Poc, _kernel
from attention.implementations.transforms import with_mask_gradient
from attention.masks import Mask
from attention.measure.device import Device, probe


@runtime_checkable
class TakesSinks(Protocol):
    """A kernel that supports attention sinks."""

    def attend_with_sinks(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Mask,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """As `Kernel.attend`, with `sinks` (H,): one extra logit per head in the softmax, without a value."""
        ...


class TunedPoc(Poc):
    """The custom kernel; on Metal, MLX's fused kernel instead if a trial of `demo` found the custom one slower.

    `demo` itself tries the plain `Poc`, so that the custom kernel can win again.
    """

    def __init__(self, store: Store | None = None) -> None:
        """Create it with a store of trials; the user's file by default."""
        super().__init__()
        self._trials = store or Store()
        self._routes: dict[tuple[Workload, Needs], Route] = {}

    @property
    def takes_sinks(self) -> bool:
        """Whether the kernel of MLX's current device supports sinks; otherwise calls with sinks fall back."""
        return isinstance(_kernel(current_backend()), TakesSinks)

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the kernel's route if it supports the workload and is preferred, otherwise the fallback's."""
        if needs.sinks:
            own = self._route_with_sinks(workload, device, needs)
            if own.supported:
                return own
            behind = self._practical.route(workload, device, needs)
            reason = f"{own.reason}; {behind.reason}"
            return structs.replace(behind, path=TO_PRACTICAL, reason=reason, fallback=True)
        route = super().route(workload, device, needs)
        if route.fallback or device.backend != "metal":
            return route
        entry = self._trials.get(class_of(workload, device, needs))
        if entry is None or entry.made_with != candidate_fingerprint() or entry.winner.startswith(self.name):
            return route
        behind = self._sdpa.route(workload, device, needs)
        if not behind.fused:
            return route
        reason = f"{behind.reason} too, and `{entry.winner}` was the fastest in a trial of demo's here"
        return structs.replace(behind, path=TO_SDPA, reason=reason, fallback=True)

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Mask,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Compute attention; shapes as in the protocol, `sinks` (H,) as in `practical`."""
        if sinks is None:
            is_plain = (
                current_backend() != "metal" or softcap is not None
            )  # a softcap is nothing that MLX could do better
            if not is_plain and self._route_of(q, k, v, mask, softcap, sinks).fallback:
                return self._sdpa(q, k, v, scale=scale, mask=mask)
            return super().__call__(q, k, v, scale=scale, mask=mask, softcap=softcap)
        kernel = _kernel(current_backend())
        if isinstance(kernel, TakesSinks) and not self._route_of(q, k, v, mask, softcap, sinks).fallback:
            with suppress(KernelUnavailable):
                attend = partial(kernel.attend_with_sinks, q, k, v, scale=scale, softcap=softcap, sinks=sinks)
                return with_mask_gradient(
                    lambda mask: attend(mask=mask), q, k, v, scale=scale, mask=mask, softcap=softcap, sinks=sinks
                )
            self._routes.clear()
        return self._practical(q, k, v, scale=scale, mask=mask, softcap=softcap, sinks=sinks)

    def _route_of(
        self, q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float | None, sinks: mx.array | None
    ) -> Route:
        """Return the route of a call on Metal or of one with sinks; cached per kind of call."""
        workload, plain = call_signature(q, k, v, mask, softcap)
        needs = plain if sinks is None else structs.replace(plain, sinks=True)
        found = self._routes.get((workload, needs))
        if found is None:
            if len(self._routes) >= MAX_KNOWN_CALLS:
                self._routes.clear()
            found = self._routes[workload, needs] = self.route(workload, _device(), needs)
        return found

    def _route_with_sinks(self, workload: Workload, device: Device, needs: Needs) -> Route:
        kernel = _kernel(device.backend)
        if not isinstance(kernel, TakesSinks):
            return unsupported(f"the kernel for {device.backend} takes no attention sinks")
        return kernel.route(workload, needs)


@cache
def _device() -> Device:
    """Return MLX's device, probed once: its free memory does not matter here."""
    return probe()
