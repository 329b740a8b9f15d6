"""The first screen: the last run on this machine, or what a first run will tell."""

import pytest
from msgspec import structs

from attention.core.results import Conditions
from attention.core.workload import Workload
from fatui import diagnosis
from fatui.storage.history import RunHistory
from fatui.storage.settings import RunSpeed
from fatui.tui.view_models.home import find_past, home_text, trend
from tests.support.sample_runs import ENVIRONMENT, plan_of, report_of, run_of
from tests.support.stage import DEVICE as CPU
from tests.support.stage import PEAKS, advise, on_stage

KEYS = {"run": "r", "run_again": "R", "presets": "p", "history": "h"}
DEVICE = ENVIRONMENT.device


def kept(*plans, **changes):
    """Store runs in a history, oldest first."""
    history = RunHistory()
    for number, plan in enumerate(plans):
        report = report_of(plan, structs.replace(run_of(identity=f"{number:08x}"), **changes), seed=number)
        history.add(report)
    return history


def test_the_last_run_has_earlier_ones_of_its_cases():
    one, other = plan_of((Workload(seq=128),)), plan_of((Workload(seq=256),))
    history = kept(one, other, one, one)
    past = find_past(DEVICE, history)
    assert past.report.run.id == "00000003"
    assert [report.run.id for report in past.earlier] == ["00000002", "00000000"]
    name, values = trend(past)
    assert name == "poc" and len(values) == 3
    assert values[-1] == next(line.speedup.value for line in past.report.summary if line.implementation == "poc")
    text = home_text(past, KEYS)
    assert (
        "Use poc · 50" in text
        and "confidence" in text
        and "noise floor" in text
        and "poc over 3 runs of the same cases" in text
    )
    assert "enter opens it   R runs it again   r runs what is set up" in text
    assert [run.id for run in past.others] == ["00000002", "00000001", "00000000"]
    listed = home_text(past, KEYS, width=60).partition("Before that; h lists all\n")[2].splitlines()
    assert len(listed) == 3 and all("Use poc" in line and len(line) <= 60 for line in listed)


def test_runs_without_a_preset_are_told_apart_by_their_cases():
    one, sweep = plan_of((Workload(seq=128),)), plan_of((Workload(seq=256), Workload(seq=512)))
    past = find_past(DEVICE, kept(sweep, one, one, preset=None))
    assert [run.shape for run in past.others] == [Workload(seq=128).label, f"2 cases, {Workload(seq=256).label}"]
    listed = home_text(past, KEYS, width=90).partition("Before that; h lists all\n")[2].splitlines()
    assert "  B=1 L=128 D=64 H=8" in listed[0] and "  2 cases, B=1 L=256" in listed[1]
    listed = home_text(past, KEYS, width=140).partition("Before that; h lists all\n")[2].splitlines()
    assert f"  2 cases, {Workload(seq=256).label}  Use poc" in listed[1], "a wide screen has room for the whole name"


def test_a_name_is_cut_with_a_sign_and_interruption_is_told():
    plan = plan_of((Workload(seq=128),))
    past = find_past(DEVICE, kept(plan, plan, preset="a-preset-with-a-long-name-of-its-own"))
    first = structs.replace(past.others[0], interrupted=True)
    text = home_text(structs.replace(past, others=(first,)), KEYS, width=80)
    assert "  a-preset-with-a-long-name…  interrupted; Use poc" in text


def test_runs_with_another_reference_are_no_part_of_a_trend():
    plan = plan_of((Workload(seq=128),))
    alone = structs.replace(plan, implementations=("poc", "mlx"))
    assert not find_past(DEVICE, kept(alone, plan)).earlier


def test_runs_with_other_cores_of_a_cpu_do_not_count():
    history = RunHistory()
    for number, cores in enumerate((2, None, 8)):
        report = report_of(plan_of(), run_of(identity=f"{number:08x}"))
        history.add(structs.replace(report, conditions=Conditions(cores=cores)))
    past = find_past(DEVICE, history, cores=2)
    assert [report.run.id for report in (past.report, *past.earlier)] == ["00000001", "00000000"]
    assert find_past(DEVICE, history).report.run.id == "00000002"


async def test_a_single_core_is_counted_as_one(stage):
    stage.app.advice.device = structs.replace(CPU, cores=1)
    stage.app.main.show_draft()
    await stage.pilot.pause()
    assert ", 1 core ·" in stage.seen()
    assert ", 1 core," in next(
        item.text for item in diagnosis._machine(stage.app.advice.device) if item.topic == "device"
    )


async def test_rates_and_times_with_other_cores_are_forgotten():
    for cores in (0, CPU.cores, CPU.cores + 1):
        async with on_stage() as stage:
            kept = stage.app.remembered
            kept.peaks, kept.peaks_of, kept.cores = PEAKS, CPU.name, cores
            kept.pace = RunSpeed(device=CPU.name, set_up_s=1.0)
            advise(stage.app)
            known = cores <= CPU.cores
            assert (stage.app.peaks == PEAKS, kept.pace.set_up_s == 1.0, kept.cores) == (known, known, CPU.cores)


def test_interrupted_and_foreign_runs_do_not_count():
    assert find_past("another device", kept(plan_of())) is None


def test_an_interrupted_run_has_no_verdict():
    assert find_past(DEVICE, kept(plan_of(), interrupted=True)) is None


def test_a_history_that_cannot_be_read_is_no_history(tmp_path):
    path = tmp_path / "folder.sqlite"
    path.mkdir()
    assert find_past(DEVICE, RunHistory(path)) is None


@pytest.mark.thorough
async def test_without_a_history_it_says_what_a_first_run_will_tell(stage):
    seen = stage.seen()
    assert "No run on this machine yet." in seen and "r starts it." in seen
    await stage.press("R")
    assert "nothing was run yet; r runs what is set up" in stage.app.journal.text()
    await stage.press("r")
    assert "No run on this machine yet." not in stage.seen()


async def test_the_last_verdict_is_opened_and_run_again():
    async with on_stage() as stage:
        stage.app.set_draft(stage.app.draft.set_axis("seq", (256,)).toggle("demo"))
        await stage.run_to_the_end()
        await stage.settle(lambda: len(RunHistory().runs()) == 1)
        first = stage.app.report
    async with on_stage() as stage:
        stage.app.set_draft(stage.app.draft.set_axis("seq", (64,)))
        advise(stage.app)
        await stage.settle(lambda: "The last run on this machine: 20" in stage.seen())
        assert "Use poc · 49" in stage.seen()
        await stage.press("4", "enter")
        await stage.settle(lambda: f"run {first.run.id} is open" in stage.seen())
        assert "4 Comparison" in stage.seen()
        await stage.press("R")
        assert stage.app.session.plan.cases == (Workload(seq=256),)
        assert stage.app.session.plan.implementations == ("baseline", "poc", "practical")


@pytest.mark.slow
async def test_a_run_is_run_again_as_it_was_after_the_sliders_moved(stage):
    await stage.run_to_the_end()
    plan = stage.app.session.plan
    stage.app.set_draft(stage.app.draft.set_axis("seq", (64,)))
    await stage.press("R")
    assert stage.app.session.plan == plan
