"""The block that says what a run would take."""

import asyncio
import json
import os

import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.plan import GenerationPlan, KnownTimes, Plan, StreamPlan
from attention.core.results import Environment
from attention.core.route import Route
from attention.core.stream import Stream
from attention.core.workload import Workload, generations
from attention.engine.progress import kind_of_call
from fatui import fitting
from fatui.draft import Draft
from fatui.storage.settings import RunSpeed
from fatui.tui.advisor import Advice, AdviceReply
from fatui.tui.view_models import cost
from fatui.tui.view_models.availability import CallTime, make_picker_rows
from fatui.tui.view_models.cost import Timing
from tests.support.stage import advise

CASE = Workload(seq=512)
PLAN = Plan(cases=(CASE,), implementations=("baseline", "poc"))


def test_a_known_call_is_not_timed_again():
    near = {kind_of_call(name, CASE): [(CASE.flops * 3.0, 0.1)] for name in PLAN.ordered}
    assert cost.is_known(PLAN, KnownTimes(calls=near))
    far = {**near, kind_of_call("poc", CASE): [(CASE.flops * 5.0, 0.1)]}
    assert not cost.is_known(PLAN, KnownTimes(calls=far))
    assert cost.is_known(PLAN, KnownTimes(calls=far), untimed={kind_of_call("poc", CASE)})


def test_timed_calls_give_the_time_of_a_run():
    timing = Timing(running=True)
    assert cost.time_line(PLAN, RunSpeed(), "Test CPU", timing) == "takes: not known yet, a call of each is being timed"
    timing.take(on.RunStarted(environment=Environment(device="Test CPU")), PLAN)
    for name in PLAN.ordered:
        timing.take(on.CallTimed(case=0, implementation=name, flops=CASE.flops, seconds=1.0), PLAN)
    pace = cost.learn_calls(RunSpeed(), timing.device, timing.calls)
    line = cost.time_line(PLAN, pace, "Test CPU", timing)
    assert line.startswith("takes up to about 38 s, judging by a timed call of each")


def test_the_time_of_a_run_includes_the_fewest_rounds():
    calls = {kind_of_call(name, CASE): [(CASE.flops / 1000, 0.1)] for name in PLAN.ordered}
    pace = RunSpeed(device="Test CPU", calls=calls)
    line = cost.estimate_text(PLAN, pace, "Test CPU")
    assert line.startswith(
        "takes up to about 56 min 44 s, judging by calls of very different sizes; 6 rounds, the fewest, take 30 min"
    )
    assert cost.estimate_s(PLAN, pace, "Test CPU") is None


def test_without_a_known_call_the_time_has_no_upper_end():
    line = cost.estimate_text(PLAN, RunSpeed(), "Test CPU")
    assert line.startswith("takes 6 s of rounds, longer if 6 rounds do, and set-up; ")


