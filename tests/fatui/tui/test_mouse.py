"""The mouse, quicker than the app: clicks that are read at once."""

import pytest
from rich.cells import cell_len
from rich.style import Style
from textual import events
from textual.command import CommandList
from textual.geometry import Offset
from textual.widgets import Input, OptionList, Static

from fatui.tui.input_order import OrderedInput
from fatui.tui.screens.dialogs import RowDetails
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.slider import Slider


def click_at_once(app, x, y, times=2, button=1):
    """Hand clicks to the app at once, as it reads them while it is busy."""
    where = {"widget": None, "x": x, "y": y, "delta_x": 0, "delta_y": 0, "button": button}
    where |= {"shift": False, "meta": False, "ctrl": False}
    for _ in range(times):
        app.post_message(events.MouseDown(**where))
        app.post_message(events.MouseUp(**where))


@pytest.mark.parametrize("open_it", ["action_command_palette", "action_change_theme"])
async def test_a_double_click_outside_closes_a_palette_once(stage, open_it):
    getattr(stage.app, open_it)()
    await stage.settle(lambda: stage.app.screen.query(OptionList))
    click_at_once(stage.app, 0, 0)
    await stage.settle(lambda: stage.app.screen is stage.app.main)
    await stage.pilot.pause()
    assert stage.app.is_running


async def test_a_double_click_in_the_palette_runs_once(stage, monkeypatch):
    ran = []
    monkeypatch.setattr(type(stage.app), "action_leave", lambda app: ran.append("leave"))
    await stage.press("ctrl+p", *"quit")
    await stage.settle(lambda: stage.app.screen.query_one(OptionList).option_count)
    region = stage.app.screen.query_one(OptionList).content_region
    click_at_once(stage.app, region.x + 2, region.y)
    await stage.settle(lambda: stage.app.screen is stage.app.main)
    await stage.settle(lambda: ran)
    await stage.pilot.pause()
    assert ran == ["leave"]


async def test_a_palette_that_closed_searches_nothing(stage, monkeypatch):
    searched = []
    await stage.press("ctrl+p")
    palette = stage.app.screen
    monkeypatch.setattr(palette, "_gather_commands", searched.append)
    palette.dismiss()
    palette.post_message(Input.Changed(palette.query_one(Input), "sweep"))
    await stage.settle(lambda: not palette.is_attached)
    assert searched == []


async def test_a_click_on_a_command_that_has_gone_is_nothing(stage):
    await stage.press("ctrl+p")
    commands = stage.app.screen.query_one(CommandList)
    await stage.settle(lambda: commands.option_count)
    click = events.Click(commands, 1, 1, 0, 0, 1, False, False, False)
    click.style = Style(meta={"option": 3})
    commands.clear_options()
    commands.post_message(click)
    await stage.pilot.pause()
    assert stage.app.is_running


@pytest.mark.parametrize("name", ["ctrl+p", "o"])
async def test_a_list_in_a_tiny_terminal_raises_nothing(stage, name):
    if name == "o":
        await stage.run_to_the_end()
        await stage.press("4")
    await stage.press(name)
    await stage.settle(lambda: stage.app.screen.query_one(OptionList).option_count)
    for size in ((1, 1), (3, 2), (1, 40)):
        await stage.pilot.resize_terminal(*size)
        await stage.press("pagedown", "pageup")
    await stage.pilot.resize_terminal(120, 40)
    await stage.press("escape")
    assert stage.app.screen is stage.app.main


async def test_a_press_on_a_widget_that_has_gone_is_nothing(stage, monkeypatch):
    gone = Static("gone")
    monkeypatch.setattr(stage.app.main, "get_widget_and_offset_at", lambda x, y: (gone, Offset(0, 0)))
    click_at_once(stage.app, 30, 20)
    await stage.pilot.pause()
    assert stage.app.is_running


def place_of(app, words):
    """Return the first cell of some words on the screen."""
    for y, strip in enumerate(app.screen._compositor.render_strips()):
        if words in strip.text:
            return cell_len(strip.text[: strip.text.index(words)]), y
    raise AssertionError(words)


@pytest.mark.parametrize("words", ["? Help", "^p Palette", "w Save as", "p Presets", "Save as"])
async def test_a_double_click_opens_a_screen_once(stage, words):
    click_at_once(stage.app, *place_of(stage.app, words))
    await stage.settle(lambda: stage.app.screen is not stage.app.main and stage.app.screen.is_mounted)
    await stage.pilot.pause()
    assert len(stage.app.screen_stack) == 2


async def test_quick_clicks_open_a_row_once(stage):
    await stage.run_to_the_end()
    table = stage.find("#comparison-table", RowTable)
    click_at_once(stage.app, table.content_region.x + 2, table.content_region.y + 2, times=4)
    await stage.settle(lambda: isinstance(stage.app.screen, RowDetails))
    await stage.pilot.pause()
    assert len(stage.app.screen_stack) == 2


@pytest.fixture
def slow_double_clicks(monkeypatch):
    monkeypatch.setattr(OrderedInput, "CLICK_CHAIN_TIME_THRESHOLD", 60)


@pytest.mark.usefixtures("slow_double_clicks")
async def test_a_double_click_is_for_the_screen_it_began_on(stage):
    """The second click on what closes a dialog changes nothing below it."""
    slider = stage.find("#axis-seq", Slider)
    x, y, before = slider.region.right - 12, slider.region.y, slider.values
    await stage.press("question_mark")
    click_at_once(stage.app, x, y, times=1)
    await stage.pilot.pause()
    await stage.press("escape")
    click_at_once(stage.app, x, y, times=1)
    await stage.pilot.pause()
    assert slider.values == before
    click_at_once(stage.app, x + 1, y, times=1)
    await stage.pilot.pause()
    assert slider.values != before


@pytest.mark.usefixtures("slow_double_clicks")
async def test_a_double_click_on_run_does_not_stop_it(stage):
    at = place_of(stage.app, "r Run")
    click_at_once(stage.app, *at, times=1)
    await stage.settle(lambda: stage.app.runs.active and "x Stop" in stage.seen())
    assert place_of(stage.app, "x Stop") == at
    click_at_once(stage.app, *at, times=1)
    await stage.pilot.pause()
    assert stage.app.session.phase == "starting"


@pytest.mark.parametrize("button", [2, 3])
async def test_only_the_left_button_clicks(stage, button):
    """On everything that takes clicks: sliders, choices, links, the list, headings, rows, tabs and the key bar."""
    await stage.run_to_the_end()
    app, draft = stage.app, stage.app.draft
    seen, focused = stage.seen(), app.focused
    for y in range(app.size.height):
        for x in range(0, app.size.width, 7):
            click_at_once(app, x, y, button=button)
    await stage.pilot.pause()
    assert (app.draft, app.focused, app.screen, stage.seen()) == (draft, focused, app.main, seen)
