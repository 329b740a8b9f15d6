"""Where the panes stand, and how keys reach them."""

import asyncio
import itertools

import pytest
from textual import events, timer
from textual.geometry import Size

from fatui.tui.screens.dialogs import RowDetails
from fatui.tui.screens.doctor import Doctor
from fatui.tui.screens.jump import Jump
from fatui.tui.screens.main import FOCUS
from fatui.tui.screens.scaling import Scaling
from fatui.tui.widgets.implementation_picker import ImplementationPicker
from fatui.tui.widgets.log_pane import LogView
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.slider import Slider
from tests.support.marks import slow, thorough
from tests.support.patience import patient
from tests.support.stage import PEAKS, on_stage


def at(stage, pane):
    return stage.find(f"#{pane}").region


@pytest.mark.thorough
async def test_from_160_columns_panes_are_side_by_side():
    async with on_stage(size=(160, 48)) as stage:
        await stage.run_to_the_end()
        live, comparison, log, row = (at(stage, pane) for pane in ("live", "comparison", "log", "row"))
        assert live.y == comparison.y and comparison.x >= live.right
        assert row.x == comparison.x and row.y >= comparison.bottom and live.height > comparison.height + row.height - 2
        assert log.x == at(stage, "workload").x and log.y >= at(stage, "workload").bottom
        assert log.bottom == live.bottom == row.bottom == stage.find("#body").region.bottom
        assert "6 Row · baseline" in stage.seen()
        assert "fatui bench" in str(stage.find("#row-text").content)
        stage.find("#comparison-table", RowTable).focus()
        await stage.press("j")
        assert "6 Row · poc" in stage.seen() and "why poc" in stage.seen()


@pytest.mark.slow
async def test_below_160_columns_there_is_no_row_pane(stage):
    assert not stage.find("#row").display
    await stage.press("6")
    assert "needs 160 columns" in stage.app.journal.text()


@pytest.mark.thorough
@pytest.mark.parametrize("pane", ["live", "comparison", "log", "row"])
async def test_hiding_a_pane_leaves_no_hole(pane):
    async with on_stage(size=(160, 48)) as stage:
        await stage.run_to_the_end()
        stage.app.main.set_focus(stage.find(FOCUS[pane]))
        await stage.press("Z")
        await stage.pilot.pause()
        assert not stage.find(f"#{pane}").display
        names = ("implementations-pane", "workload", "live", "comparison", "log", "row")
        seen = [at(stage, name) for name in names if name != pane]
        assert sum(region.area for region in seen) == stage.find("#body").region.area


async def test_the_log_takes_lines_while_it_moves():
    async with on_stage(size=(160, 48)) as stage:
        for number in range(9):
            stage.app.journal.write(f"line {number}")
        stage.app.main._tick()
        view = LogView(stage.app.journal, id="other")
        view.take_over(stage.find("#log-view", LogView))
        stage.app.journal.write("later")
        view._append(stage.app.journal.since(9))  # before it has a width
        assert len(view._starts) == len(view._lines) == 10
        assert [view._rows[start][0] for start in view._starts] == list(range(10))


@pytest.mark.slow
async def test_the_log_keeps_its_place_at_other_widths():
    async with on_stage(size=(160, 48)) as stage:
        await stage.run_to_the_end()
        stage.app.main.set_focus(stage.find("#log-view"))
        await stage.press("slash", *"poc", "enter", "l")
        count = len(stage.find("#log-view").journal)
        stage.app.journal.write("later")
        for size, column in (((120, 40), "right"), ((160, 48), "left")):
            await stage.pilot.resize_terminal(*size)
            await stage.settle(
                lambda column=column: [log.parent.id for log in stage.app.screen.query("#log")] == [column]
            )
            view = stage.find("#log-view")
            await stage.settle(lambda view=view: stage.app.focused is view)
            assert view.needle == "poc" and view.paused and view.held_back == 1
            assert len(view._lines) == count and "paused, 1 held back" in str(stage.find("#log").border_title)


@pytest.mark.slow
async def test_a_wide_first_screen_shows_a_known_roofline():
    async with on_stage(size=(160, 48)) as stage:
        assert not stage.find("#roofline").display
        stage.app.remembered.peaks, stage.app.remembered.peaks_of = PEAKS, stage.app.device_name
        stage.app.main.show_draft()
        await stage.pilot.pause()
        assert stage.find("#roofline").region.height > 8
        await stage.press("r")
        assert not stage.find("#roofline").display and stage.find("#rates").display


@pytest.mark.slow
async def test_a_maximised_pane_follows_the_focus(stage):
    await stage.run_to_the_end()
    stage.find("#comparison-table").focus()
    assert "enter a row · z maximise" in stage.seen()
    await stage.press("z")
    await stage.pilot.pause()
    assert at(stage, "comparison").size == stage.find("#body").size
    await stage.press("5")
    await stage.pilot.pause()
    assert at(stage, "log").size == stage.find("#body").size
    assert not stage.find("#comparison").display
    assert "z All panes" in stage.seen() and "z Maximise" not in stage.seen()
    await stage.press("escape")
    await stage.pilot.pause()
    assert stage.find("#comparison").display and stage.find("#left").display
    assert "All panes" not in stage.seen()


async def test_a_tab_that_opens_by_itself_has_the_focus():
    """As the results at the end of a run, whose frame says that enter opens a row."""
    async with on_stage(size=(80, 24)) as stage:
        await stage.press("2", "r")
        await stage.settle(lambda: stage.app.focused is stage.find("#live"))
        stage.engine.play()
        await stage.end()
        await stage.settle(lambda: stage.app.focused is stage.find("#comparison-table"))
        await stage.press("enter")
        assert isinstance(stage.app.screen, RowDetails)


