"""The best of the others for each workload, found by a short trial on first use."""

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Final

import mlx.core as mx
from msgspec import structs

from attention.device import Backend, Device, probe
from attention.implementations.asked import asked_for, here
from attention.implementations.baseline import Baseline
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.implementations.poc import Poc
from attention.implementations.practical import Practical
from attention.implementations.protocol import Implementation, NeedsBuilding
from attention.implementations.runner import MlxRunner
from attention.masks import Mask
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload

TRIAL_S: Final = 0.5
"""Seconds after which no further call of a trial begins, once every candidate has had one."""
HOPELESS: Final = (4.0, 1.5, 1.5)
"""How many times the best a candidate may have taken to be called in the next round; the first round is a cold one."""

Key = tuple[Workload, Needs, Backend]


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


class Demo:
    """Tries `poc`, `practical`, MLX SDPA plain and compiled, and `baseline` once for each workload; keeps the best."""

    name = "demo"

    def __init__(self) -> None:
        """Knows the candidates, leanest first, and no workload yet."""
        self.candidates: dict[str, Implementation] = {
            "poc": Poc(),
            "practical": Practical(),
            "mlx": MlxSdpa(),
            "mlx compiled": CompiledSdpa(),
            "baseline": Baseline(),
        }
        self._chosen: dict[Key, str] = {}

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """What a trial chose; before one, what would be taken where no trial can be made."""
        name = self._chosen.get((workload, needs, device.backend))
        fallback = self._by_routes(workload, device, needs)
        route = self.candidates[name or fallback].route(workload, device, needs)
        if name is None:
            reason = f"tries {', '.join(self.candidates)} on first use, as far as they fit"
            return structs.replace(route, path="not tried yet", reason=reason)
        return structs.replace(route, path=f"tuned: {name}", reason=f"fastest in a trial; {route.reason}")

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Attends; shapes as in the protocol. While a function is traced no trial is made, and the routes decide."""
        workload, needs = asked_for(q, k, v, mask, softcap)
        key = (workload, needs, here())
        if key not in self._chosen and not _evaluated(q, k, v, mask):
            name = self._by_routes(workload, probe(), needs)
            return self.candidates[name](q, k, v, scale=scale, mask=mask, softcap=softcap)
        if key not in self._chosen:
            self._try(key, lambda candidate: candidate(q, k, v, scale=scale, mask=mask, softcap=softcap))
        return self.candidates[self._chosen[key]](q, k, v, scale=scale, mask=mask, softcap=softcap)

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Whether a candidate has to be compiled before a trial is fair."""
        return any(one.needs_building(workload, device) for one in self._built())

    def build(self, tell: Callable[[str], None]) -> None:
        """Compiles what a trial would call."""
        for one in self._built():
            one.build(tell)

    def _built(self) -> list[NeedsBuilding]:
        return [one for one in self.candidates.values() if isinstance(one, NeedsBuilding)]

    def runner(self, workload: Workload, inputs: Sequence[mx.array], scale: float) -> "DemoRunner":
        """A bound call that makes its trial, of the workload's own pass, when it is first queued."""
        return DemoRunner(self, workload, inputs, scale)

    def tuned(self, workload: Workload, inputs: Sequence[mx.array], scale: float) -> Implementation:
        """The candidate for a workload and its pass, after a trial on these inputs if there was none."""
        key = (workload, PLAIN, here())
        if key not in self._chosen:
            self._try(key, lambda candidate: MlxRunner(candidate, workload, inputs, scale).queue())
        return self.candidates[self._chosen[key]]

    def _try(self, key: Key, call: Callable[[Implementation], object]) -> None:
        workload, needs, _ = key
        fitting = self._fitting(workload, probe(), needs)
        self._chosen[key] = fastest({name: partial(_run, call, self.candidates[name]) for name in fitting})

    def _by_routes(self, workload: Workload, device: Device, needs: Needs) -> str:
        """The first candidate that is fused, and otherwise `practical`."""
        fitting = self._fitting(workload, device, needs)
        return next((n for n in fitting if self.candidates[n].route(workload, device, needs).fused), "practical")

    def _fitting(self, workload: Workload, device: Device, needs: Needs) -> list[str]:
        """The candidates that take the workload and are predicted to fit; `practical` always, as the leanest."""
        names = []
        for name, candidate in self.candidates.items():
            route = candidate.route(workload, device, needs)
            if route.fallback:
                continue  # what it falls back to is a candidate itself
            if name == "practical" or (route.supported and (route.predicted_bytes or 0) <= device.available_bytes):
                names.append(name)
        return names


class DemoRunner(MlxRunner):
    """Repeats whatever the trial chose."""

    def __init__(self, demo: Demo, workload: Workload, inputs: Sequence[mx.array], scale: float) -> None:
        """Binds the call; no trial is made yet."""
        super().__init__(demo, workload, inputs, scale)
        self._tune = partial(demo.tuned, workload, inputs, scale)
        self._is_tuned = False

    def queue(self) -> list[mx.array]:
        """Queues one call, after the trial if this is the first."""
        if not self._is_tuned:
            self._implementation, self._is_tuned = self._tune(), True
        return super().queue()


def fastest(calls: dict[str, Callable[[], object]]) -> str:
    """The name whose call takes least, by the best of up to three rounds after a cold one; what raises is out."""
    if len(calls) == 1:
        return next(iter(calls))
    started = time.perf_counter()
    best = {name: _timed(call) for name, call in calls.items()}
    warm: dict[str, float] = {}
    for hopeless in HOPELESS:
        limit = hopeless * min(best.values())
        for name in [name for name, taken in best.items() if taken <= limit and taken < math.inf]:
            if time.perf_counter() - started < TRIAL_S or not warm:
                warm[name] = min(warm.get(name, math.inf), _timed(calls[name]))
        best.update(warm)
    if min(best.values()) == math.inf:
        raise RuntimeError(f"none of {', '.join(calls)} could be run")
    return min(best, key=lambda name: best[name])


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    try:
        call()
    except (RuntimeError, ValueError):
        return math.inf
    return time.perf_counter() - started


def _run(call: Callable[[Implementation], object], candidate: Implementation) -> None:
    mx.eval(call(candidate))
    mx.synchronize()


def _evaluated(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> bool:
    """Evaluates the inputs of a trial; False where a function is being traced, and they have no values yet."""
    try:
        mx.eval([q, k, v] if mask.array is None else [q, k, v, mask.array])
    except (RuntimeError, ValueError):
        return False
    return True
