"""What a model's plan costs, estimated before it is run."""

import subprocess
import sys

import msgspec
import pytest

from attention.core import events as on
from attention.core.plan import Assignment, FineTuningPlan, GenerationPlan, StreamPlan
from attention.core.stream import Stream
from attention.core.workload import FineTuning, generations
from attention.engine.stream import ATTENDS
from attention.implementations import load_implementation
from attention.implementations.protocol import build
from attention.measure.device import probe
from attention.mlx_lm import generation
from attention.mlx_lm.generation import GenerationBench
from attention.mlx_lm.stream import ModelStreamBench

CASES = generations(4, model="tiny-llama", prompts=(32, 64), batches=(1,), generate=4, dtype="float32")


def measured(**options):
    plan, events = GenerationPlan(cases=CASES, implementations=("baseline", "mlx"), seconds=1.0, **options), []
    GenerationBench(Assignment(plan=plan, cost_only=True), plan, events.append).measure_cost()
    return events


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.thorough
def test_a_stream_through_a_model_is_estimated():
    case = Stream(model="tiny-llama", tokens=64, window=16, dtype="float32")
    build(load_implementation(ATTENDS), case.workload, print)  # what has to be compiled first is not timed
    plan, events = StreamPlan(cases=(case,), implementations=("full", "recomputed", "streaming")), []
    ModelStreamBench(Assignment(plan=plan, cost_only=True), plan, events.append).measure_cost()
    (estimated,) = of_kind(events, on.CaseTimeEstimated)
    assert 0 < estimated.seconds <= 3 * plan.seconds


def test_each_case_of_a_model_is_estimated():
    events = measured()
    estimates = of_kind(events, on.CaseTimeEstimated)
    assert [(each.case, each.implementations) for each in estimates] == [(case, 2) for case in range(len(CASES))]
    assert all(each.seconds >= 1.0 for each in estimates)
    assert all(each.weights_bytes > 0 for each in of_kind(events, on.WeightsLoaded))
    assert not of_kind(events, on.RoundsDone) and of_kind(events, on.RunDone)


def test_a_model_that_does_not_fit_is_refused_and_not_made():
    events = measured(memory_limit_bytes=1)
    assert {each.status for each in of_kind(events, on.RowEnded)} == {"refused"}
    assert not of_kind(events, on.CaseTimeEstimated)


@pytest.mark.parametrize(("passes_s", "advised"), [((9.0, 0.01), False), ((9.0, 9.0), True)])
def test_a_model_is_not_called_slow_for_compiling(monkeypatch, passes_s, advised):
    works = generations(22, model="tinyllama-1.1b", prompts=(512,), batches=(1,), generate=8, dtype="float16")
    work = next(each for each in works if each.phase == "prefill")
    plan, events, times = GenerationPlan(cases=(work,), implementations=("baseline", "mlx")), [], iter(passes_s)
    bench = GenerationBench(Assignment(plan=plan), plan, events.append)
    bench._backend = "gpu"
    bench._prepare_all(probe())
    monkeypatch.setattr(generation, "take_sample", lambda run, calls: next(times))
    bench._progress.begin_case(0)
    bench._estimate_time(work, 2)
    assert any("--layers 4" in event.text for event in of_kind(events, on.Message)) == advised


@pytest.mark.slow
def test_a_fine_tuning_ends_once_it_is_estimated():
    work = FineTuning(model="tiny-llama", layers=4, tuned_layers=2, dtype="float32", iters=500, seq=64, batch=1, rank=4)
    assignment = Assignment(plan=FineTuningPlan(cases=(work,), implementations=("mlx",)), cost_only=True)
    with subprocess.Popen(
        [sys.executable, "-m", "attention.engine.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        worker.stdin.write(msgspec.json.encode(assignment) + b"\n")
        worker.stdin.flush()
        kinds = [msgspec.json.decode(line)["event"] for line in worker.stdout]
    assert kinds[-2:] == ["expected", "run_done"]
    assert worker.returncode == 0
