"""The verdict card and the trust line: when a run has ended, from its rows alone; longer runs; what is copied."""

import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.results import Conditions
from fatui.tui import terminal
from fatui.tui.widgets.text_panes import VerdictCard
from fatui.verdict import headline, verdicts
from tests.support.marks import thorough
from tests.support.stage import on_stage


async def finished(stage, conditions=None):
    await stage.press("r")
    stage.engine.play()
    if conditions:
        stage.engine.tell(on.ConditionsMeasured(conditions=conditions))
    await stage.end()
    stage.app.main.show_run()
    await stage.pilot.pause()


async def test_the_card_has_the_verdict_the_losses_and_the_offers(stage):
    await finished(stage)
    seen = stage.seen()
    assert headline(verdicts(stage.app.report)[0]) == str(stage.find("#verdict-head").content)
    assert "practical: 45.2x as long" in seen
    assert "measures longer · d explains" in seen


@pytest.mark.slow
async def test_the_card_is_over_the_reference_of_the_table(stage):
    await finished(stage)
    head = stage.find("#verdict-head")
    before = str(head.content)
    assert "x baseline" in before
    stage.find("#comparison-table").go_to("0:practical")
    await stage.press("b")
    assert "x practical" in str(head.content) and "baseline" not in str(head.content)
    await stage.press("b")
    assert str(head.content) == before


async def test_all_figures_are_over_the_reference_of_the_table():
    async with on_stage(size=(200, 55)) as stage:
        stage.app.set_draft(stage.app.draft.set_axis("seq", (256, 512)))
        await finished(stage)
        await stage.press("v", "v")
        table = stage.find("#comparison-table")
        assert "Speedups over baseline, geometric mean of 2 complete cases" in stage.seen()
        table.go_to("0:practical")
        await stage.press("b")
        await stage.pilot.pause()
        seen = stage.seen()
        assert "Speedups over practical, geometric mean of 2 complete cases" in seen
        assert "x practical" in str(stage.find("#verdict-head").content)
        assert "ratio to practical" in seen and "1 over practical" in seen
        assert "over baseline" not in seen and "to baseline" not in seen
        await stage.press("b")
        assert "Speedups over baseline, geometric mean of 2 complete cases" in stage.seen()


async def test_a_case_without_the_reference_says_what_it_is_over(stage):
    stage.app.set_draft(stage.app.draft.set_axis("seq", (256, 512)))
    await stage.press("r")
    engine = stage.engine
    engine.begin()
    for case in (0, 1):
        engine.begin_case(case)
        if case == 1:
            engine.tell(on.RowEnded(case=1, implementation="practical", status="refused", reason="needs 4 GiB of 2"))
        engine.rounds(case=case)
        engine.end_case(case)
    engine.tell(on.RunDone())
    await stage.end()
    stage.app.main.show_run()
    await stage.press("4", "z")
    stage.find("#comparison-table").go_to("0:practical")
    await stage.press("b")
    await stage.pilot.pause()
    seen = stage.seen()
    assert "Speedups over practical, geometric mean of 1 of 2 complete cases" in seen
    assert "over baseline: no figures of practical" in seen


@pytest.mark.slow
async def test_many_doubts_leave_room_for_the_keys(stage):
    await finished(stage)
    card = stage.find(VerdictCard)
    doubts = "only 10 rounds, its time is too uncertain to call it the fastest, the machine slowed down"
    card._fill("won", head="Use poc", sure=f"confidence low: {doubts} · + measures longer · d explains")
    await stage.pilot.pause()
    sure = stage.find("#verdict-sure")
    lines = ["".join(segment.text for segment in sure.render_line(y)) for y in range(sure.size.height)]
    assert "d explains" in " ".join(" ".join(lines).split())


@pytest.mark.slow
async def test_the_trust_line_warns_of_other_processes(stage):
    await finished(stage, Conditions(cores=2, other_cores=1.3, busiest=("cc1plus",), other_engines=1))
    assert "another fatui measures too · others used 1.3 cores (cc1plus)" in stage.seen()
    assert stage.find("#verdict-trust").has_class("-serious")
    await stage.press("d")
    assert "stop these programs" in " ".join(stage.seen().split())
    await stage.press("d")
    assert stage.app.screen is stage.app.main


@pytest.mark.slow
async def test_there_is_no_card_while_a_run_is_active(stage):
    await finished(stage)
    await stage.press("r")
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert not stage.find("VerdictCard").display


@pytest.mark.thorough
async def test_plus_adds_rounds_to_those_measured(stage):
    await finished(stage)
    before = stage.app.report
    await stage.press("+")
    assert stage.app.session.plan.seconds == 10
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds(30)
    stage.engine.end_case()
    stage.engine.tell(on.RunDone())
    await stage.end()
    row, longer = before.cases[0].rows[1], stage.app.report.cases[0].rows[1]
    assert longer.samples[: len(row.samples)] == row.samples
    assert len(longer.samples) == len(row.samples) + 30
    assert f"--seconds {before_seconds(before) + 10:g}" in stage.app.report.run.command
    assert stage.app.report.run.id != before.run.id


def before_seconds(report):
    words = report.run.command.split()
    return float(words[words.index("--seconds") + 1]) if "--seconds" in words else 6.0


@pytest.mark.slow
async def test_plus_needs_a_run_of_this_session(stage):
    await stage.press("+")
    assert "cannot measure longer" in stage.app.journal.text()


@pytest.mark.parametrize(("key", "begins"), [("y", "**Use poc"), thorough("Y", "fatui bench")])
async def test_the_verdict_and_the_command_are_copied(stage, monkeypatch, key, begins):
    copied = []
    monkeypatch.setattr(terminal, "copy", lambda text: copied.append(text) or "test")
    await finished(stage)
    await stage.press(key)
    await stage.settle(lambda: bool(copied))
    assert copied[0].startswith(begins)


@pytest.mark.slow
async def test_a_noisy_run_names_the_key_that_measures_longer(stage):
    await finished(stage)
    report = stage.app.report
    case = report.cases[0]
    floor = structs.replace(case.noise_floor, floor=0.4)
    rows = tuple(structs.replace(row, speedup=structs.replace(row.speedup, significant=False)) for row in case.rows)
    noisy = structs.replace(report, cases=(structs.replace(case, noise_floor=floor, rows=rows),))
    stage.app.open_report(noisy)
    await stage.pilot.pause()
    assert "Too noisy to rank" in stage.seen() and "+ measures longer" in stage.seen()


@pytest.mark.thorough
async def test_what_is_not_continued_is_not_offered(stage):
    await finished(stage)
    latest = stage.app.report
    assert "measures longer" in stage.seen() and "+ Longer" in stage.seen()
    stage.app.open_report(structs.replace(latest, run=structs.replace(latest.run, id="0000")))
    await stage.pilot.pause()
    seen = stage.seen()
    assert "measures longer" not in seen and "+ Longer" not in seen
    stage.app.open_report(latest)
    await stage.pilot.pause()
    assert "measures longer" in stage.seen() and "+ Longer" in stage.seen()
    await stage.press("+")
    assert stage.app.session.active
