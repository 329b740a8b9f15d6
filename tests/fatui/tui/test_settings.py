"""The config file, the state restored at the next start, and sizes."""

import pytest
from textual.css.stylesheet import Stylesheet

from fatui.storage import settings
from fatui.tui import actions
from fatui.tui.screens.dialogs import Help
from fatui.tui.widgets.slider import Slider
from tests.support.marks import slow, thorough
from tests.support.stage import on_stage


def config(text):
    path = settings.config_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)


async def test_keys_are_other_ones_where_the_config_file_says_so():
    config("[keys]\nrun = 'f5'\nhelp = 'f1'\n")
    async with on_stage() as stage:
        assert "f5 Run" in stage.seen()
        await stage.press("r")
        assert stage.app.session is None
        await stage.press("f5")
        assert stage.app.session is not None
        await stage.press("f1")
        assert isinstance(stage.app.screen, Help)


@pytest.mark.thorough
async def test_config_errors_are_all_reported_and_the_rest_applies():
    config("theme = 'gruvbx'\nascii = 3\ncolour = 1\n[keys]\nrnu = 'r'\nrun = 7\nstop = 'f6'\n")
    async with on_stage() as stage:
        reported = stage.app.journal.text()
        for part in (
            "did you mean 'gruvbox'",
            "ascii: got 3",
            "colour: no such setting",
            "keys.rnu",
            "keys.run: got 7",
        ):
            assert part in reported
        assert stage.app.keys["stop"] == "f6"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["theme = [", slow("\xff\xfe"), slow("keys = 3"), slow("[keys]\nrun='a'\nstop='a'")])
async def test_the_app_starts_with_a_config_file_that_is_no_toml(text):
    config("")
    settings.config_path().write_bytes(text.encode("latin-1"))
    async with on_stage() as stage:
        assert "config.toml" in stage.app.journal.text()


@pytest.mark.slow
async def test_layout_theme_and_workload_come_back():
    async with on_stage() as stage:
        stage.find("#axis-seq", Slider).focus()
        await stage.press("end")
        stage.app.theme = "nord"
        stage.find("#log-view").focus()
        await stage.press("Z")
        stage.find("#comparison").order_by("path", True)
        await stage.press("q")
        await stage.settle(lambda: stage.app._exit)

    async with on_stage() as stage:
        assert stage.app.draft.axes["seq"] == (131_072,)
        assert stage.app.theme == "nord"
        assert stage.app.main.hidden == ["log"]
        assert (stage.app.remembered.sort, stage.app.remembered.descending) == ("path", True)


@pytest.mark.thorough
async def test_a_damaged_state_file_is_reported_and_replaced():
    path = settings.state_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"draft": {"axes": 3}}')
    async with on_stage() as stage:
        assert "the app starts with its defaults" in stage.app.journal.text()


@pytest.mark.slow
async def test_a_folder_that_cannot_be_written_costs_the_layout_only(monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    async with on_stage() as stage:
        monkeypatch.setattr("fatui.storage.write_atomically", full)
        await stage.press("q")
        await stage.settle(lambda: stage.app._exit)
        assert "No space left on device" in stage.app.farewell


@pytest.mark.slow
async def test_below_60_by_16_it_says_what_it_needs_and_comes_back():
    async with on_stage(size=(59, 15)) as stage:
        assert "fatui needs 60 x 16 characters" in stage.seen() and "59 x 15" in stage.seen()
        await stage.pilot.resize_terminal(80, 24)
        await stage.settle(lambda: "[Set up]" in stage.seen())
        await stage.pilot.resize_terminal(120, 40)
        await stage.settle(lambda: "4 Home" in stage.seen() and "[Set up]" not in stage.seen())


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize(
    "size", [(60, 16), (80, 24), slow((100, 30)), slow((110, 32)), slow((120, 40)), slow((300, 100))]
)
async def test_every_size_shows_the_sliders_and_the_keys(size):
    async with on_stage(size=size) as stage:
        assert "r Run" in stage.seen()
        assert size[1] < 20 or "K/V heads" in stage.seen()


@pytest.mark.slow
async def test_a_narrow_terminal_follows_the_run_through_its_tabs():
    async with on_stage(size=(80, 24)) as stage:
        await stage.press("r")
        await stage.pilot.pause()
        assert "[Live]" in stage.seen()
        stage.engine.play()
        stage.engine.end()
        await stage.settle(lambda: "[Results]" in stage.seen())
        await stage.press("right_square_bracket")
        assert "[Log]" in stage.seen()


@pytest.mark.parametrize(("size", "times"), [((80, 24), 1), thorough((120, 40), 0)])
async def test_a_tab_restyles_the_screen_at_most_once(monkeypatch, size, times):
    async with on_stage(size=size) as stage:
        restyled, update = [], Stylesheet.update_nodes

        def count(stylesheet, nodes, **options):
            restyled.append(stage.app.main in (nodes := list(nodes)))
            update(stylesheet, nodes, **options)

        monkeypatch.setattr(Stylesheet, "update_nodes", count)
        stage.app.main.open_tab("log")
        assert sum(restyled) == times
        assert stage.app.main.tab == "log"


@pytest.mark.slow
async def test_ascii_draws_nothing_else():
    async with on_stage(ascii=True) as stage:
        await stage.run_to_the_end()
        assert stage.seen().replace("\n", "").isascii()


def test_every_action_has_its_own_key():
    keys = [action.key for action in actions.ACTIONS]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
async def test_configured_keys_of_screens_work_and_show_in_help():
    config("[keys]\npresets_delete = 'f8'\nhistory_delete = 'f8'\nback = 'f10'\npresets = 'f7'\n")
    async with on_stage() as stage:
        assert not stage.app.settings.problems
        await stage.press("f7")
        assert "f8 Delete" in stage.seen() and "f10 Back" in stage.seen()
        await stage.press("d")
        assert "is bundled" not in stage.app.journal.text()
        await stage.press("f8")
        assert "is bundled" in stage.app.journal.text()
        await stage.press("question_mark")
        assert "f8            Delete one of your own" in stage.seen()
        assert "f10, f7       Go back" in stage.seen()
        await stage.press("f10")
        assert not isinstance(stage.app.screen, Help)
        await stage.press("f7")
        assert stage.app.screen is stage.app.main


@pytest.mark.slow
async def test_a_key_that_two_actions_of_one_screen_have_is_reported():
    config("[keys]\npresets_undo = 'f8'\nhistory_undo = 'f8'\nquit = 'f8'\n")
    async with on_stage() as stage:
        assert "keys.quit: 'f8' is also the key of presets_undo" in stage.app.journal.text()
        assert "keys.history_undo" not in stage.app.journal.text()
