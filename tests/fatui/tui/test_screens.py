"""The other screens, and the dialogs."""

import csv
import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from textual.command import CommandList
from textual.fuzzy import Matcher
from textual.screen import Screen
from textual.widgets import Input, Static

from attention.core.workload import Workload
from fatui import storage
from fatui.report.export import to_json
from fatui.storage import presets
from fatui.storage.history import RunHistory
from fatui.tui import actions, terminal
from fatui.tui.screens.base import AppScreen
from fatui.tui.screens.dialogs import RowDetails
from fatui.tui.screens.history import Compare
from fatui.tui.screens.main import MainScreen
from fatui.tui.view_models.row_details import hanging
from fatui.tui.widgets.bars import KeyBar
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.slider import Slider
from tests.support.sample_runs import compared, plan_of, report_of
from tests.support.stage import on_stage


async def save_as(stage, name):
    await stage.press("w")
    stage.find("#name", Input).value = ""
    await stage.press(*name, "enter")
    await stage.settle(lambda: stage.app.draft.title() == name)


@pytest.mark.thorough
async def test_a_preset_is_saved_and_loaded_again(stage):
    stage.find("#axis-seq", Slider).focus()
    await stage.press("end")
    await save_as(stage, "long-one")
    assert presets.load("long-one").cases[0].seq == 131_072
    assert stage.app.draft.title() == "long-one"
    await stage.press("home")
    assert stage.app.draft.title() == "long-one, changed"
    await stage.press("p")
    stage.find("#preset-list", RowTable).go_to("long-one")
    await stage.press("enter")
    await stage.settle(lambda: stage.app.draft.axes["seq"] == (131_072,))


@pytest.mark.slow
async def test_a_name_is_judged_while_it_is_typed(stage):
    await stage.press("w")
    verdict = stage.find("#verdict", Static)
    assert "a name is needed" in str(verdict.content)
    await stage.press(*"a b")
    assert "a name takes letters" in str(verdict.content)
    await stage.press("enter")
    assert not presets._files(storage.own_presets())
    stage.find("#name", Input).value = "quick"
    await stage.pilot.pause()
    assert "hides the bundled one" in str(verdict.content)


@pytest.mark.slow
async def test_presets_are_renamed_deleted_and_brought_back(stage):
    await save_as(stage, "mine")
    await stage.press("p")
    stage.find("#preset-list", RowTable).go_to("mine")
    await stage.press("n")
    stage.find("#rename", Input).value = "yours"
    await stage.press("enter")
    assert {path.stem for path in presets._files(storage.own_presets())} == {"yours"}
    await stage.press("d")
    assert not presets._files(storage.own_presets())
    await stage.press("u")
    assert {path.stem for path in presets._files(storage.own_presets())} == {"yours"}


@pytest.mark.slow
async def test_escape_leaves_the_renaming_before_the_screen(stage):
    await stage.press("p", "n", "escape")
    assert not stage.app.screen.query("#rename")
    assert stage.app.screen is not stage.app.main
    await stage.press("escape")
    assert stage.app.screen is stage.app.main


@pytest.mark.slow
async def test_bundled_presets_stay_and_broken_ones_are_shown(stage):
    folder = storage.own_presets()
    folder.mkdir(parents=True)
    (folder / "broken.toml").write_text("schema = 1\nsecnds = 3\n")
    await stage.press("p")
    stage.find("#preset-list", RowTable).go_to("broken")
    await stage.pilot.pause()
    assert "This preset has mistakes" in stage.seen() and "secnds" in stage.seen()
    await stage.press("enter")
    assert "has mistakes" in stage.app.journal.text()
    stage.find("#preset-list", RowTable).go_to("quick")
    await stage.press("d")
    assert "is bundled" in stage.app.journal.text()


@pytest.mark.slow
async def test_a_preset_given_at_the_start_is_loaded_and_run():
    async with on_stage(preset="seed-table", run=True) as stage:
        await stage.settle(lambda: stage.app.session is not None)
        assert stage.app.session.preset == "seed-table"
        assert stage.app.session.command == "fatui bench seed-table"
        assert len(stage.engine.record.cases) == 6


@pytest.mark.thorough
async def test_an_unknown_preset_is_reported_and_nothing_runs():
    async with on_stage(preset="quik", run=True) as stage:
        await stage.settle(lambda: "none named 'quik'" in stage.app.journal.text())
        assert stage.app.session is None


