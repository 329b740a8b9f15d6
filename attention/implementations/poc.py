"""fatui's own kernel, where there is one for the device."""

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Final, Protocol, cast, runtime_checkable

import mlx.core as mx
from msgspec import structs

from attention.device import Backend, Device
from attention.errors import KernelUnavailable
from attention.implementations.asked import asked_for, here
from attention.implementations.mlx_sdpa import NO_SOFTCAP, MlxSdpa
from attention.implementations.practical import Practical
from attention.masks import Mask
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload

KERNELS: Final[dict[Backend, str]] = {
    "cpu": "attention.kernels.cpu.path",
    "cuda": "attention.kernels.cuda.path",
    "metal": "attention.kernels.metal.path",
}
"""For each backend the module of its kernel, of the form `Kernel`."""
Attend = Callable[..., mx.array]
"""A call as `Kernel.attend`."""


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


def kernel_variants() -> Mapping[str, Attend]:
    """The further forms of the kernel for the device that MLX computes on now; often there are none."""
    kernel = _kernel(here())
    return kernel.variants() if isinstance(kernel, OffersVariants) else {}


class Poc:
    """The custom kernel; what it does not take goes to MLX's SDPA, and a softcap to the blocks of `practical`."""

    name = "poc"

    def __init__(self, variant: str | None = None) -> None:
        """Makes the implementations that it falls back to; a variant is one of `kernel_variants()`."""
        self._variant = None if variant is None else kernel_variants()[variant]
        self._sdpa = MlxSdpa()
        self._practical = Practical()
        self._taken: set[tuple[Workload, Needs, Backend]] = set()

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """The kernel's path where it takes the workload; otherwise what it falls back to, and why."""
        own = _kernel(device.backend).route(workload, needs)
        if own.supported:
            return own
        if needs.softcap:
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

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Attends; shapes as in the protocol."""
        kernel = self._kernel_for(q, k, v, mask, softcap)
        if kernel is not None:
            with suppress(KernelUnavailable):
                return (self._variant or kernel.attend)(q, k, v, scale=scale, mask=mask, softcap=softcap)
            self._taken.clear()
        if softcap is not None:
            return self._practical(q, k, v, scale=scale, mask=mask, softcap=softcap)
        return self._sdpa(q, k, v, scale=scale, mask=mask)

    def _kernel_for(self, q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float | None) -> Kernel | None:
        """The kernel, if it takes the call; asked once for each kind of call."""
        backend = here()
        kernel = _kernel(backend)
        key = (*asked_for(q, k, v, mask, softcap), backend)
        if key not in self._taken:
            if not kernel.route(*key[:2]).supported:
                return None
            self._taken.add(key)
        return kernel


@cache
def _kernel(backend: Backend) -> Kernel:
    return cast("Kernel", importlib.import_module(KERNELS[backend]))