def test_an_extrapolated_time_is_marked_and_not_below_a_launch():
    kind, launch_s = kind_of_call("poc", CASE), 13e-6
    pace = RunSpeed(device="Test CPU", calls={kind: [(CASE.flops, 800e-6)]})
    small = structs.replace(CASE, seq=CASE.seq // 8, kv_seq=CASE.kv_seq // 8)
    found = cost.call_times(small, ["poc"], pace, "Test CPU", launch_s)["poc"]
    assert found.extrapolated and 800e-6 / 64 + launch_s * 0.9 < found.seconds < 800e-6 / 8
    assert cost.call_times(CASE, ["poc"], pace, "Test CPU", launch_s)["poc"] == CallTime(800e-6)


def test_bounds_and_extrapolated_times_are_marked():
    draft = Draft(implementations=("poc",))
    route = Route(path="CPU kernel", fused=True, reason="x", predicted_bytes=2**23, at_most=True)
    advice = Advice(changed=lambda: None)
    advice.answer = AdviceReply(routes={"poc": route})
    rows = make_picker_rows(draft, CASE, advice, times={"poc": CallTime(1e-3, extrapolated=True)})
    assert [(row.memory, row.time) for row in rows if row.name == "poc"] == [("≤8 MiB", "~1.00 ms")]


async def test_what_will_be_refused_is_said_before_the_run(stage):
    advise(stage.app)
    number = stage.app.advice._number
    reply = AdviceReply(
        number=number, unsupported={"practical": {"needs a mask of bounds": 1}}, needs={"poc": (2**50,)}
    )
    stage.app.advice._take(reply)
    await stage.pilot.pause()
    text = " ".join(str(stage.find("#cost").content).split())
    assert "refused: poc: needs 1,024 TiB of 8 GiB; practical: needs a mask of bounds" in text
    assert text.index("of rounds, longer if") < text.index("refused") < text.index("needs: not known yet")


def test_a_draft_refused_throughout_measures_nothing():
    advice = Advice(changed=lambda: None)
    advice.answer = AdviceReply(problems={"baseline": "no module"}, needs={"poc": (2**60,)})
    draft = structs.replace(Draft(), implementations=("baseline", "poc"), memory_limit_bytes=2**30)
    assert cost.nothing_runs(draft, advice)
    assert not cost.nothing_runs(structs.replace(draft, force=True), advice)
    assert not cost.nothing_runs(structs.replace(draft, implementations=("baseline", "practical")), advice)
    advice.answer = AdviceReply(unsupported={"poc": {"needs a GPU": 1}})
    assert cost.nothing_runs(structs.replace(draft, implementations=("poc",)), advice)


def test_a_model_says_its_memory_and_time():
    cases = generations(4, model="tiny-llama", prompts=(64,), batches=(1,), generate=8, dtype="float32")
    plan, timing = GenerationPlan(cases=cases), Timing()
    timing.take(on.WeightsLoaded(case=0, weights_bytes=2**30), plan)
    for case in range(2):
        timing.take(on.CaseTimeEstimated(case=case, seconds=30.0, implementations=5), plan)
    timing.take(on.RowEnded(case=0, implementation="mlx", status="refused", reason="needs 4 GiB of 2"), plan)
    assert cost.model_lines(plan, timing) == [
        "takes up to about 1 min 00 s, judging by a timed call",
        "refused: mlx: needs 4 GiB of 2",
        "needs 1 GiB of weights",
    ]


@pytest.mark.thorough
async def test_calls_are_timed_once_the_set_up_has_settled(stage, monkeypatch):
    monkeypatch.setattr("fatui.tui.lab.SETTLED_S", 0.0)
    requested = []

    class Engine:
        def __init__(self, plan, listener):
            self.plan, self.listener = plan, listener
            requested.append(plan)

        async def run(self):
            self.listener(on.RunStarted(environment=Environment(device="Test CPU")))
            for name in self.plan.ordered:
                self.listener(on.CallTimed(case=0, implementation=name, flops=self.plan.cases[0].flops, seconds=0.5))

        def kill(self):
            pass

    monkeypatch.setattr(stage.app, "new_engine", lambda plan, listener, cost_only: Engine(plan, listener))
    stage.app.costs.enabled = True
    stage.app.set_draft(stage.app.draft.set_axis("seq", (1024,)))
    await stage.settle(lambda: stage.app.remembered.pace.calls)
    assert [plan.cases[0].seq for plan in requested] == [1024]
    await stage.pilot.pause()
    assert "judging by a timed call of each" in " ".join(str(stage.find("#cost").content).split())
    stage.app.set_draft(stage.app.draft.set_axis("seq", (768,)))  # near enough
    await stage.pilot.pause(0.05)
    assert len(requested) == 1


@pytest.mark.slow
async def test_a_run_ends_the_timing_of_calls(stage):
    stage.app.costs.enabled = True
    stage.app.set_draft(stage.app.draft.set_axis("seq", (1024,)))
    task = stage.app.costs._task
    await stage.press("r")
    await stage.pilot.pause()
    assert task.cancelled()


def test_a_stream_says_what_it_keeps():
    plan = StreamPlan(cases=(Stream(tokens=100_000, window=1024, first=4, heads=8, head_dim=64, dtype="float16"),))
    time, memory = cost.model_lines(plan, Timing())
    assert time == "takes at most 20 min 00 s: 10 min 00 s a row, less if its tokens are done sooner"
    assert memory == "needs 2.01 MiB of keys and values, full attention 195 MiB at the last token"
    time, _ = cost.model_lines(plan, Timing(case_s={0: 50.0}))
    assert time == "takes up to about 50 s, judging by a timed call; a row ends after 10 min 00 s"


def test_the_layers_of_an_edited_model_are_read_again(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()

    def shown(layers):
        fields = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2, "vocab_size": 100}
        (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 64, "model_type": "llama"}))
        os.utime(folder / "config.json", ns=(layers, layers))
        plan = StreamPlan(cases=(Stream(model=str(folder), tokens=100, window=16, heads=2, head_dim=32),))
        return cost.model_lines(plan, Timing())[-1]

    assert shown(1) != shown(2)
    assert shown(2) == shown(2)


@pytest.mark.thorough
async def test_what_a_model_takes_is_still_known_after_a_run(stage):
    plan = GenerationPlan(cases=generations(4, model="tiny-llama", prompts=(64,), generate=8, batches=(1,)))
    stage.app.costs.enabled = True
    stage.app.costs.models[plan] = Timing(case_s={0: 30.0})
    stage.app.ask_cost()
    assert stage.app.costs.of(plan).case_s == {0: 30.0}


async def test_a_first_start_gets_a_size_that_fits(stage, monkeypatch):
    async def find(make):
        return fitting.Fit(Workload(batch=4, seq=2048), 0.02)

    monkeypatch.setattr(fitting, "find", find)
    stage.app.costs.fit()
    await stage.settle(lambda: stage.app.draft.axes["seq"] == (2048,))
    assert stage.app.draft.axes["batch"] == (4,)
    assert stage.app.draft.seconds == fitting.SECONDS
    assert not stage.app.draft.changed


@pytest.mark.slow
async def test_what_was_changed_meanwhile_stays(stage, monkeypatch):
    answer = asyncio.Event()

    async def find(make):
        await answer.wait()
        return fitting.Fit(Workload(batch=4, seq=2048), 0.02)

    monkeypatch.setattr(fitting, "find", find)
    stage.app.costs.fit()
    stage.app.set_draft(stage.app.draft.set_axis("seq", (1024,)))
    answer.set()
    await stage.pilot.pause(0.05)
    assert stage.app.draft.axes["seq"] == (1024,)


@pytest.mark.slow
async def test_a_run_ends_the_search_for_a_size(stage, monkeypatch):
    monkeypatch.setattr(fitting, "find", lambda make: asyncio.sleep(60))
    stage.app.costs.fit()
    task = stage.app.costs._task
    await stage.press("r")
    await stage.pilot.pause()
    assert task.cancelled()