@pytest.mark.slow
async def test_a_preset_of_odd_cases_says_that_a_slider_leaves_them():
    async with on_stage(preset="seed-table") as stage:
        await stage.settle(lambda: stage.app.draft.preset == "seed-table")
        await stage.pilot.pause()
        assert "6 cases of the preset" in stage.seen()


async def test_past_runs_are_opened_compared_deleted_and_brought_back(stage):
    await stage.run_to_the_end()
    await stage.run_to_the_end(lambda case: {"poc": 2.0})
    assert len(RunHistory().runs()) == 2
    await stage.press("h")
    table = stage.find("#runs", RowTable)
    await stage.settle(lambda: len(table.lines) == 2)
    await stage.press("space", "down", "c")
    await stage.settle(lambda: "tokens/s before" in stage.seen())
    assert "0.50" in stage.seen()
    await stage.press("escape", "d")
    await stage.settle(lambda: len(table.lines) == 1)
    assert len(RunHistory().runs()) == 1
    await stage.press("u")
    await stage.settle(lambda: len(table.lines) == 2)
    (older,) = (run.id for run in RunHistory().runs() if run.id != stage.app.session.id)
    table.go_to(older)
    await stage.press("enter")
    await stage.settle(lambda: f"run {older} is open" in stage.seen())
    assert stage.app.session is None


@pytest.mark.thorough
async def test_scaling_draws_a_map_a_chart_and_names_crossovers(stage):
    draft = stage.app.draft.toggle_sweep().set_axis("seq", (64, 128, 256)).set_axis("batch", (1, 2))
    stage.app.set_draft(draft)
    await stage.run_to_the_end(lambda case: {"poc": 100.0} if case % 3 == 0 else None)
    await stage.press("g")
    seen = stage.seen()
    assert "tokens/s over batch" in seen
    await stage.press("a")
    seen = stage.seen()
    assert "Fastest, with its speedup over baseline: B baseline, P poc" in seen
    assert "╳" in seen and "poc overtakes" in seen
    assert "poc overtakes baseline between seq 64 and 128" in seen
    assert "logarithmic" in stage.seen()
    await stage.press("l", "i", "v")
    assert "from 0" in stage.seen() and "Speedup of poc over baseline" in stage.seen()


@pytest.mark.slow
async def test_scaling_over_random_blocks_names_the_break_even(stage):
    draft = stage.app.draft.toggle_sweep().set_choice("mask", ("blocks:1", "blocks:0.5", "blocks:0.1"))
    stage.app.set_draft(draft.set_axis("seq", (1280,)))
    await stage.run_to_the_end(lambda case: {"poc": (2.5, 1.0, 0.2)[case], "baseline": 1.0})
    await stage.press("g")
    seen = stage.seen()
    assert "time of random blocks / own dense time, over density" in seen
    assert "poc breaks even with dense at a density of about 0.83" in seen
    assert "baseline is faster than dense with random blocks at densities from 0.1 to 1" in seen
    await stage.press("a")
    assert "tokens/s over mask" in stage.seen()


@pytest.mark.slow
async def test_scaling_over_formats_names_those_that_gain(stage):
    formats = tuple(Workload(seq=256, kv_format=each) for each in ("none", "int4", "int8", "int3"))
    stage.app.runs.show_past(report_of(plan_of(formats)))
    await stage.press("g")
    seen = stage.seen()
    assert seen.index(" none ") < seen.index(" int8 ") < seen.index(" int4 ") < seen.index(" int3 "), "by bits"
    assert "poc gains most with int4, 2.5" in seen
    assert "it loses with int3" in seen


@pytest.mark.slow
async def test_scaling_without_a_sweep_says_how_to_get_one(stage):
    await stage.press("g")
    assert "No sweep yet" in stage.seen()


async def open_export(stage, folder):
    """Run to the end, and open the dialog for `out` in a folder."""
    await stage.run_to_the_end()
    await stage.press("e")
    stage.find("#folder", Input).value = str(folder)
    stage.find("#name", Input).value = "out"


