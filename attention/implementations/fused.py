"""`poc`: the custom fused kernel of the device, if there is one.

`Poc` is what `demo` tries; `TunedPoc`, the one in the catalogue, also supports attention sinks and follows the results
of `demo`'s trials.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Final, Protocol, cast, runtime_checkable

import mlx.core as mx
from msgspec import structs

from attention.core.bounded_dict import BoundedDict
from attention.core.errors import KernelUnavailable
from attention.core.route import FALLS_BACK, NO_NEEDS, Needs, Route, fitted, unsupported
from attention.core.workload import Workload
from attention.implementations.autotune.store import Store, candidate_fingerprint, class_of
from attention.implementations.baseline import unfused_call_bytes, with_tf32
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import call_signature, current_backend, needs_with_mask, record_path
from attention.implementations.mlx_sdpa import NO_SOFTCAP, MlxSdpa, attend_whole, is_call_widened, is_unfused
from attention.implementations.transforms import with_mask_gradient
from attention.masks import Mask
from attention.measure.device import Backend, Device, probe
from attention.quantized_kv import KeyOrValue, kv_format_of

KERNELS: Final[dict[Backend, str]] = {
    "cpu": "attention.kernels.cpu.path",
    "cuda": "attention.kernels.cuda.path",
    "metal": "attention.kernels.metal.path",
}
"""The kernel module of each backend; it satisfies `Kernel`."""
TO_PRACTICAL: Final = f"{FALLS_BACK}practical"
TO_SDPA: Final = f"{FALLS_BACK}MLX SDPA"
Attend = Callable[..., mx.array]
"""A function with the signature of `Kernel.attend`."""


class Kernel(Protocol):
    """Interface of a backend's kernel module."""

    TAKES: frozenset[str]
    """What it takes beyond bounds, array masks and softcap, among "pattern" (`Mask.pattern`, as block lists), "alibi"
    (`Mask.alibi`), "logsumexp" (`with_logsumexp`) and "quantized" (k and v as `QuantizedArray`, wherever the kernel
    takes arrays)."""

    def route(self, workload: Workload, needs: Needs) -> Route:
        """Return the kernel's route, or an unsupported route with the reason."""
        ...

    def is_built(self, workload: Workload) -> bool:
        """Return whether the workload's calls can run without compiling first."""
        ...

    def build(self, workload: Workload, on_message: Callable[[str], None]) -> None:
        """Compile what the workload's calls need of the kernel; raises KernelUnavailable."""
        ...

    def attend(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`. Raises KernelUnavailable."""
        ...


@runtime_checkable
class KernelWithLogsumexp(Protocol):
    """A kernel that can return the logsumexp of each row; "logsumexp" is in its `TAKES`."""

    def with_logsumexp(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None
    ) -> tuple[mx.array, mx.array]:
        """Compute attention as `Kernel.attend`, and the logsumexp as in `ReturnsLogsumexp`."""
        ...


FEATURES: Final = {"pattern": "patterns", "alibi": "ALiBi", "logsumexp": "output of the logsumexp"}
QUANTIZED: Final = "quantized keys and values"


@runtime_checkable
class HasVariants(Protocol):
    """A kernel with variants for the same call: other tiles, or another division of the work."""

    VARIANTS: Sequence[str]
    """Names of all variants, at most 11 characters each."""

    def variants(self, workload: Workload) -> Mapping[str, Attend]:
        """Return the variants that differ from `attend` for a workload; arguments and results are those of `attend`."""
        ...


def kernel_variants() -> Sequence[str]:
    """Return the names of the kernel's variants on MLX's current device; empty for kernels without variants."""
    kernel = _kernel(current_backend())
    return kernel.VARIANTS if isinstance(kernel, HasVariants) else ()


class Poc:
    """The custom kernel; unsupported calls fall back to MLX's SDPA.

    Calls that MLX's SDPA does not take (softcap, pattern, ALiBi, logsumexp, quantized keys and values) fall back to
    `practical`.

    The fallback computes in float32 if scores would overflow or lose accuracy in MLX's unfused half-precision path.
    """

    name = "poc"
    takes_patterns = takes_alibi = takes_quantized = True

    def __init__(self, variant: str | None = None) -> None:
        """Create the fallbacks; `variant` is one of `kernel_variants()`."""
        self._variant = variant
        self._sdpa = MlxSdpa()
        self._practical = Practical()
        self._attends = BoundedDict[object, tuple[Attend, str] | None]()
        self._routed = BoundedDict[tuple[Backend, Workload, Needs], Route](16)
        """Routes of the kernel that no call has used yet; a call uses one once, so that it does not grow old."""
        self._with_logsumexp = BoundedDict[object, tuple[KernelWithLogsumexp, str] | None]()

    @property
    def variant(self) -> str | None:
        """Name of the kernel's variant, or None for the kernel's own choice."""
        return self._variant

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the kernel's route if it supports the workload, otherwise the fallback's, with the reason.

        A variant that does not change the kernel for this workload is unsupported.
        """
        needs = needs_with_mask(workload, needs)
        own = _kernel_route(device.backend, workload, needs)
        if own.supported:
            self._routed[device.backend, workload, needs] = own
            if self._variant is None:
                return own
            if _variant_for(_kernel(device.backend), self._variant, workload) is None:
                return unsupported(f"'{self._variant}' changes nothing here")
            return structs.replace(own, path=_variant_path(own.path, self._variant))
        if to_practical := _needs_practical(workload, needs):
            fallback = self._practical.route(workload, device, needs)
            path, reason = TO_PRACTICAL, f"{own.reason}; {fallback.reason}"
            if needs.softcap:
                reason = f"{own.reason}, and {NO_SOFTCAP}"
        else:
            fallback = self._sdpa.route(workload, device, needs)
            if not fallback.fused:
                fallback = structs.replace(
                    fallback, predicted_bytes=unfused_call_bytes(workload, device.backend, needs)
                )
            path, reason = TO_SDPA, f"{own.reason}; {fallback.reason}"
        if not (fallback.fused or to_practical):
            path = with_tf32(path, workload.dtype, device.backend)
        return structs.replace(fallback, path=path, reason=reason, fallback=True)

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Return whether the kernel supports the workload and has not been compiled for it on this machine yet."""
        kernel = _kernel(device.backend)
        return not kernel.is_built(workload) and kernel.route(workload, NO_NEEDS).supported

    def build_for(self, workload: Workload, on_message: Callable[[str], None]) -> None:
        """Compile what the workload's calls need; if that fails, they fall back and the route has the reason."""
        with suppress(KernelUnavailable):
            _kernel(current_backend()).build(workload, on_message)
        self._routed.clear()

    def __call__(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`."""
        if mask.array is None:  # no gradient of a mask: called directly, as each layer of each decoding step does it
            return self._attend(q, k, v, scale, mask, softcap)

        def attend(q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask) -> mx.array:
            return self._attend(q, k, v, scale, mask, softcap)

        return with_mask_gradient(attend, q, k, v, scale=scale, mask=mask, softcap=softcap)

    def with_logsumexp(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> tuple[mx.array, mx.array]:
        """Compute attention and the logsumexp of its rows, as in `ReturnsLogsumexp`."""
        key = _kind_of_call(q, k, v, mask, softcap)
        try:
            known = self._with_logsumexp[key]
        except KeyError:
            known = self._with_logsumexp[key] = _find_with_logsumexp(q, k, v, mask, softcap)
        if known is not None:
            kernel, path = known

            def attend(q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask) -> tuple[mx.array, mx.array]:
                return kernel.with_logsumexp(q, k, v, scale=scale, mask=mask, softcap=softcap)

            with suppress(KernelUnavailable):
                found = with_mask_gradient(attend, q, k, v, scale=scale, mask=mask, softcap=softcap)
                record_path(path)
                return found
            self._with_logsumexp.clear()
        found = self._practical.with_logsumexp(q, k, v, scale=scale, mask=mask, softcap=softcap)
        record_path(TO_PRACTICAL)
        return found

    def _attend(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, scale: float, mask: Mask, softcap: float | None
    ) -> mx.array:
        key = _kind_of_call(q, k, v, mask, softcap)
        try:
            known = self._attends[key]
        except KeyError:
            known = self._find_kernel(key, q, k, v, mask, softcap)
        if known is not None:
            attend, path = known
            try:
                out = attend(q, k, v, scale=scale, mask=mask, softcap=softcap)
            except KernelUnavailable:
                self._attends.clear()
                self._routed.clear()
            else:
                record_path(path)
                return out
        if not isinstance(k, mx.array) or not isinstance(v, mx.array) or not _is_plain(mask, softcap):
            out = self._practical(q, k, v, scale=scale, mask=mask, softcap=softcap)
            record_path(TO_PRACTICAL)
            return out
        record_path(_sdpa_path(q, k, v, mask))
        return attend_whole(q, k, v, scale, mask, is_call_widened(q, k, v, mask))

    def _find_kernel(
        self, key: object, q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask, softcap: float | None
    ) -> tuple[Attend, str] | None:
        """Return the kernel's function and path for a kind of call, cached; None if the kernel does not support it."""
        backend = current_backend()
        kernel = _kernel(backend)
        workload, needs = call_signature(q, k, v, mask, softcap)
        form = None if self._variant is None else _variant_for(kernel, self._variant, workload)
        # patch_mlx_lm asks for the route just before a call, in decoding at each length: not found twice
        route = self._routed.pop((backend, workload, needs), None) or _kernel_route(backend, workload, needs)
        path = route.path if form is None else _variant_path(route.path, self._variant)
        self._attends[key] = known = (form or kernel.attend, path) if route.supported else None
        return known


def _kind_of_call(q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask, softcap: float | None) -> tuple[object, ...]:
    """Return what decides which kernel takes a call."""
    return (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        kv_format_of(k, v),
        mask.causal,
        mask.window,
        mask.array is None,
        mask.pattern is None,
        mask.alibi is None,
        softcap is None,
        current_backend(),
    )


def _find_with_logsumexp(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask, softcap: float | None
) -> tuple[KernelWithLogsumexp, str] | None:
    """Return the kernel and path for a kind of call with the logsumexp; None if the kernel does not support it."""
    backend = current_backend()
    workload, needs = call_signature(q, k, v, mask, softcap)
    route = _kernel_route(backend, workload, structs.replace(needs, logsumexp=True))
    kernel = _kernel(backend)
    return (kernel, route.path) if route.supported and isinstance(kernel, KernelWithLogsumexp) else None


def _is_plain(mask: Mask, softcap: float | None) -> bool:
    """Return whether MLX's SDPA takes a call without a mask as large as the scores made for it."""
    return softcap is None and mask.pattern is None and mask.alibi is None


def _needs_practical(workload: Workload, needs: Needs) -> bool:
    """Return whether MLX's SDPA would not take a call, or only with a mask as large as the scores."""
    return needs.softcap or needs.pattern or needs.alibi or needs.logsumexp or workload.quantized


def _kernel_route(backend: Backend, workload: Workload, needs: Needs) -> Route:
    """Return the route of a backend's kernel; unsupported if the call has a feature that it does not declare."""
    kernel = _kernel(backend)
    missing = [what for name, what in FEATURES.items() if getattr(needs, name) and name not in kernel.TAKES]
    missing += [QUANTIZED] if workload.quantized and "quantized" not in kernel.TAKES else []
    if missing:
        return unsupported(f"the kernel for {backend} takes no {' and no '.join(missing)}")
    return kernel.route(workload, needs)


def _variant_path(path: str, variant: str | None) -> str:
    return fitted(f"{path}, {variant}")


def _sdpa_path(q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask) -> str:
    backend = current_backend()
    if backend != "cuda" or q.dtype == mx.bfloat16:
        return TO_SDPA
    workload, needs = call_signature(q, k, v, mask, None)
    return with_tf32(TO_SDPA, workload.dtype, backend) if is_unfused(workload, needs, backend) else TO_SDPA


def _variant_for(kernel: Kernel, variant: str, workload: Workload) -> Attend | None:
    """Return a variant of a kernel, or None if it does not change the kernel for a workload."""
    return kernel.variants(workload).get(variant) if isinstance(kernel, HasVariants) else None


@cache
def _kernel(backend: Backend) -> Kernel:
    return cast("Kernel", importlib.import_module(KERNELS[backend]))


@runtime_checkable
class TakesSinks(Protocol):
    """A kernel that supports attention sinks."""

    def attend_with_sinks(
        self,
        q: mx.array,
        k: KeyOrValue,
        v: KeyOrValue,
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
        self._routes = BoundedDict[tuple[Workload, Needs], Route]()

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
            fallback = self._practical.route(workload, device, needs)
            reason = f"{own.reason}; {fallback.reason}"
            return structs.replace(fallback, path=TO_PRACTICAL, reason=reason, fallback=True)
        route = super().route(workload, device, needs)
        if route.fallback or device.backend != "metal" or _needs_practical(workload, needs_with_mask(workload, needs)):
            return route
        entry = self._trials.get(class_of(workload, device, needs))
        if entry is None or entry.made_with != candidate_fingerprint() or entry.winner.startswith(self.name):
            return route
        fallback = self._sdpa.route(workload, device, needs)
        if not fallback.fused:
            return route
        reason = f"{fallback.reason} too, and `{entry.winner}` was the fastest in a trial of demo's here"
        return structs.replace(fallback, path=TO_SDPA, reason=reason, fallback=True)

    def __call__(
        self,
        q: mx.array,
        k: KeyOrValue,
        v: KeyOrValue,
        *,
        scale: float,
        mask: Mask,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`, `sinks` (H,) as in `practical`."""
        if sinks is None:
            may_be_slower = current_backend() == "metal" and isinstance(k, mx.array) and _is_plain(mask, softcap)
            if may_be_slower and self._route_of(q, k, v, mask, softcap, sinks).fallback:
                return self._sdpa(q, k, v, scale=scale, mask=mask)
            return super().__call__(q, k, v, scale=scale, mask=mask, softcap=softcap)
        kernel = _kernel(current_backend())
        if isinstance(kernel, TakesSinks) and not self._route_of(q, k, v, mask, softcap, sinks).fallback:
            with suppress(KernelUnavailable):
                attend = partial(kernel.attend_with_sinks, scale=scale, softcap=softcap)
                return with_mask_gradient(
                    lambda q, k, v, mask, sinks: attend(q, k, v, mask=mask, sinks=sinks),
                    *(q, k, v),
                    scale=scale,
                    mask=mask,
                    softcap=softcap,
                    sinks=sinks,
                )
            self._routes.clear()
        return self._practical(q, k, v, scale=scale, mask=mask, softcap=softcap, sinks=sinks)

    def _route_of(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask, softcap: float | None, sinks: mx.array | None
    ) -> Route:
        """Return the route of a call on Metal or of one with sinks; cached per kind of call."""
        workload, plain = call_signature(q, k, v, mask, softcap)
        needs = plain if sinks is None else structs.replace(plain, sinks=True)
        found = self._routes.get((workload, needs))
        if found is None:
            found = self._routes[workload, needs] = self.route(workload, _device(), needs)
        return found

    def _route_with_sinks(self, workload: Workload, device: Device, needs: Needs) -> Route:
        kernel = _kernel(device.backend)
        if not isinstance(kernel, TakesSinks):
            return unsupported(f"the kernel for {device.backend} takes no attention sinks")
        return _kernel_route(device.backend, workload, needs)


@cache
def _device() -> Device:
    """Return MLX's device, probed once: its free memory does not matter here."""
    return probe()
