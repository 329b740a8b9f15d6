"""Preparation: inputs that an implementation changes are noticed, and the path that it takes is known."""

import mlx.core as mx
import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.plan import Plan
from attention.core.route import Route
from attention.core.workload import Workload
from attention.engine.prepare import CaseSetting, SharedInputs, prepare
from attention.engine.progress import Progress
from attention.implementations import load_implementation
from attention.implementations.calls import make_inputs, record_path, runner_for
from attention.measure.accuracy import AccuracyChecker
from attention.measure.device import probe
from attention.measure.rounds import Runner
from attention.quantized_kv import QuantizedArray, quantized


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_inputs_scaled_by_a_power_of_two_are_noticed(factor: float) -> None:
    inputs = SharedInputs([mx.random.normal((1, 2, 32, 16), key=mx.random.key(0))])  # 1024 words
    views = inputs.views()
    inputs.check(views)
    views[0] *= factor
    with pytest.raises(ValueError, match="wrote into its inputs"):
        inputs.check(views)


@pytest.mark.parametrize("part", range(3))
def test_quantized_inputs_that_change_are_noticed(part: int) -> None:
    keys = quantized(mx.random.normal((1, 2, 16, 32), key=mx.random.key(0)), "int4:32")
    inputs = SharedInputs([keys])
    (view,) = inputs.views()
    assert isinstance(view, QuantizedArray)
    inputs.check([view])
    changed = list(view.arrays)
    changed[part] = changed[part] + mx.ones((), changed[part].dtype)
    with pytest.raises(ValueError, match="wrote into its inputs"):
        inputs.check([view.with_arrays(changed)])


def test_on_ranks_the_path_is_that_of_the_first_call() -> None:
    workload = Workload(seq=32, head_dim=16, heads=2, ranks=2)
    emitted: list[on.AnyEvent] = []
    alone = structs.replace(workload, ranks=1)
    baseline, inputs = load_implementation("baseline"), make_inputs(alone, 0)

    def bind(name: str) -> Runner:
        record_path("tuned: poc")
        return runner_for(baseline, alone, inputs, 0.25)

    progress = Progress(Plan(cases=(workload,), implementations=("demo",)), 0, emitted.append, lambda number: None)
    setting = CaseSetting(
        workload=workload,
        device=probe(),
        inputs=SharedInputs(inputs),
        accuracy=AccuracyChecker(alone, inputs),
        sample_s=0.001,
        progress=progress,
        route=lambda implementation: Route(path="x2 not tried yet", fused=False, reason="a reason"),
        bind=bind,
    )
    progress.begin_case(0)
    prepare("demo", baseline, setting)
    routes = [event.route.path for event in emitted if isinstance(event, on.RouteFound)]
    assert routes == ["x2 tuned: poc"]
