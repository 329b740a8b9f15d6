"""`poc-fp8`: the CUDA kernels in 8 bits, for prefill on Hopper.

Its results are approximate: a benchmark's accuracy judges them by a rule of their own, and `demo` considers it only
within an error budget.
"""

from collections.abc import Callable

import mlx.core as mx

from attention.core.bounded_dict import BoundedDict
from attention.core.errors import KernelUnavailable, UnsupportedError
from attention.core.route import NO_NEEDS, Needs, Route, unsupported
from attention.core.workload import Workload
from attention.implementations.calls import call_signature, current_backend, needs_with_mask, record_path
from attention.implementations.error_budget import ErrorBudget
from attention.kernels.cuda import fp8
from attention.kernels.cuda import path as cuda
from attention.masks import Mask
from attention.measure.device import Backend, Device


class PocFp8:
    """FlashAttention with Q, K, V and the weights in 8 bits; calls that its route refuses raise UnsupportedError."""

    name = "poc-fp8"
    takes_max_error = True

    def __init__(self, max_error: float | None = None) -> None:
        """Create it with the error budget of all calls without one of their own."""
        self._max_error = max_error
        self._routes = BoundedDict[object, Route](256)
        self._budgets = BoundedDict[float, ErrorBudget](16)

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the kernels' route, or an unsupported route with the reason."""
        return _route(workload, device.backend, needs)

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Return whether the launcher has to be compiled first."""
        return _route(workload, device.backend, NO_NEEDS).supported and not cuda.is_built(workload)

    def build_for(self, workload: Workload, on_message: Callable[[str], None]) -> None:
        """Compile the launcher; if that fails, routes report the reason."""
        cuda.build(workload, on_message)

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Mask,
        softcap: float | None = None,
        max_error: float | None = None,
    ) -> mx.array:
        """Compute attention; shapes as in `Implementation.__call__`, `max_error` as in `attention()`.

        Raises:
            UnsupportedError: the route refuses the call, a kernel failed its check, or the error is above the budget.
        """
        own = (mask.causal, mask.window, mask.array is None, mask.pattern is None, mask.alibi is None, softcap is None)
        key = (q.shape, k.shape, v.shape, q.dtype, *own, current_backend())
        route = self._routes.get(key)
        if route is None:
            workload, needs = call_signature(q, k, v, mask, softcap)
            route = self._routes[key] = _route(workload, current_backend(), needs)
        if not route.supported:
            raise UnsupportedError(f"{self.name}: {route.reason}")
        try:
            out = fp8.attend(q, k, v, scale=scale, mask=mask)
        except KernelUnavailable as unavailable:
            self._routes.clear()
            raise UnsupportedError(f"{self.name}: {unavailable}") from unavailable
        budget = self._max_error if max_error is None else max_error
        if budget is not None:
            if budget not in self._budgets:
                self._budgets[budget] = ErrorBudget(self.name, budget)
            self._budgets[budget].check(call_signature(q, k, v, mask, softcap)[0], (q, k, v), scale, out)
        record_path(route.path)
        return out


def _route(workload: Workload, backend: Backend, needs: Needs) -> Route:
    needs = needs_with_mask(workload, needs)
    refusal = fp8.refusal(workload, needs)
    if refusal is None and backend != "cuda":
        refusal = f"fp8 arithmetic needs a Hopper GPU, and MLX runs on {'the CPU' if backend == 'cpu' else backend}"
    return fp8.route(workload, needs) if refusal is None else unsupported(refusal)
