"""The model screens: setup, live view, storage, export, and reopening from the history."""

import json
from pathlib import Path

import pytest
from msgspec import structs
from textual.widgets import Input, OptionList

from attention.core import events as on
from fatui.storage.history import RunHistory
from fatui.tui.screens.dialogs import RowDetails
from fatui.tui.screens.history import History as HistoryScreen
from fatui.tui.screens.models import FineTunings, Models
from fatui.tui.widgets.choice import Choice, Toggles
from fatui.tui.widgets.row_table import RowTable
from tests.support.stage import has_ended, on_stage, play_generation, play_iterations, play_tuning


async def finish(stage, screen):
    await stage.end()
    assert screen in stage.app.runs.model_reports
    stage.app.screen._show()
    await stage.pilot.pause()


async def test_what_cannot_run_says_why_where_its_cost_would_stand(stage):
    await stage.press("m")
    stage.find("#layers", Choice).focus()
    await stage.press("1", "enter")
    assert "cannot run: layers: got 1; it takes a whole number from 2" in stage.seen()
    await stage.press("2", "enter")
    assert "cannot run" not in stage.seen()


async def test_a_model_is_set_up_run_shown_kept_and_exported(stage, monkeypatch):
    await stage.press("m")
    assert isinstance(stage.app.screen, Models)
    stage.find("#prompt", Choice).focus()
    await stage.press("1", "2", "8")
    stage.find("#layers", Choice).focus()
    await stage.press("right", "r")
    plan = stage.engine.record.plan
    assert [(case.phase, case.prompt, case.measured_layers) for case in plan.cases] == [
        ("prefill", 128, 2),
        ("decode", 128, 2),
    ]
    assert "--layers 2" in stage.app.runs.models["models"].command
    play_generation(stage.engine)
    stage.app.screen._show()
    await stage.pilot.pause()
    assert "tokens/s" in stage.seen() and "poc" in stage.seen()
    await finish(stage, "models")
    assert "estimated from 2 of 22 layers" in stage.seen()
    assert "2.00 ±" in stage.seen()
    stage.app.screen._tick()
    drawn = []
    monkeypatch.setattr(Models, "_show", drawn.append)
    stage.app.screen._tick()
    assert not drawn, "a finished run is drawn once"
    assert RunHistory().get("last").models[0].rows[0].attention_share.value > 0.5
    await stage.press("e")
    await stage.press("enter")
    await stage.settle(lambda: list(Path().glob("*.json")))
    (path,) = Path().glob("*.json")
    assert len(json.loads(path.read_text())["models"]) == 2


@pytest.mark.thorough
async def test_fine_tuning_shows_loss_curves_beside_rates(stage):
    await stage.press("f")
    assert isinstance(stage.app.screen, FineTunings)
    await stage.press("r")
    stage.engine.begin()
    stage.engine.tell(on.CaseStarted(case=0), on.ReferenceChosen(case=0, implementation="baseline"))
    stage.app.screen._show()
    await stage.pilot.pause()
    assert "0 to 0.00" not in stage.seen(), "no scale before a loss"
    play_iterations(stage.engine, ["baseline", "mlx"], 6)
    stage.app.screen._show()
    await stage.pilot.pause()
    rows = [line for line in stage.seen().splitlines() if line.count("baseline") >= 2]
    assert any("4.500" in line and "5.750" in line and "20." in line for line in rows)
    assert "waiting" in stage.seen()
    play_iterations(stage.engine, ["practical", "poc", "demo", on.REPEATED_REFERENCE], 6)
    stage.engine.tell(on.CaseDone(case=0, stopped_by="iterations"), on.RunDone())
    await finish(stage, "finetuning")
    assert "5.750 → 4.500" in stage.seen()


