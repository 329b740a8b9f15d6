"""Whether the numbers can be believed; slow, and only meaningful on a machine that does nothing else."""

import asyncio
import time
from pathlib import Path
from statistics import median

import mlx.core as mx
import pytest

from attention.implementations.runner import MlxRunner, make_inputs
from attention.measure.clock import take_sample
from attention.plan import Plan
from attention.report import Case
from attention.workload import Workload
from fatui import presets
from fatui.engine import Engine

pytestmark = pytest.mark.slow
PLANTED = Path(__file__).parent / "planted.py"


def measure(plan: Plan) -> Case:
    engine = Engine(plan)
    asyncio.run(engine.run())
    return engine.record.case(0)


def test_the_baseline_against_itself_is_inside_its_own_interval_in_nine_runs_of_ten() -> None:
    floors = [measure(presets.load("quick").plan()).noise_floor for _ in range(10)]
    inside = [floor is not None and floor.low <= 1 <= floor.high for floor in floors]
    assert sum(inside) >= 9, floors


@pytest.mark.parametrize(("planted", "found"), [("Slower5Percent", True), ("SlowerATenthOfAPercent", False)])
def test_a_slowdown_of_five_percent_is_found_and_one_of_a_thousandth_is_not(planted: str, found: bool) -> None:
    workload = Workload(seq=128, heads=4, head_dim=32, dtype="float32")
    names = ("baseline", f"{PLANTED}:{planted}")
    ratio = measure(Plan(cases=(workload,), implementations=names, seconds=8)).rows[1].speedup
    assert ratio is not None
    assert ratio.significant is found, ratio
    if found:
        assert ratio.value == pytest.approx(1 / 1.05, rel=0.02)


class OneProduct:
    """A call of about a millisecond."""

    name = "product"

    def __init__(self) -> None:
        self.factor = mx.random.normal((256, 256))

    def queue(self) -> mx.array:
        return self.factor @ self.factor[:, :24]

    def wait(self, outputs: object) -> None:
        mx.eval(outputs)
        mx.synchronize()


def test_the_clock_agrees_with_a_bare_loop_within_a_hundredth() -> None:
    product, calls = OneProduct(), 20
    ratios = []
    for _ in range(60):
        started = time.perf_counter()
        for _ in range(calls):
            mx.eval(product.queue())
        bare = (time.perf_counter() - started) / calls
        ratios.append(take_sample(product, calls) / bare)  # type: ignore[arg-type]
    assert 0.0003 < bare < 0.003
    assert median(ratios) == pytest.approx(1, abs=0.01)


def test_binding_a_call_does_not_change_its_time() -> None:
    workload = Workload(seq=64, heads=2, head_dim=32, dtype="float32")
    from attention.implementations import get

    inputs = make_inputs(workload, 0)
    runner = MlxRunner(get("mlx"), workload, inputs, 32**-0.5)
    ratios = []
    for _ in range(60):
        started = time.perf_counter()
        for _ in range(20):
            mx.eval(mx.fast.scaled_dot_product_attention(*inputs, scale=32**-0.5))
        bare = (time.perf_counter() - started) / 20
        ratios.append(take_sample(runner, 20) / bare)
    assert median(ratios) == pytest.approx(1, abs=0.02)