async def test_export_writes_all_files_and_says_where(tmp_path):
    async with on_stage() as stage:
        await open_export(stage, tmp_path)
        await stage.press("enter")
        await stage.settle(lambda: "wrote out.md" in stage.app.journal.text())
    assert "| poc" in (tmp_path / "out.md").read_text()
    with (tmp_path / "out.csv").open() as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == ["baseline", "poc", "practical", "demo"]
    assert len(json.loads((tmp_path / "out.json").read_text())["cases"]) == 1
    picture = (tmp_path / "out.svg").read_text()
    assert "Comparison" in picture and "Export" not in picture.replace("&#160;Export", "")
    assert "case 1 of 1 complete" in (tmp_path / "out.log").read_text()


async def test_what_b_shows_is_what_is_exported_and_copied(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("fatui.tui.terminal.copy", lambda text: taken.append(text) or "xclip")
    async with on_stage() as stage:
        await stage.run_to_the_end()
        stage.find("#comparison-table", RowTable).go_to("0:practical")
        stage.find("#comparison-table").focus()
        await stage.press("b", "y", "c")
        await stage.settle(lambda: len(taken) == 2)
        shown = str(stage.find("#verdict-head", Static).content)
        await stage.press("e")
        stage.find("#folder", Input).value = str(tmp_path)
        stage.find("#name", Input).value = "out"
        await stage.pilot.pause()
        seen = " ".join(stage.seen().replace("│", " ").split())
        assert "speedups over practical; the JSON is the run as it was measured, over baseline" in seen
        await stage.press("enter")
        await stage.settle(lambda: "wrote out.md" in stage.app.journal.text())
        own = stage.app.report
    assert "x practical (" in shown and all(text.startswith(shown.partition(" · ")[0], 2) for text in taken[:1])
    for text in (*taken, (tmp_path / "out.md").read_text()):
        assert "x practical (" in text and "x baseline" not in text
    assert all("Speedups are relative to practical" in text for text in (taken[1], (tmp_path / "out.md").read_text()))
    with (tmp_path / "out.csv").open() as file:
        rows = {row["implementation"]: row for row in csv.DictReader(file)}
    assert {row["reference"] for row in rows.values()} == {"practical"} and float(
        rows["practical"]["speedup_value"]
    ) == 1
    assert "Speedup over practical" in (tmp_path / "out.html").read_text()
    assert json.loads((tmp_path / "out.json").read_text())["cases"][0]["reference"] == own.cases[0].reference


async def click(stage, words):
    """Click on words of the screen."""
    lines = stage.seen().split("\n")
    y = next(y for y, line in enumerate(lines) if words in line)
    await stage.pilot.click(offset=(lines[y].index(words) + 1, y))
    await stage.pilot.pause()


async def test_dialogs_end_by_a_click_on_their_edge(tmp_path):
    async with on_stage() as stage:
        await stage.run_to_the_end()
        for key, words in (("question_mark", "escape closes"), ("d", "escape closes"), ("o", "escape cancels")):
            await stage.press(key)
            await click(stage, words)
            assert stage.app.screen is stage.app.main, key
        await click(stage, "Save as")
        stage.find("#name", Input).value = "by-mouse"
        await stage.pilot.pause()
        await click(stage, "enter saves")
        await stage.settle(lambda: stage.app.draft.title() == "by-mouse")
        await click(stage, "Export")
        stage.find("#folder", Input).value = str(tmp_path)
        stage.find("#name", Input).value = "by-mouse"
        await stage.pilot.pause()
        await click(stage, "enter writes")
        await stage.settle((tmp_path / "by-mouse.md").exists)


@pytest.mark.slow
async def test_enter_on_the_choice_of_files_writes_them(tmp_path):
    async with on_stage() as stage:
        await open_export(stage, tmp_path)
        await stage.press("tab", "right")
        await stage.pilot.pause()
        assert str(stage.find("#outcome", Static).content) == f"writes {tmp_path}/out.md"
        await stage.press("enter")
        await stage.settle(lambda: "wrote out.md" in stage.app.journal.text())
    assert [path.name for path in tmp_path.glob("out.*")] == ["out.md"]


@pytest.mark.slow
async def test_the_preview_follows_a_filter(stage):
    await stage.press("p", "slash")
    stage.find(".filter", Input).value = "quick"
    await stage.settle(lambda: "Quick look" in str(stage.find("#preview", Static).content))
    assert str(stage.find("#preview", Static).content).startswith("Quick look")


@pytest.mark.slow
async def test_a_changed_bundled_preset_is_not_saved_under_its_words():
    async with on_stage() as stage:
        stage.app.load_preset("quick")
        await stage.press("w")
        assert stage.find("#title", Input).value == "Quick look"
        await stage.press("escape")
        stage.app.set_draft(stage.app.draft.set_axis("seq", (4096,)))
        await stage.press("w")
        assert not stage.find("#title", Input).value and not stage.find("#summary", Input).value


@pytest.mark.slow
async def test_an_export_that_fails_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "out.md").write_text("old")

    def full(path, text):
        raise OSError(28, "No space left on device")

    async with on_stage() as stage:
        await stage.run_to_the_end()
        monkeypatch.setattr("fatui.storage.write_atomically", full)
        await stage.press("e")
        stage.find("#name", Input).value = "out"
        await stage.press("enter")
        await stage.settle(lambda: "No space left on device" in stage.app.journal.text())
        monkeypatch.undo()
    assert (tmp_path / "out.md").read_text() == "old"


