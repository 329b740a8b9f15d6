"""What a plan costs, measured before it is run."""

import pytest

from attention.core import events as on
from attention.core.plan import Assignment, KnownTimes, Plan, StreamPlan
from attention.core.stream import Stream
from attention.core.workload import Workload
from attention.engine.bench import Bench
from attention.engine.case_runner import shortage_text
from attention.engine.cost import FIRST_FLOPS, MIN_LENGTH, smaller
from attention.engine.progress import Forecast, costliest_cases, kind_of_call
from attention.engine.stream import ATTENDS, AttentionStreamBench
from attention.implementations import load_implementation
from attention.implementations.protocol import build

SMALL = Workload(seq=64, heads=2, head_dim=32)


def measured(plan):
    events = []
    Bench(Assignment(plan=plan, cost_only=True), plan, events.append).measure_cost()
    return events


def test_the_costliest_case_of_a_kind_is_timed():
    longer = Workload(seq=128, heads=2, head_dim=32)
    plan = Plan(
        cases=(SMALL, longer, Workload(seq=64, heads=2, head_dim=32, mask="causal")),
        implementations=("baseline", "mlx"),
    )
    timed = [event for event in measured(plan) if isinstance(event, on.CallTimed)]
    assert [(event.case, event.implementation) for event in timed] == [(1, "baseline"), (1, "mlx")]
    assert all(event.flops == longer.flops and event.seconds > 0 for event in timed)


def test_what_would_be_refused_is_reported_and_not_timed():
    plan = Plan(cases=(SMALL,), implementations=("baseline", "mlx"), memory_limit_bytes=1)
    events = measured(plan)
    assert {event.implementation for event in events if isinstance(event, on.RowEnded)} == {"baseline", "mlx"}
    assert not any(isinstance(event, on.CallTimed) for event in events)


def test_a_stream_estimate_says_where_it_is_extrapolated():
    case = Stream(tokens=4096, window=64, heads=2, head_dim=32, dtype="float32")
    build(load_implementation(ATTENDS), case.workload, print)  # what has to be compiled first is not timed
    plan, events = StreamPlan(cases=(case,), implementations=("full", "streaming"), memory_limit_bytes=2**20), []
    AttentionStreamBench(Assignment(plan=plan, cost_only=True), plan, events.append).measure_cost()
    (estimated,) = (event for event in events if isinstance(event, on.CaseTimeEstimated))
    assert 0 < estimated.seconds <= 2 * plan.seconds and estimated.implementations == 2
    (refused,) = (event for event in events if isinstance(event, on.RowEnded))
    assert refused.implementation == "full" and refused.reason.startswith("beyond token 512 ")


@pytest.mark.parametrize(
    "workload",
    [
        Workload(batch=8, seq=4096, heads=32, kv_heads=8, head_dim=128, mask="causal"),
        Workload(batch=64, pass_="decode", kv_seq=65_536, heads=32, head_dim=128),
        Workload(seq=16_384, mask="window:4096", heads=8, pass_="training"),
    ],
)
def test_a_long_call_is_timed_on_a_smaller_workload_of_its_kind(workload):
    small = smaller(workload, FIRST_FLOPS)
    assert small.flops <= 4 * FIRST_FLOPS or min(small.seq, small.kv_seq) <= MIN_LENGTH
    assert kind_of_call("poc", small) == kind_of_call("poc", workload)
    assert small.heads // small.kv_heads == workload.heads // workload.kv_heads


def test_a_forecast_begins_with_what_is_known():
    case = Workload(seq=1024)
    plan = Plan(cases=(case,), implementations=("baseline", "poc"), seconds=2.0)
    kinds = {kind_of_call(name, case): [(case.flops / 4, 0.5)] for name in plan.ordered}
    known = Forecast(plan, KnownTimes(calls=kinds, set_up_s=0.0))
    assert known.knows(0) and not Forecast(plan).knows(0)
    assert known.rounds_s(0) == pytest.approx(6 * 3 * 2.0)
    assert costliest_cases([SMALL, case]) == [1]


def test_a_shortage_of_memory_has_no_exponent():
    assert shortage_text(132 * 2**40, 21 * 2**30) == "needs 135,168 GiB of 21"
    assert shortage_text(41 * 2**30, 22 * 2**30) == "needs 41 GiB of 22"
