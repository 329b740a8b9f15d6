"""The log: it keeps its scroll position, can be filtered, and can be paused."""

import time

import pytest
from textual.widgets import Input

from attention.core import events as on
from attention.core.results import Ratio
from fatui.tui.screens.dialogs import FullText
from fatui.tui.widgets.log_pane import LogPane, LogView
from tests.support.stage import impatient, make_app


@pytest.mark.slow
async def test_a_long_log_keeps_its_place_when_scrolled_up(stage):
    view = stage.find("#log-view", LogView)
    for number in range(2000):
        stage.app.journal.write(f"line {number}")
    view.update_lines()
    await stage.settle(lambda: "line 1999" in stage.seen())
    view.scroll_to(y=100, animate=False, immediate=True)
    await stage.pilot.pause()
    for number in range(2000, 3000):
        stage.app.journal.write(f"line {number}")
    view.update_lines()
    await stage.pilot.pause()
    assert "line 100 " in stage.seen()
    began = time.process_time()
    for number in range(100_000):
        stage.app.journal.write(f"more {number}")
    view.update_lines()
    assert time.process_time() - began < 3
    assert len(view._lines) <= 10_000
    view.action_follow()
    await stage.settle(lambda: "more 99999" in stage.seen())


async def test_the_log_is_filtered_paused_and_goes_on(stage):
    stage.app.journal.write("apple")
    stage.app.journal.write("pear", "error")
    stage.app.main._tick()
    await stage.press("slash", *"error:")
    assert "pear" in stage.seen() and "apple" not in stage.seen()
    await stage.press("escape")
    assert "apple" in stage.seen()
    await stage.press("l")
    stage.app.journal.write("plum")
    stage.app.main._tick()
    await stage.pilot.pause()
    assert "plum" not in stage.seen() and "paused, 1 held back" in stage.seen()
    await stage.press("l")
    assert "plum" in stage.seen()


@pytest.mark.slow
async def test_trials_and_switches_are_reported_while_the_run_goes_on(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    where, ratio = {"implementation": "demo", "workload": "L≤512"}, Ratio(value=1.4, low=1.3, high=1.5)
    stage.engine.tell(
        on.TrialStarted(**where, candidates=["poc", "mlx"]),
        on.Tuned(**where, winner="poc", runner_up="mlx", ratio=ratio, seconds=0.5),
        on.Switched(**where, before="poc", after="mlx", ratio=ratio, reason="its calls take 1.30 times what they did"),
    )
    stage.app.main.show_run()
    await stage.pilot.pause()
    seen = " ".join(stage.seen().split())
    assert "demo tries poc, mlx for L≤512" in seen
    assert "demo takes poc for L≤512, 1.4x mlx" in seen
    assert "demo goes from poc to mlx for L≤512, 1.4x poc" in seen
    assert stage.app.runs.active


@pytest.mark.slow
async def test_long_lines_wrap_and_open_whole(stage):
    words = " ".join(f"word{number}" for number in range(60))
    stage.app.journal.write(words)
    stage.app.main._tick()
    await stage.settle(lambda: "word59" in stage.seen())
    stage.find("#log-view").focus()
    await stage.press("up", "enter")
    assert isinstance(stage.app.screen, FullText)
    assert "word0 " in stage.seen() and "word59" in stage.seen()
    await stage.press("escape")
    assert stage.app.screen is stage.app.main


@pytest.mark.thorough
async def test_a_search_goes_from_match_to_match_and_hides_nothing(stage):
    for number in range(40):
        stage.app.journal.write("an apple" if number in (3, 30) else f"line {number}")
    stage.app.main._tick()
    view = stage.find("#log-view", LogView)
    await stage.press("slash", *"apple", "enter")
    assert view.cursor == 30 and "2 lines with 'apple'" in stage.seen() and "line 31" in stage.seen()
    await stage.press("N")
    assert view.cursor == 3 and "an apple" in stage.seen()
    await stage.press("n", "n")
    assert view.cursor == 3
    stage.app.journal.write("later")
    stage.app.main._tick()
    await stage.pilot.pause()
    assert "later" not in stage.seen() and view.cursor == 3
    await stage.press("end")
    assert "later" in stage.seen()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(120, 40), (80, 24)])
async def test_a_notification_covers_no_pane(size):
    app = make_app()
    with impatient(app):
        async with app.run_test(size=size, notifications=True) as pilot:
            app.tell("something happened, and it can be told in one line of the terminal")
            await pilot.pause()
            (toast,) = app.screen.query("Toast")
            assert toast.region == app.screen.query_one("#key-bar").region.intersection(toast.region)
            assert toast.region.height == 1


async def test_a_run_with_a_refused_case_is_not_called_complete(stage):
    stage.app.set_draft(stage.app.draft.set_axis("seq", (256, 512)))
    await stage.press("r")
    engine = stage.engine
    engine.begin()
    engine.begin_case()
    engine.rounds()
    engine.end_case()
    engine.tell(on.CaseStarted(case=1))
    for name in engine.record.plan.ordered:
        engine.tell(on.RowEnded(case=1, implementation=name, status="refused", reason="needs 4 GiB of 2"))
    engine.tell(on.CaseDone(case=1, stopped_by="nothing to run"), on.RunDone())
    await stage.end()
    stage.app.main.show_run()
    await stage.pilot.pause()
    text = stage.app.journal.text()
    assert "1 of 2 cases complete" in text and "all cases complete" not in text
    seen = stage.seen()
    assert "1 of 2 cases complete, 0 s" in seen and "1 of 2 cases complete after 0 s" in seen and "done" not in seen


async def test_the_search_opens_in_a_log_just_placed(stage):
    pane = LogPane(stage.app.journal, id="fresh")
    stage.app.main.mount(pane)
    pane.ask()
    await stage.settle(lambda: len(pane.children) == 2)
    assert [type(child) for child in pane.children] == [Input, LogView]
