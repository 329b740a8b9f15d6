"""Runs: from their start to their end, and everything that can break."""

import asyncio
import sqlite3
import time

from stage import on_stage

from attention import events as on
from fatui import paths
from fatui.history import History
from fatui.screens.question import Question
from fatui.widgets.log_view import LogView
from fatui.widgets.row_table import RowTable


def test_a_run_fills_the_table_says_its_finding_and_is_kept():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        stage.engine.rounds(4)
        stage.app.main.show_run()
        await stage.pilot.pause()
        assert "CPU kernel avx512" in stage.seen()
        stage.engine.rounds()
        stage.engine.end_case()
        stage.engine.tell(on.RunDone())
        stage.engine.end()
        await stage.settle(lambda: "poc is 49" in stage.seen())
        assert stage.app.session.phase == "done"
        await stage.settle(lambda: len(History().runs()) == 1)
        assert not History().runs()[0].interrupted

    on_stage(play)


def test_stop_keeps_what_was_measured():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        stage.engine.rounds(6)
        await stage.press("x")
        await stage.settle(lambda: stage.app.report is not None)
        assert stage.app.session.phase == "stopped"
        assert len(stage.app.report.cases[0].rows) == 4
        assert stage.app.report.run.interrupted

    on_stage(play)


def test_quit_in_mid_run_asks_once_and_stay_goes_on():
    async def play(stage):
        await stage.press("r", "q")
        assert isinstance(stage.app.screen, Question)
        await stage.press("n")
        assert stage.app.runs.active
        await stage.press("q", "y")
        await stage.settle(lambda: not stage.app.is_running or not stage.app.runs.active)
        assert stage.engine.stopped

    on_stage(play)


def test_quit_without_a_run_does_not_ask():
    async def play(stage):
        await stage.press("q")
        await stage.settle(lambda: stage.app._exit)
        assert stage.app._exit

    on_stage(play)


def test_a_second_start_is_refused_in_words():
    async def play(stage):
        await stage.press("r", "r")
        assert "a run goes on" in stage.app.journal.text()

    on_stage(play)


def test_a_silent_engine_is_told_once_and_in_the_status():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.clock.at += 31
        for _ in range(3):
            stage.app.main._tick()
        await stage.pilot.pause()
        assert "engine silent for 31 s; x stops it" in stage.seen()
        assert stage.app.journal.text().count("has been silent") == 1

    on_stage(play)


def test_an_implementation_that_dies_costs_its_row_only():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        reason = "killed by signal 9 (SIGKILL)"
        stage.engine.tell(on.RowEnded(case=0, implementation="poc", status="failed", reason=reason))
        stage.engine.rounds()
        stage.engine.end_case()
        stage.engine.tell(on.RunDone())
        stage.engine.end()
        await stage.settle(lambda: "done, 0 s · 1 error, see the log" in stage.seen())
        assert "failed" in stage.seen()
        assert [row.status for row in stage.app.report.cases[0].rows] == ["ok", "failed", "ok", "ok"]

    on_stage(play)


def test_a_driver_that_breaks_leaves_the_app_and_the_rows():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        stage.engine.rounds(5)
        stage.engine.breaks_with = KeyError("no such implementation")
        stage.engine.end()
        await stage.settle(lambda: stage.app.report is not None)
        assert stage.app.session.phase == "failed"
        assert "the engine's driver broke: KeyError" in stage.app.journal.text()

    on_stage(play)


def test_a_run_that_is_refused_says_why():
    async def play(stage):
        await stage.press("r")
        stage.engine.tell(on.RunRefused(kind="no backend", reason="MLX is not installed"))
        stage.engine.end()
        await stage.settle(lambda: not stage.app.runs.active)
        await stage.pilot.pause()
        assert "nothing could run: MLX is not installed" in stage.seen()

    on_stage(play)


def test_a_history_of_a_newer_version_is_told_and_the_report_stays():
    async def play(stage):
        folder = paths.data_dir()
        folder.mkdir(parents=True)
        with sqlite3.connect(folder / "history.sqlite") as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
        await stage.run_to_the_end()
        await stage.settle(lambda: "newer fatui" in stage.app.journal.text())
        assert stage.app.report is not None
        await stage.press("h")
        await stage.settle(lambda: "made by a newer fatui" in " ".join(stage.seen().split()))

    on_stage(play)


