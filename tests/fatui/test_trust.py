"""Whether the measurements can be trusted; slow, and only meaningful on an otherwise idle machine."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import mlx.core as mx
import pytest

from attention.core.plan import Plan
from attention.core.results import Case
from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import Workload
from attention.implementations.calls import MlxRunner, make_inputs
from attention.masks import Mask
from attention.measure.device import Device
from attention.measure.rounds import latency, take_sample
from fatui.engine_process import Engine
from fatui.storage import presets

pytestmark = pytest.mark.slow
PLANTED = Path(__file__).parents[1] / "support" / "planted.py"


def measure(plan: Plan) -> Case:
    engine = Engine(plan)
    asyncio.run(engine.run())
    return engine.record.case(0)


def test_the_baseline_is_in_its_own_interval_in_9_of_10_runs() -> None:
    floors = [measure(presets.load("quick").plan()).noise_floor for _ in range(10)]
    print(floors)
    inside = [floor is not None and floor.low <= 1 <= floor.high for floor in floors]
    assert sum(inside) >= 9, floors


@pytest.mark.parametrize(("planted", "found"), [("Slower5Percent", True), ("SlowerATenthOfAPercent", False)])
def test_a_5_percent_slowdown_is_found_and_a_thousandth_is_not(planted: str, found: bool) -> None:
    workload = Workload(seq=128, heads=4, head_dim=32, dtype="float32")
    names = ("baseline", f"{PLANTED}:{planted}")
    case = measure(Plan(cases=(workload,), implementations=names, seconds=8))
    ratio = case.rows[1].speedup
    print(planted, ratio, case.noise_floor, len(case.rows[1].samples))
    assert ratio is not None
    assert ratio.significant is found, ratio
    if found:
        assert ratio.value == pytest.approx(1 / 1.05, rel=0.02)


class OneProduct:
    """A call of about a millisecond: a matrix product."""

    name = "product"

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        return Route(path="product", fused=True, reason="it is one")

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        return q @ v


def bare_loop(call: Callable[[], mx.array]) -> float:
    """Return seconds per call of the naive loop: evaluate each call, and read the clock."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - started)
    return median(times)


def bare_queue(call: Callable[[], mx.array]) -> float:
    """Return seconds per call if twenty are queued and evaluated together."""
    started = time.perf_counter()
    mx.eval([call() for _ in range(20)])
    return (time.perf_counter() - started) / 20


def test_the_clock_agrees_with_a_bare_loop_within_a_hundredth() -> None:
    workload = Workload(batch=1, heads=1, seq=256, head_dim=256, value_dim=24, dtype="float32")
    inputs = make_inputs(workload, 0)
    runner = MlxRunner(OneProduct(), workload, inputs, workload.scale)
    q, _, v = inputs
    single, queued = [], []
    for _ in range(150):
        bare = bare_loop(lambda: q @ v)
        single.append(latency(runner, 0.02) / bare)
        queued.append(take_sample(runner, 20) / bare_queue(lambda: q @ v))
    print(f"a call of {bare * 1e3:.2f} ms: latency {median(single):.4f}, queued {median(queued):.4f} of a bare loop")
    assert 0.0003 < bare < 0.003
    assert median(single) == pytest.approx(1, abs=0.01)
    assert median(queued) == pytest.approx(1, abs=0.01)
