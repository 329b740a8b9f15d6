"""Hostile runs and presets on every screen: their text is shown, and neither markup nor escape codes take effect."""

import pytest

from attention.core import events as on
from fatui import storage
from fatui.storage import settings
from fatui.storage.history import RunHistory
from fatui.tui.screens.history import History
from fatui.tui.widgets.row_table import RowTable
from tests.support import hostile
from tests.support.marks import slow
from tests.support.stage import on_stage


async def look(stage, *keys, shows=""):
    """Press keys, wait until a text is visible, and check that no control character is."""
    await stage.press(*keys)
    await stage.settle(lambda: shows in stage.seen())
    seen = stage.seen()
    assert shows in seen
    assert not hostile.unsafe_in(seen)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["shapes", slow("model"), slow("finetune")])
async def test_every_screen_shows_a_hostile_run(kind):
    for number in (1, 2):
        RunHistory().add(hostile.report(kind, f"run{number}"))
    async with on_stage() as stage:
        await stage.press("h")
        await stage.settle(lambda: len(stage.find("#runs", RowTable).lines) == 2)
        await look(stage, shows="[/x]")
        await look(stage, "right", "right", "right")
        await stage.press("space", "down", "c")
        await stage.settle(lambda: "tokens/s before" in stage.seen())
        await look(stage, shows="[/x][b]")
        await look(stage, "right", "right")
        await look(stage, "escape", "enter")
        await stage.settle(lambda: not isinstance(stage.app.screen, History))
        await look(stage, shows="[/x]")
        if kind == "shapes":
            stage.find("#comparison-table", RowTable).focus()
            for _ in range(3):
                await look(stage, "right")
            await look(stage, "down", "enter")
            await look(stage, "escape", "g")
            await look(stage, "a", "l")
        await look(stage, "escape", "e")
        await look(stage, "escape", "question_mark")


@pytest.mark.thorough
async def test_hostile_presets_settings_and_messages_are_shown():
    folder = storage.own_presets()
    folder.mkdir(parents=True)
    (folder / "a.toml").write_text(hostile.PRESET)
    (folder / "b.toml").write_text(hostile.BROKEN_PRESET)
    settings.config_path().write_text('theme = "[/x]\\u001b"\n"[/y]\\u001b" = 1\n[keys]\nrun = "[/z]"\n')
    async with on_stage() as stage:
        await look(stage)
        await stage.press("p")
        await look(stage, "home", shows="a ")
        await look(stage, shows="[/x][b]\\x1b[2J")
        await look(stage, "down", shows="[workload]")
        await look(stage, "up", "enter", "w")
        await look(stage, "escape")
        stage.app.tell(hostile.TEXT, "error")
        await look(stage, shows="[/x]")
        await look(stage, "ctrl+p")
        await look(stage, "escape")


async def test_what_an_engine_says_is_shown():
    async with on_stage() as stage:
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        stage.engine.tell(on.Message(level="error", text=hostile.TEXT))
        stage.engine.tell(on.Progress(done=0.5, remaining_s=3, now=hostile.TEXT))
        stage.engine.tell(on.RowEnded(case=0, implementation="poc", status="failed", reason=hostile.TEXT))
        stage.app.main.show_run()
        await look(stage)
        stage.app.main.open_tab("log")
        await look(stage)
        stage.engine.finish()
        await stage.end()
        stage.find("#comparison-table", RowTable).focus()
        await look(stage, "down", "enter")