def test_the_last_run_teaches_how_long_the_next_takes():
    async def play(stage):
        assert "run will tell how" in stage.seen()
        await stage.run_to_the_end()
        await stage.settle(lambda: stage.app.remembered.pace.device == "Test CPU")
        stage.app.main.show_draft()
        assert "going by the" in stage.seen()

    on_stage(play)


def test_a_sweep_has_a_block_a_case_and_a_mean():
    async def play(stage):
        stage.app.set_draft(stage.app.draft.toggle_sweep().set_axis("seq", (64, 128)))
        await stage.run_to_the_end()
        seen = stage.seen()
        assert "Geometric mean of the speedups, 2 cases complete" in seen
        assert "1. B=1 L=64" in seen
        assert stage.find("#comparison-table", RowTable).lines[-1].key == "1:demo"

    on_stage(play)


def test_sorting_goes_through_columns_and_reverses():
    async def play(stage):
        await stage.run_to_the_end()
        table = stage.find("#comparison-table", RowTable)

        def names():
            return [line.cells["implementation"] for line in table.lines]

        stage.app.main._sort("tokens/s", True)
        assert names() == ["poc", "demo", "practical", "baseline"]
        await stage.press("O")
        assert names() == ["baseline", "practical", "demo", "poc"]

    on_stage(play)


def test_the_best_rows_have_a_star_also_without_colour():
    async def play(stage):
        await stage.run_to_the_end()
        row = next(line for line in stage.seen().splitlines() if "CPU kernel avx512" in line and "★" in line)
        assert "49" in row

    on_stage(play)


def test_a_log_of_100_000_lines_keeps_its_place_when_scrolled_up():
    async def play(stage):
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
        began = time.perf_counter()
        for number in range(100_000):
            stage.app.journal.write(f"more {number}")
        view.update_lines()
        assert time.perf_counter() - began < 3
        assert len(view._lines) <= 10_000
        view.action_follow()
        await stage.settle(lambda: "more 99999" in stage.seen())

    on_stage(play)


def test_a_broken_line_of_the_engine_is_told_and_the_run_goes_on():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        stage.engine.tell(on.Message(level="warning", text="a line of the engine could not be read: {[/broken"))
        stage.app.main.show_run()
        await stage.pilot.pause()
        assert "warning: a line of the engine could not be read: {[/broken" in stage.seen()
        stage.engine.rounds()
        stage.engine.end_case()
        stage.engine.tell(on.RunDone())
        stage.engine.end()
        await stage.settle(lambda: stage.app.report is not None)
        assert [row.status for row in stage.app.report.cases[0].rows] == ["ok"] * 4
        assert stage.app.journal.errors == 0

    on_stage(play)


def test_while_a_kernel_is_compiled_it_says_so_and_its_silence_is_no_alarm():
    async def play(stage):
        await stage.press("r")
        stage.engine.begin()
        stage.engine.begin_case()
        stage.engine.tell(on.StepStarted(case=0, implementation="poc", step="build"))
        stage.engine.tell(on.Progress(done=0.4, remaining_s=3, now="poc: build"))
        stage.clock.at += 48
        stage.app.main._tick()
        await stage.pilot.pause()
        seen = stage.seen()
        assert "compiling poc, 48 s so far" in seen and "being compiled" in seen and "compiling poc · 48 s" in seen
        assert "silent" not in seen
        stage.engine.begin_case()
        stage.app.main._tick()
        await stage.pilot.pause()
        assert "case 1 begins anew" in stage.app.journal.text() and "compiling" not in stage.seen()
        assert stage.app.session.once_s == 48

    on_stage(play)


def test_the_log_is_filtered_paused_and_goes_on():
    async def play(stage):
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

    on_stage(play)


def test_an_engine_that_does_not_heed_a_stop_is_killed():
    async def play(stage):
        await stage.press("r")
        process = await asyncio.create_subprocess_exec("sh", "-c", "trap '' TERM; sleep 60", start_new_session=True)
        stage.engine.process_id = process.pid
        stage.engine.stop = lambda: None
        began = time.perf_counter()
        await stage.press("x")
        assert await process.wait() == -9
        assert time.perf_counter() - began < 1.5
        stage.engine.end()
        await stage.settle(lambda: not stage.app.runs.active)

    on_stage(play)
