"""fatui's own kernel, where there is one for the device."""

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Final, Protocol, cast, runtime_checkable

import mlx.core as mx
from msgspec import structs

from attention.device import Backend, Device, probe
from attention.errors import KernelUnavailable
from attention.implementations.asked import asked_for, here
from attention.implementations.mlx_sdpa import NO_SOFTCAP, MlxSdpa
from attention.implementations.practical import Practical
from attention.masks import Mask
from attention.route import PLAIN, Needs, Route, unsupported
from attention.workload import Workload

KERNELS: Final[dict[Backend, str]] = {
    "cpu": "attention.kernels.cpu.path",
    "cuda": "attention.kernels.cuda.path",
    "metal": "attention.kernels.metal.path",
}
"""For each backend the module of its kernel, of the form `Kernel`."""
Attend = Callable[..., mx.array]
"""A call as `Kernel.attend`."""
Winner = Callable[[Workload, Device, Needs], str | None]
"""Names the candidate of `demo` that was fastest in a trial of a workload, or None where there was no trial."""


class Kernel(Protocol):
    """What a backend's kernel module offers."""

    def route(self, workload: Workload, needs: Needs) -> Route:
        """The kernel's path, or a route that is not supported, with the reason."""
        ...

    def is_built(self) -> bool:
        """Whether a call would not have to compile first."""
        ...

    def build(self, tell: Callable[[str], None]) -> None:
        """Compiles; raises KernelUnavailable."""
        ...

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None
    ) -> mx.array:
        """Attends; shapes as in the implementations' protocol. Raises KernelUnavailable."""
        ...


@runtime_checkable
class OffersVariants(Protocol):
    """A kernel that can be had in more than one form for the same call: other tiles, another instruction set."""

    def variants(self) -> Mapping[str, Attend]:
        """Further forms by name, at most 11 characters; each takes what `attend` takes and gives the same result."""
        ...


@runtime_checkable
class TakesSinks(Protocol):
    """A kernel that takes attention sinks."""

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
        """As `Kernel.attend`, with a score for each head that takes part in the softmax and has no value, (H,)."""
        ...


def kernel_variants() -> Mapping[str, Attend]:
    """The further forms of the kernel for the device that MLX computes on now; often there are none."""
    kernel = _kernel(here())
    return kernel.variants() if isinstance(kernel, OffersVariants) else {}


class Poc:
    """The custom kernel; what it does not take goes to MLX's SDPA, and a softcap or sinks to `practical`."""

    name = "poc"

    def __init__(self, variant: str | None = None, winner: Winner | None = None) -> None:
        """Makes the implementations that it falls back to.

        Args:
            variant: one of `kernel_variants()`.
            winner: tells what was fastest in a trial. On Metal it decides where MLX has a fused kernel as well.
        """
        self._variant = None if variant is None else kernel_variants()[variant]
        self._winner = winner
        self._sdpa = MlxSdpa()
        self._practical = Practical()
        self._taken: set[tuple[Workload, Needs, Backend]] = set()

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """The kernel's path where it takes the workload; otherwise what it falls back to, and why."""
        own = self._own(workload, needs, device.backend, lambda: device)
        if own.supported:
            return own
        if needs.sinks:
            behind = self._practical.route(workload, device, needs)
            path, reason = "falls back: practical", f"{own.reason}; {behind.reason}"
        elif needs.softcap:
            behind = self._practical.route(workload, device, needs)
            path, reason = "falls back: practical", f"{own.reason}, and {NO_SOFTCAP}"
        else:
            behind = self._sdpa.route(workload, device, needs)
            path, reason = "falls back: MLX SDPA", f"{own.reason}; {behind.reason}"
        return structs.replace(behind, path=path, reason=reason, fallback=True)

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Whether the kernel takes the workload and has not been compiled on this machine yet."""
        kernel = _kernel(device.backend)
        return not kernel.is_built() and kernel.route(workload, PLAIN).supported

    def build(self, tell: Callable[[str], None]) -> None:
        """Compiles the kernel; where that fails, calls fall back and the route says why."""
        with suppress(KernelUnavailable):
            _kernel(here()).build(tell)

    @property
    def takes_sinks(self) -> bool:
        """Whether the kernel for the device that MLX computes on now does; others leave sinks to what is behind."""
        return isinstance(_kernel(here()), TakesSinks)

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
        """Attends; shapes as in the protocol, `sinks` as `practical` has them."""
        attend = self._attend_for(q, k, v, mask, softcap, sinks)
        more = {} if sinks is None else {"sinks": sinks}
        if attend is not None:
            with suppress(KernelUnavailable):
                return attend(q, k, v, scale=scale, mask=mask, softcap=softcap, **more)
            self._taken.clear()
        if softcap is not None or sinks is not None:
            return self._practical(q, k, v, scale=scale, mask=mask, softcap=softcap, **more)
        return self._sdpa(q, k, v, scale=scale, mask=mask)

    def _attend_for(
        self, q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float | None, sinks: mx.array | None
    ) -> Attend | None:
        """The kernel's call, if it takes this one; asked once for each kind of call."""
        backend = here()
        kernel = _kernel(backend)
        workload, plain = asked_for(q, k, v, mask, softcap)
        needs = plain if sinks is None else structs.replace(plain, sinks=True)
        key = (workload, needs, backend)
        if key not in self._taken:
            if not self._own(workload, needs, backend, _probed).supported:
                return None
            self._taken.add(key)
        if sinks is not None and isinstance(kernel, TakesSinks):
            return kernel.attend_with_sinks
        return self._variant or kernel.attend

    def _own(self, workload: Workload, needs: Needs, backend: Backend, device: Callable[[], Device]) -> Route:
        """The kernel's path, or a route that is not supported, with the reason."""
        kernel = _kernel(backend)
        if needs.sinks and not isinstance(kernel, TakesSinks):
            return unsupported(f"the kernel for {backend} takes no attention sinks")
        own = kernel.route(workload, needs)
        if not own.supported or self._winner is None or backend != "metal" or needs.sinks:
            return own
        winner = self._winner(workload, device(), needs)
        if winner is None or winner.startswith(self.name) or not self._sdpa.route(workload, device(), needs).fused:
            return own
        return unsupported(f"MLX has a fused kernel too, and `{winner}` was the fastest in a trial of demo's here")


@cache
def _probed() -> Device:
    """The device that MLX computes on, looked at once: how much of its memory is free does not matter here."""
    return probe()


@cache
def _kernel(backend: Backend) -> Kernel:
    return cast("Kernel", importlib.import_module(KERNELS[backend]))
