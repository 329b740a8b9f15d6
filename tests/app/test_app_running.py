"""Runs: from their start to their end, and what the table shows of them."""

from stage import on_stage

from fatui.history import History
from fatui.screens.question import Question
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
        stage.engine.finish()
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
