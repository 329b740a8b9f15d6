"""Runs from start to end, and what the table shows of them."""

import threading
from types import SimpleNamespace

import pytest
from msgspec import structs
from textual.widgets import OptionList

from attention.core import events as on
from attention.core.results import RankFigures
from attention.core.route import Route
from attention.core.workload import Workload
from attention.engine.record import Record
from fatui import formatting
from fatui.storage.history import RunHistory
from fatui.tui.screens.dialogs import Question, SortMenu
from fatui.tui.view_models.cost import estimate_s
from fatui.tui.view_models.session import Session
from fatui.tui.view_models.table_lines import SORT_FIGURES
from fatui.tui.view_models.trends import device_lines
from fatui.tui.widgets.row_table import RowTable
from tests.support.patience import patient
from tests.support.sample_runs import plan_of
from tests.support.stage import advise


async def test_a_run_fills_the_table_says_its_finding_and_is_kept(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds(4)
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert "collecting 4 of 6" in stage.seen()
    stage.engine.finish()
    await stage.settle(lambda: "Use poc · 49" in stage.seen())
    assert stage.app.session.phase == "done"
    await stage.settle(lambda: len(RunHistory().runs()) == 1)
    assert not RunHistory().runs()[0].interrupted


async def test_a_late_report_does_not_replace_the_next_run(stage, monkeypatch):
    report, begun = Session.report, threading.Event()

    def late(session):
        if threading.current_thread() is not threading.main_thread():
            begun.wait(patient(20))
        return report(session)

    monkeypatch.setattr(Session, "report", late)
    await stage.press("r")
    stage.engine.play()
    stage.engine.end()
    await stage.settle(lambda: not stage.app.runs.active)
    first = stage.app.runs._ended
    await stage.press("r")
    begun.set()
    await stage.settle(first.is_set)
    assert len(RunHistory().runs()) == 1
    assert stage.app.session.active and stage.app.report is None
    assert stage.app.main.tab == "live"


@pytest.mark.thorough
async def test_stop_keeps_what_was_measured(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds(6)
    await stage.press("x")
    await stage.settle(lambda: stage.app.report is not None)
    assert stage.app.session.phase == "stopped"
    assert len(stage.app.report.cases[0].rows) == 4
    assert stage.app.report.run.interrupted


@pytest.mark.thorough
async def test_quit_in_mid_run_asks_once_and_stay_goes_on(stage):
    await stage.press("r", "q")
    assert isinstance(stage.app.screen, Question)
    await stage.press("n")
    assert stage.app.runs.active
    await stage.press("q", "y")
    await stage.settle(lambda: not stage.app.is_running or not stage.app.runs.active)
    assert stage.engine.stopped


@pytest.mark.slow
async def test_quit_without_a_run_does_not_ask(stage):
    await stage.press("q")
    await stage.settle(lambda: stage.app._exit)
    assert stage.app._exit


@pytest.mark.slow
async def test_a_second_start_is_refused_in_words(stage):
    await stage.press("r", "r")
    assert "a run is in progress" in stage.app.journal.text()


@pytest.mark.slow
async def test_the_last_run_times_the_calls_of_the_next(stage):
    assert "known after the first run" in str(stage.find("#cost").content)
    await stage.run_to_the_end()
    await stage.settle(lambda: stage.app.remembered.pace.device == "Test CPU")
    stage.app.main.show_draft()
    assert "judging by a timed call of each" in str(stage.find("#cost").content)


@pytest.mark.thorough
async def test_a_sweep_has_a_block_a_case_and_a_mean(stage):
    stage.app.set_draft(stage.app.draft.toggle_sweep().set_axis("seq", (64, 128)))
    await stage.run_to_the_end()
    seen = stage.seen()
    assert "Speedups over baseline, geometric mean of 2 complete cases" in seen
    assert "1. B=1 L=64" in seen
    assert stage.find("#comparison-table", RowTable).lines[-1].key == "1:demo"


@pytest.mark.slow
async def test_the_table_is_sorted_by_a_column_and_reversed(stage):
    await stage.run_to_the_end()
    table = stage.find("#comparison-table", RowTable)

    def names():
        return [line.cells["implementation"] for line in table.lines]

    await stage.press("o")
    menu = stage.app.screen
    assert isinstance(menu, SortMenu)
    menu.query_one(OptionList).highlighted = 1 + list(SORT_FIGURES).index("tokens/s")
    await stage.press("enter")
    assert names() == ["poc", "demo", "practical", "baseline"]
    await stage.press("O")
    assert names() == ["baseline", "practical", "demo", "poc"]


@pytest.mark.slow
async def test_the_best_rows_have_a_star_also_without_colour(stage):
    await stage.run_to_the_end()
    row = next(line for line in stage.seen().splitlines() if "│poc " in line and "★" in line)
    assert "49" in row


@pytest.mark.slow
async def test_the_time_left_is_counted_down_between_events(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.tell(on.Progress(done=0.5, remaining_s=10, now="baseline: accuracy"))
    stage.clock.at += 6
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert stage.seen().count("4 s left") == 2, "in the status line and beside the bar"
    assert "60%" in stage.seen()
    stage.clock.at += 9
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert stage.seen().count("5 s over the estimate") == 2


@pytest.mark.slow
async def test_the_estimate_before_the_start_and_after_it_agree(stage):
    await stage.run_to_the_end()
    await stage.settle(lambda: stage.app.remembered.pace.device == "Test CPU")
    stage.app.main.show_draft()
    seconds = estimate_s(stage.app.draft.plan(), stage.app.remembered.pace, "Test CPU")
    await stage.press("r")
    stage.engine.begin()
    stage.engine.tell(on.Progress(done=0.0, remaining_s=2, now="baseline: accuracy"))
    stage.app.main.show_run()
    await stage.pilot.pause()
    words = formatting.duration(seconds)
    assert f"takes up to about {words}" in " ".join(stage.seen().split())
    assert stage.seen().count(f"{words} left") == 2


@pytest.mark.slow
async def test_enter_stays_where_leaving_is_asked_about(stage):
    await stage.press("r", "q")
    assert isinstance(stage.app.screen, Question)
    await stage.press("enter")
    assert stage.app.screen is stage.app.main and stage.app.runs.active
    assert not stage.engine.stopped


@pytest.mark.slow
async def test_a_run_that_is_opened_leaves_nothing_of_the_one_before(stage):
    await stage.run_to_the_end()
    past = stage.app.report
    stage.app.set_draft(stage.app.draft.set_axis("seq", (64,)))
    await stage.run_to_the_end()
    assert "done after" in stage.seen()
    stage.app.open_report(past)
    await stage.pilot.pause()
    seen = stage.seen()
    assert "done after" not in seen and "L=64 " not in seen
    assert f"run {past.run.id} is open" in seen and "it took" in seen
    assert not str(stage.find("#telemetry").content)


def row_line(stage, name):
    table = stage.find("#comparison-table", RowTable)
    return next(line for line in table.lines if line.cells.get("implementation") == name)


@pytest.mark.slow
async def test_the_path_stays_in_sight_when_a_speedup_gets_wider(stage):
    await stage.run_to_the_end()
    table = stage.find("#comparison-table", RowTable)
    row = row_line(stage, "poc")
    wide = structs.replace(row, cells={**row.cells, "speedup": "123.4 to 2,345.6x"})
    table.show([wide])
    assert "path" in [column.name for column in table.shown_columns]
    assert sum(table._fitted(table.shown_columns)) + 2 * (len(table.shown_columns) - 1) <= table._width


@pytest.mark.slow
async def test_the_hint_follows_the_page_and_names_a_hidden_sort(stage):
    await stage.run_to_the_end()
    stage.find("#comparison").order_by("tokens/s", True)
    table = stage.find("#comparison-table", RowTable)
    table.focus()
    await stage.press("right")
    hint = str(stage.find("#comparison").border_subtitle)
    assert "2 of" in hint and "sorted by tokens/s" in hint


@pytest.mark.slow
async def test_a_stage_stands_under_verdict_and_not_under_path(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.tell(on.CaseStarted(case=0), on.StepStarted(case=0, implementation="poc", step="build"))
    stage.app.main.show_run()
    await stage.pilot.pause()
    cells = row_line(stage, "poc").cells
    assert cells["verdict"] == "compiling" and "path" not in cells


def test_each_rank_has_a_line_with_its_figures_first():
    plan = plan_of(cases=(Workload(seq=64, ranks=2),))
    session = SimpleNamespace(record=Record(plan), case_number=0)
    for rank in (0, 1):
        known = {"host": "vm", "device": "a CPU", "backend": "cpu", "code": "1", "mlx": "1", "python": "3"}
        session.record.apply(on.RankStarted(rank=rank, process_id=rank, **known))
        session.record.apply(on.RankAlive(rank=rank, commands=1, busy=True, running="poc", active_bytes=2**20))
    figures = tuple(RankFigures(rank=rank, call_s=0.002, compute_s=0.0015, sent_bytes=1024) for rank in (0, 1))
    session.record.apply(on.RanksMeasured(case=0, implementation="poc", per_rank=figures))
    _, second = device_lines(session)
    assert second == "rank 1  poc: 2.00 ms per call, 500 µs of it waiting, 1 KiB sent · 1 MiB active · a CPU"
    session.record.apply(on.RankFailed(rank=1, reason="out of memory"))
    assert device_lines(session)[1] == "rank 1  out of memory · a CPU"


@pytest.mark.parametrize("at_most", [True, False])
async def test_memory_known_as_a_bound_is_asked_for_after_a_run(stage, at_most):
    advise(stage.app, poc=Route(path="CPU kernel", fused=True, reason="", predicted_bytes=2**23, at_most=at_most))
    await stage.run_to_the_end()
    assert stage.app.advice.current is not at_most