@pytest.mark.slow
async def test_a_run_goes_on_without_its_screen_and_blocks_others(stage):
    await stage.press("f", "r")
    await stage.press("escape")
    assert stage.app.screen is stage.app.main
    stage.app.main._tick()
    await stage.pilot.pause()
    status = stage.seen().splitlines()
    assert "tinyllama-1.1b runs" in status[0] and "x Stop" in status[-1]
    await stage.press("r")
    assert stage.app.session is None, "one run at a time"
    play_tuning(stage.engine)
    await stage.end()
    await stage.press("f")
    assert "fastest" in stage.seen()


@pytest.mark.slow
async def test_stopping_keeps_what_was_measured(stage):
    await stage.press("f", "r")
    stage.engine.begin()
    stage.engine.tell(on.CaseStarted(case=0), on.ReferenceChosen(case=0, implementation="baseline"))
    play_iterations(stage.engine, ["baseline"], 5)
    await stage.press("x")
    await stage.settle(lambda: has_ended(stage.app))
    kept = RunHistory().get("last")
    assert kept.run.interrupted
    assert len(kept.fine_tunings[0].rows[0].losses) == 5


@pytest.mark.slow
async def test_reopening_the_screen_restores_its_choices(stage):
    await stage.press("m")
    stage.find("#model", Choice).focus()
    await stage.press("right")
    stage.find("#implementations", Toggles).focus()
    await stage.press("right", "space")
    await stage.press("escape", "m")
    assert stage.find("#model", Choice).value == "qwen2.5-1.5b"
    assert stage.find("#implementations", Toggles).chosen == ("baseline", "practical", "poc", "demo")


@pytest.mark.slow
async def test_a_models_folder_is_accepted_and_another_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    fields = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(fields))
    async with on_stage() as stage:
        await stage.press("m", "n")
        stage.find("#folder", Input).value = str(tmp_path)
        await stage.press("enter")
        assert "cannot be read" in stage.app.journal.text()
        stage.find("#folder", Input).value = str(tmp_path / "mine")
        await stage.press("enter")
        assert stage.find("#model", Choice).value == str(tmp_path / "mine")
        await stage.press("r")
        assert stage.engine.record.plan.cases[0].layers == 3


@pytest.mark.slow
async def test_a_model_says_how_long_it_takes_before_its_rounds(stage):
    await stage.press("m", "r")
    stage.engine.begin()
    stage.engine.tell(
        on.CaseStarted(case=0),
        on.CaseTimeEstimated(case=0, seconds=2520, implementations=5),
        on.Progress(done=0.1, remaining_s=32, now="timing two layers"),
    )
    stage.app.screen._show()
    await stage.pilot.pause()
    seen = stage.seen()
    assert "about 42 min 00 s for 5 implementations" in seen
    assert "42 min 00 s left" in seen and "32 s left" not in seen


@pytest.mark.thorough
async def test_what_cannot_run_is_reported(stage):
    await stage.press("m")
    stage.find("#layers", Choice).focus()
    await stage.press("1", "r")
    assert "layers: got 1" in stage.app.journal.text()
    assert "models" not in stage.app.runs.models


@pytest.mark.slow
async def test_a_model_of_the_history_opens_on_its_own_screen(stage):
    await stage.press("m", "r")
    play_generation(stage.engine)
    await finish(stage, "models")
    await stage.press("escape")
    stage.app.runs.models.clear()
    stage.app.runs.model_reports.clear()
    await stage.press("h")
    assert isinstance(stage.app.screen, HistoryScreen)
    await stage.settle(lambda: stage.find(RowTable).key is not None)  # the runs are read in a thread
    await stage.press("enter")
    await stage.settle(lambda: isinstance(stage.app.screen, Models))
    assert "prefill" in stage.seen()


