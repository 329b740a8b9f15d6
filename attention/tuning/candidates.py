"""The candidates that `demo` chooses among."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

import mlx.core as mx

from attention.device import Device
from attention.implementations.baseline import Baseline
from attention.implementations.blocks import MIB
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.implementations.poc import Poc, kernel_variants
from attention.implementations.practical import Practical
from attention.implementations.protocol import Implementation
from attention.masks import Mask
from attention.route import Needs
from attention.workload import Workload

LEANEST: Final = "practical"
"""The candidate used where no other is predicted to fit in memory."""
BUDGETS: Final = (32 * MIB, 8 * MIB)
"""Memory budgets of `practical`, in bytes, beside its default: smaller ones give smaller blocks."""


class CompiledSdpa(MlxSdpa):
    """MLX's SDPA inside mx.compile."""

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention; an array mask is an input of the compiled function, not a captured constant."""
        compiled = _compiled(scale, mask.causal, mask.window)
        return compiled(q, k, v) if mask.array is None else compiled(q, k, v, mask.array)


@lru_cache(maxsize=256)
def _compiled(scale: float, causal: bool, window: int | None) -> Callable[..., mx.array]:
    sdpa = MlxSdpa()

    def attend(q: mx.array, k: mx.array, v: mx.array, array: mx.array | None = None) -> mx.array:
        return sdpa(q, k, v, scale=scale, mask=Mask(causal=causal, window=window, array=array))

    return mx.compile(attend)


def candidates() -> dict[str, Implementation]:
    """Return all candidates by name: the custom kernel's variants, practical's block sizes, MLX's SDPA, baseline."""
    kernels = {f"poc {variant}": Poc(variant) for variant in kernel_variants()}
    blocks = {f"practical {budget // MIB} MiB": Practical(budget) for budget in BUDGETS}
    return {
        "poc": Poc(),
        **kernels,
        LEANEST: Practical(),
        **blocks,
        "mlx": MlxSdpa(),
        "mlx compiled": CompiledSdpa(),
        "baseline": Baseline(),
    }


def fitting(all_of_them: Mapping[str, Implementation], workload: Workload, device: Device, needs: Needs) -> list[str]:
    """Return the names of candidates that support a workload and are predicted to fit in memory, fused ones first.

    If none fits, the list holds the leanest alone. Candidates that would fall back are left out, because the fallback
    is itself a candidate, and so are duplicates of another candidate's path: smaller budgets that change nothing, and
    `practical` where it is MLX's SDPA.
    """
    routes = {name: candidate.route(workload, device, needs) for name, candidate in all_of_them.items()}
    fit = [
        name
        for name, route in routes.items()
        if route.supported and not route.fallback and (route.predicted_bytes or 0) <= device.available_bytes
    ]
    known = {(routes["mlx"].path, routes["mlx"].predicted_bytes)} if "mlx" in fit else set()
    chosen = []
    for name in fit:
        path = (routes[name].path, routes[name].predicted_bytes)
        if not name.startswith(LEANEST) or path not in known:
            chosen.append(name)
            known.add(path)
    if not chosen and LEANEST in routes:
        return [LEANEST]
    return sorted(chosen, key=lambda name: not routes[name].fused)
