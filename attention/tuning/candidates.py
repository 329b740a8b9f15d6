"""What `demo` chooses among."""

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
"""Taken where nothing else is predicted to fit."""
BUDGETS: Final = (32 * MIB, 8 * MIB)
"""Memory budgets of `practical` besides its own: smaller ones make it take smaller blocks, or blocks at all."""


class CompiledSdpa(MlxSdpa):
    """MLX's SDPA inside mx.compile."""

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Attends; an array mask is part of what is compiled, so that it is never baked in."""
        compiled = _compiled(scale, mask.causal, mask.window)
        return compiled(q, k, v) if mask.array is None else compiled(q, k, v, mask.array)


@lru_cache(maxsize=256)
def _compiled(scale: float, causal: bool, window: int | None) -> Callable[..., mx.array]:
    sdpa = MlxSdpa()

    def attend(q: mx.array, k: mx.array, v: mx.array, array: mx.array | None = None) -> mx.array:
        return sdpa(q, k, v, scale=scale, mask=Mask(causal=causal, window=window, array=array))

    return mx.compile(attend)


def candidates() -> dict[str, Implementation]:
    """All of them by name: the custom kernel in its variants, practical in its block sizes, MLX's SDPA, baseline."""
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
    """Those that take a workload and are predicted to fit, fused ones first; the leanest always.

    Left out is what falls back, since what it falls back to is here itself, and what takes the very path of another
    candidate: smaller budgets that change nothing, and `practical` where it is MLX's SDPA.
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