@pytest.mark.slow
async def test_export_judges_the_folder_while_it_is_typed(stage):
    await stage.run_to_the_end()
    await stage.press("e")
    stage.find("#folder", Input).value = "/no/such/folder"
    await stage.pilot.pause()
    assert "there is no folder /no/such/folder" in stage.seen()
    await stage.press("escape")
    assert not list(Path.cwd().glob("fatui-*"))


@pytest.mark.slow
async def test_export_without_a_run_says_so(stage):
    await stage.press("e")
    assert "nothing was run yet" in stage.app.journal.text()


@pytest.mark.slow
async def test_copy_claims_success_only_where_a_program_took_it(monkeypatch):
    taken = []
    async with on_stage() as stage:
        await stage.run_to_the_end()
        monkeypatch.setattr(terminal, "copy", lambda text: None)
        await stage.press("c")
        await stage.settle(lambda: "may or may not" in stage.app.journal.text())
        monkeypatch.setattr(terminal, "copy", lambda text: taken.append(text) or "pbcopy")
        await stage.press("c")
        await stage.settle(lambda: "the table is on the clipboard" in stage.app.journal.text())
        assert "| poc" in taken[0]


@pytest.mark.slow
async def test_a_row_opens_with_its_samples_and_its_command(stage):
    await stage.run_to_the_end()
    stage.find("#comparison-table", RowTable).focus()
    await stage.press("down", "enter")
    assert isinstance(stage.app.screen, RowDetails)
    seen = stage.seen()
    session = stage.app.session
    command = str(stage.app.screen.query(Static).last().render())
    assert f"--impl {','.join(session.plan.implementations)} --seconds {session.plan.seconds:g}" in command
    assert "of the best rate measured" in seen and "why poc" in seen
    await stage.press("escape")
    assert stage.app.screen is stage.app.main


@pytest.mark.thorough
async def test_help_lists_the_keys_of_the_screen_it_is_opened_on(stage):
    await stage.press("question_mark")
    assert "Run what is set up" in stage.seen()
    await stage.press("escape", "h")
    await stage.press("question_mark")
    assert "Mark the run for a comparison" in stage.seen()


async def test_the_palette_has_every_action(stage):
    titles = [command.title for command in stage.app.get_system_commands(stage.app.main)]
    assert len(titles) == len(set(titles)) == len(actions.ACTIONS)
    assert "Run (r)" in titles and "Quit (q)" in titles
    await stage.press("ctrl+p")
    await stage.press(*"sweep")
    found = stage.app.screen.query_one(CommandList)  # filled by a task
    await stage.settle(lambda: (first := found.highlighted_option) and first.hit.text.startswith("Sweep"))
    await stage.press("enter")
    await stage.settle(lambda: stage.app.draft.sweeping)


def subclasses(kind):
    return [each for found in kind.__subclasses__() for each in (found, *subclasses(found))]


def test_every_screen_is_one_of_the_apps_kind():
    modules = {name: name for name in ("dialogs", "jump", *actions.FURTHER)}
    for module in {**modules, "finetuning": "models", "compare": "history"}.values():
        import_module(f"fatui.tui.screens.{module}")
    ours = [each for each in subclasses(Screen) if each.__module__.startswith("fatui.tui.screens")]
    assert MainScreen in ours and [each for each in ours if not issubclass(each, AppScreen)] == []