@pytest.mark.slow
async def test_cache_formats_have_groups_that_fit_the_model():
    async with on_stage() as stage:
        await stage.press("m")
        model, formats = stage.find("#model", Choice), stage.find("#kv_format", Choice)
        formats.focus()
        await stage.press("right")
        assert formats.value == "int8"
        model.focus()
        await stage.press("end")
        assert (model.value, formats.value) == ("tiny-llama", "int8:32")
        formats.focus()
        await stage.press("4", "r")
        assert "do not divide the heads of tiny-llama" in stage.app.journal.text()
        await stage.press("4", ":", "3", "2", "r")
        assert [case.kv_format for case in stage.engine.record.plan.cases] == ["int4:32", "int4:32"]
        assert stage.app.runs.models["models"].command.endswith(
            "--kv-format int4:32 --impl baseline,mlx,practical,poc,demo --seconds 10"
        )
        play_generation(stage.engine)
        await finish(stage, "models")
        assert "K/V int4:32" in stage.seen()


@pytest.mark.thorough
async def test_a_model_is_measured_on_several_devices(stage):
    await stage.press("m")
    devices = stage.find("#ranks", Choice)
    known = stage.app.advice.device
    stage.app.advice.device = structs.replace(known, backend="metal")
    stage.app.screen._show()
    assert not devices.display  # of one device there is nothing to choose
    stage.app.advice.device = structs.replace(known, backend="cuda", count=4)
    stage.app.screen._show()
    await stage.pilot.pause()
    assert devices.options == ("1", "2", "3", "4")
    devices.focus()
    await stage.press("right", "r")
    assert {case.ranks for case in stage.engine.record.plan.cases} == {2}
    assert "--ranks 2" in stage.app.runs.models["models"].command


def texts(table, column):
    return [line.cells[column] for line in table.lines if line.key]


@pytest.mark.slow
async def test_the_table_of_a_model_is_filtered_and_opened(stage):
    await stage.press("m", "r")
    play_generation(stage.engine)
    await finish(stage, "models")
    table = stage.find("#model-rows", RowTable)
    assert table.has_focus and "★ best" in stage.seen()
    await stage.press("o")
    titles = [str(option.prompt).rstrip(" ▼") for option in stage.find(OptionList).options]
    assert {"as measured", "tokens/s", "time", "speedup", "attention", "verdict"} <= set(titles)
    assert "memory" not in titles, "no row has a figure of it"
    stage.find(OptionList).highlighted = titles.index("tokens/s")
    await stage.press("enter")
    assert texts(table, "implementation")[:2] == ["poc", "demo"]
    table.go_to("1:mlx")
    await stage.press("b")
    assert "0.800" in texts(table, "speedup")[-1] and "over mlx" in str(stage.find("#table-pane").border_subtitle)
    head = str(stage.find("#verdict-head").content)
    assert "x mlx" in head and "baseline" not in head
    await stage.press("enter")
    assert isinstance(stage.app.screen, RowDetails) and "1 over mlx" in stage.seen()
    await stage.press("escape", "slash", *"decode", "enter")
    assert {line.key[0] for line in table.lines if line.key} == {"1"}
    await stage.press("escape")
    assert len(texts(table, "speedup")) == 10
    await stage.press("right_square_bracket")
    assert stage.find("#model").has_focus


@pytest.mark.slow
async def test_a_row_of_a_fine_tuning_opens_with_its_losses(stage):
    await stage.press("f", "r")
    play_tuning(stage.engine)
    await finish(stage, "finetuning")
    await stage.press("down", "enter")
    assert isinstance(stage.app.screen, RowDetails)
    assert "5.750 → 3.000" in stage.seen() and "of an iteration" in stage.seen()


@pytest.mark.slow
async def test_on_a_short_terminal_the_table_replaces_the_setup():
    async with on_stage(size=(80, 24)) as stage:
        await stage.press("m", "r")
        play_generation(stage.engine)
        await finish(stage, "models")
        assert not stage.find("#setup-pane").display and "] shows what is set up" in stage.seen()
        assert all(name in stage.seen() for name in ("1. tinyllama", "2. tinyllama", "★ best"))
        await stage.press("right_square_bracket")
        assert stage.find("#model").has_focus and stage.find("#setup-pane").display
