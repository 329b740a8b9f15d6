"""Workload classes, entries and candidates for the tests of tuning."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import mlx.core as mx
from msgspec import structs

from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import Workload
from attention.implementations.autotune.store import TrialResult, WorkloadClass
from attention.implementations.baseline import Baseline
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.masks import Mask
from attention.measure.device import Device

A_CLASS = WorkloadClass(
    device="a CPU",
    mlx="0.32.4",
    dtype="float16",
    head_dim=64,
    value_dim=64,
    group=1,
    mask="causal",
    pass_="forward",
    streams=8,
    seq=512,
    kv_seq=512,
)


def class_number(number: int) -> WorkloadClass:
    return structs.replace(A_CLASS, head_dim=number)


def an_entry(workload: WorkloadClass = A_CLASS, winner: str = "poc") -> TrialResult:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return TrialResult(winner=winner, tuned=when, call_s={winner: 1e-4, "baseline": 2e-4}, workload=workload, ratio=2.0)


class FakeTime:
    """A clock that moves only when advanced."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """MLX's SDPA, which advances a fake clock at each call, or takes real time."""

    def __init__(self, name: str, seconds: float | Callable[[], float], clock: FakeTime | None = None) -> None:
        self.name, self.seconds, self.calls = name, seconds, 0
        self._clock, self._sdpa = clock, MlxSdpa()

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        return Route(path=self.name, fused=True, reason="as the test says")

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        self.calls += 1
        seconds = self.seconds() if callable(self.seconds) else self.seconds
        if self._clock is not None:
            self._clock.now += seconds
        else:
            time.sleep(seconds)
        return self._sdpa(q, k, v, scale=scale, mask=mask)


class Wrong(Timed):
    """A fast candidate that is off by a little more than rounding."""

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        return super().__call__(q, k, v, scale=scale, mask=mask) * 1.05


class Broken(Baseline):
    """A candidate that raises at every call."""

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        raise RuntimeError("out of memory")
