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
MOST_KINDS: Final = 4096
"""Kinds of call that are remembered; a decoding loop makes a new one at each length."""
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
        self._attends: dict[object, Attend | None] = {}

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
        key = (
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            mask.causal,
            mask.window,
            mask.array is None,
            softcap is None,
            here(),
        )
        try:
            attend = self._attends[key]
        except KeyError:
            attend = self._ask(key, q, k, v, mask, softcap)
        if attend is not None:
            try:
                return attend(q, k, v, scale=scale, mask=mask, softcap=softcap)
            except KernelUnavailable:
                self._attends.clear()
        if softcap is not None:
            return self._practical(q, k, v, scale=scale, mask=mask, softcap=softcap)
        return self._sdpa(q, k, v, scale=scale, mask=mask)

    def _ask(
        self, key: object, q: mx.array, k: mx.array, v: mx.array, mask: Mask, softcap: float | None
    ) -> Attend | None:
        """How the kernel is called for a kind of call, or None; asked once, since a call must cost next to nothing."""
        if len(self._attends) >= MOST_KINDS:
            self._attends.clear()
        kernel = _kernel(here())
        taken = kernel.route(*asked_for(q, k, v, mask, softcap)).supported
        self._attends[key] = attend = (self._variant or kernel.attend) if taken else None
        return attend


@cache
def _kernel(backend: Backend) -> Kernel:
    return cast("Kernel", importlib.import_module(KERNELS[backend]))
