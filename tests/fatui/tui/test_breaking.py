"""Failures during a run, and events that only look like failures."""

import asyncio
import os
import sqlite3
import sys
import time

import pytest

from attention.core import events as on
from benchmarks.pty_app import PtyApp
from fatui import storage
from tests.support.patience import patient


async def test_a_silent_engine_is_reported_once_and_in_the_status(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.clock.at += 31
    for _ in range(3):
        stage.app.main._tick()
    await stage.pilot.pause()
    assert "engine silent for 31 s; x stops it" in stage.seen()
    assert stage.app.journal.text().count("has been silent") == 1


async def test_an_implementation_that_dies_costs_its_row_only(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    reason = "killed by signal 9 (SIGKILL)"
    stage.engine.tell(on.RowEnded(case=0, implementation="poc", status="failed", reason=reason))
    stage.engine.finish()
    await stage.end()
    seen = stage.seen()
    assert "done, 0 s · 1 error, see the log" in seen and "failed" in seen
    assert [row.status for row in stage.app.report.cases[0].rows] == ["ok", "failed", "ok", "ok"]


@pytest.mark.slow
async def test_a_driver_that_breaks_leaves_the_app_and_the_rows(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds(5)
    stage.engine.breaks_with = KeyError("no such implementation")
    stage.engine.end()
    await stage.settle(lambda: stage.app.report is not None)
    assert stage.app.session.phase == "failed"
    assert "the engine's driver failed: KeyError" in stage.app.journal.text()


@pytest.mark.thorough
async def test_a_run_that_is_refused_says_why(stage):
    await stage.press("r")
    stage.engine.tell(on.RunRefused(kind="no backend", reason="MLX is not installed"))
    stage.engine.end()
    await stage.settle(lambda: not stage.app.runs.active)
    await stage.pilot.pause()
    assert "nothing could run: MLX is not installed" in stage.seen()


@pytest.mark.slow
async def test_a_newer_history_is_reported_and_the_report_stays(stage):
    folder = storage.data_dir()
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "history.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    await stage.run_to_the_end()
    await stage.settle(lambda: "newer fatui" in stage.app.journal.text())
    assert stage.app.report is not None
    await stage.press("h")
    await stage.settle(lambda: "made by a newer fatui" in " ".join(stage.seen().split()))


@pytest.mark.thorough
async def test_a_broken_engine_line_is_reported_and_the_run_goes_on(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.tell(on.Message(level="warning", text="a line of the engine could not be read: {[/broken"))
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert "warning: a line of the engine could not be read: {[/broken" in stage.seen()
    stage.engine.finish()
    await stage.settle(lambda: stage.app.report is not None)
    assert [row.status for row in stage.app.report.cases[0].rows] == ["ok"] * 4
    assert stage.app.journal.errors == 0


@pytest.mark.thorough
async def test_compiling_is_shown_and_its_silence_is_no_alarm(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.tell(on.StepStarted(case=0, implementation="poc", step="build"))
    stage.engine.tell(on.Progress(done=0.4, remaining_s=3, now="poc: build"))
    stage.clock.at += 48
    stage.app.main._tick()
    await stage.pilot.pause()
    seen = stage.seen()
    assert "compiling poc, 48 s so far" in seen and "compiling poc · 48 s" in seen
    assert "silent" not in seen
    stage.engine.begin_case()
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert "case 1 is restarted" in stage.app.journal.text() and "compiling" not in stage.seen()
    assert stage.app.session.once_s == 48


@pytest.mark.thorough
async def test_an_engine_that_does_not_heed_a_stop_is_killed(stage):
    await stage.press("r")
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", "trap '' TERM; echo; sleep 60"), start_new_session=True, stdout=asyncio.subprocess.PIPE
    )
    assert await process.stdout.readline()  # from here on it ignores the signal
    stage.engine.process_id = process.pid
    stage.engine.stop = lambda: None
    began = time.perf_counter()
    await stage.press("x")
    assert await process.wait() == -9
    assert time.perf_counter() - began < patient(10)
    stage.engine.end()
    await stage.settle(lambda: not stage.app.runs.active)


@pytest.mark.thorough
def test_a_terminal_that_hangs_up_without_signal_ends_the_app():
    with PtyApp("sh", "-c", f"trap '' HUP; exec {sys.executable} -m fatui") as app:
        assert app.read(patient(20), until="Implementations") is not None
        os.close(app._file)
        app._file = -1
        end = time.monotonic() + patient(10)
        while time.monotonic() < end and not (ended := os.waitpid(app.pid, os.WNOHANG)[0]):
            time.sleep(0.05)
        app.pid = 0 if ended else app.pid
        assert ended


@pytest.mark.slow
async def test_a_failure_too_long_for_its_row_ends_in_an_ellipsis(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    reason = "the device ran out of memory while the kernel was loading its tiles, twice in a row"
    stage.engine.tell(on.RowEnded(case=0, implementation="poc", status="failed", reason=reason))
    stage.app.main.show_run()
    await stage.pilot.pause()
    line = next(line for line in stage.seen().splitlines() if "failed: the device" in line)
    assert "…" in line


@pytest.mark.slow
async def test_too_few_rounds_are_said_and_earn_nothing(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds(2)
    stage.app.main.show_run()
    await stage.pilot.pause()
    seen = stage.seen()
    assert "collecting 2 of 6" in seen
    assert "★" not in seen and "noise floor" not in seen and "fastest" not in seen


@pytest.mark.thorough
def test_the_app_does_not_draw_into_a_file(tmp_path):
    with PtyApp("sh", "-c", f"{sys.executable} -m fatui 2>{tmp_path / 'err'}") as app:
        assert app.ended(patient(20))
    assert (tmp_path / "err").read_text().startswith("fatui: the app needs a terminal")
