"""The Streaming screen: setup, live curves, storage, and reopening from the history."""

import pytest

from attention.core.stream import FULL, STREAM_ROWS, STREAMING
from fatui.storage.history import RunHistory
from fatui.tui.screens.streaming import StreamCurves, Streaming
from fatui.tui.widgets.choice import Choice, Toggles
from fatui.tui.widgets.row_table import RowTable
from tests.support.stage import on_stage
from tests.support.streams import stream_events, stream_report


async def start(stage, *typed):
    """Open the screen, type values into choices, and run."""
    await stage.press("a")
    assert isinstance(stage.app.screen, Streaming)
    for name, keys in typed:
        stage.find(f"#{name}", Choice).focus()
        await stage.press(*keys)
    await stage.press("r")


async def end(stage):
    await stage.end()
    stage.app.screen._show()
    await stage.pilot.pause()


async def test_a_stream_is_set_up_drawn_live_and_kept(stage):
    await start(stage, ("window", "512"))
    plan = stage.engine.record.plan
    assert plan.cases[0].model is None
    assert plan.cases[0].window == 512
    assert plan.ordered == (FULL, STREAMING)
    stage.engine.tell(*list(stream_events(plan))[:-2])
    stage.app.screen._show()
    await stage.pilot.pause()
    seen = stage.seen()
    assert "full, extrapolated: 1.02 ms" in seen
    assert "━ streaming 100 µs" in seen
    assert "interrupted" not in seen
    stage.engine.tell(*list(stream_events(plan))[-2:])
    await end(stage)
    assert RunHistory().get("last").streams[0].rows[1].tokens == 100_000
    assert "--window 512" in RunHistory().get("last").run.command


@pytest.mark.thorough
async def test_a_model_has_all_rows_and_its_own_heads(stage):
    await start(stage, ("model", ["left"]))
    plan = stage.engine.record.plan
    assert plan.cases[0].model == "tiny-llama"
    assert (plan.cases[0].heads, plan.cases[0].kv_heads) == (4, 2)
    assert plan.ordered == tuple(STREAM_ROWS)
    stage.engine.tell(*stream_events(plan))
    await end(stage)
    assert stage.find("#stream-losses", StreamCurves).display
    assert "loss inside" in stage.seen()


async def test_rows_that_take_a_model_are_named_without_one(stage):
    await stage.press("a")
    await stage.settle(lambda: "recomputed and window: only with a model" in stage.seen())
    toggles = stage.find("#implementations", Toggles)
    toggles.focus()
    for row in (FULL, "window", STREAMING):
        toggles._cursor = toggles.options.index(row)
        await stage.press("space")
    await stage.settle(lambda: "cannot run: recomputed: only with a model" in stage.seen())
    await stage.press("r")
    assert not stage.app.runs.active


@pytest.mark.thorough
async def test_first_tokens_beyond_the_window_are_refused_in_words(stage):
    await start(stage, ("window", "8"), ("first", "9"))
    assert not stage.app.runs.active
    assert any("first: got 9" in line.text for line in stage.app.journal.since(0))


@pytest.mark.parametrize("size", [(80, 24), pytest.param((200, 55), marks=pytest.mark.slow)])
async def test_a_past_stream_opens_with_its_curves_at_any_size(private_folders, size):
    async with on_stage(size=size) as stage:
        stage.app.open_report(stream_report("tiny-llama"))
        await stage.settle(lambda: isinstance(stage.app.screen, Streaming))
        stage.app.screen._show()
        await stage.pilot.pause()
        assert "streaming" in stage.seen()
        drawn = stage.find("#stream-times", StreamCurves).chart is not None
        assert drawn == (size[1] > 24)
        below = any("┤" in (line.span or "") for line in stage.find("#model-rows", RowTable).lines)
        assert below != drawn


@pytest.mark.slow
async def test_a_stream_is_compared_with_one_of_its_rows(stage):
    stage.app.open_report(stream_report("tiny-llama"))
    await stage.settle(lambda: isinstance(stage.app.screen, Streaming))
    table = stage.find("#model-rows", RowTable)
    await stage.settle(lambda: bool(table.lines))
    assert table.has_focus
    table.go_to("0:streaming")
    await stage.press("b")
    times = {line.cells["implementation"]: line.cells["times"] for line in table.lines if line.key}
    assert times == {"full": "~ 0.0981x", "recomputed": "1.00x", "window": "1.00x", "streaming": "1"}
    await stage.press("enter")
    assert "99 %        of the tokens take at most" in stage.seen()