@pytest.mark.slow
async def test_a_maximised_pane_does_not_hide_the_run():
    async with on_stage(size=(80, 24)) as stage:
        await stage.press("z")
        assert stage.app.main._maximised is not None
        await stage.press("r")
        await stage.pilot.pause()
        assert stage.find("#live").region.height > 10


@pytest.mark.slow
async def test_numbers_go_to_panes_and_on_a_slider_with_alt(stage):
    await stage.press("4")
    await stage.pilot.pause()
    assert stage.app.focused.id == "home"
    await stage.run_to_the_end()
    for number, focus in (("4", "comparison-table"), ("3", "live"), ("1", "implementations"), ("2", "axis-batch")):
        await stage.press(number)
        await stage.pilot.pause()
        assert stage.app.focused.id == focus
    await stage.press("4")
    assert stage.find("#axis-batch", Slider).typed == "4"
    await stage.press("escape", "alt+5")
    await stage.pilot.pause()
    assert stage.app.focused.id == "log-view"
    stage.find("#axis-batch").focus()
    await stage.press("pound_sign")  # alt+3 of terminals that send escape and the digit
    await stage.pilot.pause()
    assert stage.app.focused.id == "live"


@pytest.mark.slow
async def test_a_number_brings_a_hidden_pane_back(stage):
    stage.find("#live").focus()
    await stage.press("Z")
    assert not stage.find("#live").display
    await stage.press("4", "3")
    await stage.pilot.pause()
    assert stage.find("#live").display and stage.app.focused.id == "live"


@pytest.mark.slow
async def test_up_and_down_go_between_controls_as_between_rows(stage):
    stage.find("#axis-batch").focus()
    await stage.press("j", "down")
    assert stage.app.focused.id == "axis-head_dim"
    await stage.press("k", "up", "up")
    assert stage.app.focused.id == "axis-batch"  # the first; up does not leave the pane


@pytest.mark.thorough
async def test_jump_mode_labels_all_that_can_be_reached(stage):
    await stage.press("semicolon")
    jump = stage.app.screen
    assert isinstance(jump, Jump)
    picker = stage.app.main.query_one(ImplementationPicker)
    row = next(spot for spot in jump.spots if (spot.x, spot.y) == (picker.region.x, picker.region.y + 3))
    reached = {(spot.x, spot.y) for spot in jump.spots}
    for name in ("axis-seq", "choice-mask", "live", "log-view"):
        region = stage.app.main.query_one(f"#{name}").content_region
        assert region.offset in reached, name
    await stage.press(row.letter)
    assert stage.app.screen is stage.app.main
    assert stage.app.focused is picker and picker._cursor == 2


@pytest.mark.thorough
@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("key", ["escape", "semicolon"])
async def test_jump_mode_closes_without_going_anywhere(stage, key):
    before = stage.app.focused
    await stage.press("semicolon", key)
    assert stage.app.screen is stage.app.main
    assert stage.app.main.focused is before


async def test_a_timer_that_is_late_when_it_starts_fires(monkeypatch):
    async with on_stage() as stage:
        fired, late = asyncio.Event(), itertools.count()
        with monkeypatch.context() as patched:
            patched.setattr(timer._time, "get_time", lambda: 0.02 * next(late))  # 20 ms pass between two readings
            stage.app.set_timer(1 / 120, fired.set)
            await asyncio.wait_for(fired.wait(), patient(5))
        assert stage.app.is_running


async def test_a_size_that_the_terminal_no_longer_has_is_left_out(monkeypatch):
    async with on_stage() as stage:
        stage.app.push_screen(Scaling())
        await stage.pilot.pause()
        for screen in (stage.app.main, stage.app.screen):
            laid_out = []
            monkeypatch.setattr(screen, "_screen_resized", laid_out.append)
            for size in (Size(40, 10), stage.app.size):
                screen.post_message(events.Resize(size, size))
                await stage.pilot.pause()
            assert {*laid_out} == {stage.app.size}  # a screen below another one is laid out with that too


def places(stage):
    """Where each named widget of the screen is, and how the screen lies over the one below."""
    screen = stage.app.screen
    seen = {f"{type(each).__name__} {each.id}": each.region for each in screen.walk_children() if each.id}
    return type(screen).__name__, screen.styles.background, screen.styles.align, seen


async def opened(stage, key):
    """Open a screen by its key, wait until what fills it has ended, and return its places."""
    await stage.press(key)
    await stage.settle(lambda: stage.app.screen is not stage.app.main)
    await stage.settle(lambda: not any(worker.node is stage.app.screen for worker in stage.app.workers))
    await stage.pilot.pause()
    return places(stage)


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        ((120, 40), ("g", "C")),
        thorough((80, 24), ("m", "question_mark", "semicolon", "ctrl+p", "w", "I", "h", "D")),
        slow((120, 40), ("C", "g", "m", "f", "a", "h", "p", "D", "w", "I", "question_mark", "semicolon", "ctrl+p")),
    ],
)
async def test_no_screen_moves_what_another_shows(size, keys, monkeypatch):
    monkeypatch.setattr(Doctor, "action_again", lambda _: None)  # how far it has come is a matter of time
    first = {}
    for key in keys:
        async with on_stage(size=size) as stage:
            first[key] = await opened(stage, key)
    async with on_stage(size=size) as stage:
        main = places(stage)
        for key in (*keys, *keys):
            assert await opened(stage, key) == first[key], key
            await stage.press("escape")
            await stage.settle(lambda: stage.app.screen is stage.app.main)
            assert places(stage) == main, key