@pytest.mark.thorough
@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("name", [None, "models"])
async def test_keys_pressed_before_a_dialog_is_gone_do_nothing(stage, name):
    if name:
        stage.app.action_open(name)
        await stage.pilot.pause()
    below = stage.app.screen
    await stage.press("o")
    dialog = stage.app.screen
    for _ in range(3):  # as keys do that were sent to it before it closed
        dialog.action_close()
    await stage.pilot.pause()
    assert stage.app.screen is below


@pytest.mark.thorough
async def test_a_run_is_compared_with_a_file_of_another_device(stage, tmp_path):
    before, after = compared(device="Apple M4")
    RunHistory().add(before)
    (tmp_path / "m4.json").write_text(to_json(after))
    await stage.press("h")
    await stage.settle(lambda: stage.find(RowTable).key is not None)
    await stage.press("f")
    stage.find("#file", Input).value = str(tmp_path / "none.json")
    await stage.press("enter")
    assert "none.json: cannot be read: No such file or directory" in stage.app.journal.text()
    stage.find("#file", Input).value = "~nobody-here/m4.json"
    await stage.press("enter")
    assert "~nobody-here/m4.json: cannot be read" in stage.app.journal.text()
    stage.find("#file", Input).value = str(tmp_path / "m4.json")
    await stage.press("enter")
    await stage.settle(lambda: isinstance(stage.app.screen, Compare))
    assert "The runs differ in device: AMD EPYC 9R14, then Apple M4" in stage.seen()


@pytest.mark.thorough
async def test_title_history_and_export_have_one_name(stage):
    await save_as(stage, "mine")
    await stage.run_to_the_end()
    assert stage.app.report.run.preset == stage.app.draft.title() == "mine"
    stage.app.set_draft(stage.app.draft.toggle_sweep().set_axis("batch", (1, 2)))
    await stage.press("r")
    assert stage.app.main._left_text().startswith("mine, changed · ")
    stage.engine.play()
    await stage.end()
    assert {line.preset for line in RunHistory().runs()} == {"mine", "mine, changed"}
    stage.app.run_again()
    assert (stage.app.draft.preset, stage.app.session.preset) == ("mine", "mine, changed")
    await stage.press("x")
    stage.engine.end()


@pytest.mark.thorough
async def test_a_run_saved_as_a_preset_goes_on_under_its_name(stage):
    await stage.run_to_the_end()
    await save_as(stage, "mine")
    await stage.press("+")
    assert stage.app.session.preset == stage.app.draft.title() == "mine"


def test_a_long_key_is_separated_from_its_words():
    assert hanging("  ctrl+c, super+c", "Copy", 16) == "  ctrl+c, super+c Copy"


@pytest.mark.parametrize("typed", ["color", "colour", "theme"])
def test_the_theme_is_found_by_its_colours(typed):
    (theme,) = (action for action in actions.ANYWHERE if action.name == "theme")
    assert Matcher(typed).match(theme.label) > 0


@pytest.mark.parametrize("key", ["q", "期期"])
async def test_a_click_on_the_key_bar_runs_what_is_drawn_there(stage, key):
    done = []
    bar = stage.find("#key-bar", KeyBar)
    bar.show(((key, "First", "first"), ("e", "Second", "second")))

    async def run(action):
        done.append(action)

    bar.run_action = run
    width = cell_len(key) + len("First") + 3
    for x in range(1, width + len("e Second") + 2):
        await stage.pilot.click(bar, offset=(x, 0))
        assert done.pop() == ("first" if x < width else "second"), x


async def test_a_click_does_not_hit_a_key_that_came_under_the_mouse(stage):
    done = []
    bar = stage.find("#key-bar", KeyBar)

    async def run(action):
        done.append(action)

    bar.run_action = run
    bar.show((("e", "Export", "export"),))
    await stage.pilot.mouse_down(bar, offset=(3, 0))
    bar.show((("q", "Quit", "quit"),))
    await bar.on_click(SimpleNamespace(x=3, chain=1))  # the pilot makes no click of a press and a release
    assert not done
    await stage.pilot.click(bar, offset=(3, 0))
    assert done == ["quit"]
