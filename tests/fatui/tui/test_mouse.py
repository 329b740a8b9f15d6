"""The mouse, quicker than the app: clicks that are read at once."""

import pytest
from rich.style import Style
from textual import events
from textual.command import CommandList
from textual.geometry import Offset
from textual.widgets import Input, OptionList, Static


def click_at_once(app, x, y, times=2):
    """Hand clicks to the app at once, as it reads them while it is busy."""
    where = {"widget": None, "x": x, "y": y, "delta_x": 0, "delta_y": 0, "button": 1}
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
