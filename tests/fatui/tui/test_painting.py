"""Repaints of the app: as Textual would draw them, and of what changed only."""

import gc
import io
import sys

import pytest
from rich.console import Console
from textual._compositor import Compositor
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from attention.core import events as on
from fatui.tui import terminal
from fatui.tui.app import FatuiApp, run_app
from fatui.tui.lab import TABLE_TICKS
from fatui.tui.painting import KeepsStyles, RepaintBudget, SparingCompositor, set_subtitle, set_title
from fatui.tui.view_models.trends import Trend
from tests.support.stage import Clock, on_stage


def drawn(chops):
    return [list(Strip.join(each for each in line.values() if each is not None)) for line in chops]


def written(update):
    out = io.StringIO()
    Console(file=out, width=200, color_system="truecolor", force_terminal=True, legacy_windows=False).print(
        update, end=""
    )
    return out.getvalue()


async def running(stage):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds(30)
    stage.app.main.show_run()
    await stage.pilot.pause()


@pytest.mark.thorough
@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 55)])
async def test_a_repaint_is_what_textual_draws(size):
    async with on_stage(size=size) as stage:
        await running(stage)
        ours = stage.app.main._compositor
        assert isinstance(ours, SparingCompositor)
        whole = ours.size.region
        assert drawn(ours._render_chops(whole, lambda y: True)) == drawn(
            Compositor._render_chops(ours, whole, lambda y: True)
        )
        for regions in ({Region(3, 5, 60, 4)}, {Region(0, 0, 1, 1), Region(size[0] - 9, size[1] - 3, 9, 3)}):
            ours._dirty_regions = set(regions)
            sparing = ours.render_partial_update()
            ours._dirty_regions = set(regions)
            assert written(sparing) == written(Compositor.render_partial_update(ours))


@pytest.mark.thorough
async def test_a_tick_without_news_repaints_no_pane():
    async with on_stage() as stage:
        await running(stage)
        stage.app.main._compositor._dirty_regions.clear()
        stage.app.main._dirty_widgets.clear()
        stage.app.main.show_run()
        assert not {widget.id for widget in stage.app.main._dirty_widgets} & {"live", "comparison", "progress", "row"}


@pytest.mark.thorough
async def test_new_figures_repaint_their_rows_only():
    async with on_stage() as stage:
        await running(stage)
        table = stage.find("#comparison-table")
        before = table.lines
        table._repaint_regions.clear()
        ended = on.RowEnded(case=0, implementation="demo", status="failed", reason="killed")
        stage.engine.tell(ended)
        stage.app.main.show_run()
        changed = [index for index, line in enumerate(table.lines) if line != before[index]]
        assert changed
        assert {region.y for region in table._repaint_regions} == {index + 1 for index in changed}


@pytest.mark.thorough
async def test_lines_without_a_frame_are_what_textual_draws():
    async with on_stage() as stage:
        await running(stage)
        seen = [each for each in stage.app.screen.query("*") if isinstance(each, KeepsStyles) and each.region.area]
        assert {each.id for each in seen} >= {"rates", "memory", "progress", "comparison-table", "status", "log-view"}
        for widget in seen:
            crop = widget.region.reset_offset
            ours, theirs = widget.render_lines(crop), Widget.render_lines(widget, crop)
            assert [list(each.simplify()) for each in ours] == [list(each.simplify()) for each in theirs], widget.id


async def test_lines_are_drawn_once_until_they_are_refreshed(monkeypatch):
    async with on_stage() as stage:
        slider = stage.find("#axis-seq")
        stage.seen()
        drawn = []
        monkeypatch.setattr(slider, "render_line", lambda y: drawn.append(y) or Strip.blank(slider.size.width))
        stage.find("#workload").refresh()
        stage.seen()
        assert not drawn
        slider.refresh()
        stage.seen()
        assert drawn == [0]


async def test_a_new_text_in_a_panes_edge_repaints_its_line_only():
    async with on_stage() as stage:
        pane = stage.find("#workload")
        stage.seen()
        for change, line in ((set_subtitle, pane.region.height - 1), (set_title, 0)):
            pane._repaint_regions.clear()
            change(pane, "of late")
            assert pane._repaint_regions == {Region(0, line, pane.region.width, 1)}
            assert "of late" in stage.seen()
            change(pane, "of late")
            assert len(pane._repaint_regions) == 1


async def test_rounds_repaint_only_the_rows_of_trends_that_changed():
    async with on_stage() as stage:
        await running(stage)
        stage.seen()
        rates, memory = stage.find("#rates"), stage.find("#memory")
        before, rows = list(rates._rows), memory._rows
        rates._repaint_regions.clear()
        stage.engine.rounds(9, factor={"poc": 3.0})
        stage.app.main._ticks = 0  # the next tick draws no tables
        stage.app.main._tick()
        changed = {y for y, row in enumerate(rates._rows) if row != before[y]}
        assert 0 < len(changed) < len(rates._rows)
        assert {region.y for region in rates._repaint_regions} == changed
        assert memory._rows is rows  # drawn with the table, once a second


def test_a_budget_allows_what_the_share_covers():
    used, clock = Clock(), Clock()
    budget = RepaintBudget(0.04, cpu=used, clock=clock)

    def after(seconds, cpu_s):
        clock.at += seconds
        used.at += cpu_s
        return budget.allows()

    assert after(0.25, 0.008)
    assert not after(0.25, 0.015)  # 5 ms too much
    assert after(0.25, 0.004)
    assert not after(0.25, 10.0)  # of which 100 ms are owed
    assert [after(1.0, 0.016) for _ in range(5)] == [False, False, False, False, True]
    clock.at += 1000.0  # of which 20 ms are saved
    assert budget.allows()
    assert [after(0.25, 0.022) for _ in range(2)] == [True, False]


async def test_trends_beyond_the_budget_are_drawn_with_the_table():
    async with on_stage() as stage:
        await running(stage)
        stage.app.repaints = RepaintBudget(share=0.0)
        rates, main = stage.find("#rates"), stage.app.main
        before, main._ticks = rates.trends, 0
        stage.engine.rounds(9)
        for _ in range(TABLE_TICKS - 1):
            main._tick()
            assert rates.trends is before
        main._tick()
        assert rates.trends != before


@pytest.mark.thorough
async def test_a_graph_is_drawn_again_once_it_differs_by_a_dot():
    async with on_stage() as stage:
        await running(stage)
        stage.seen()
        rates, points = stage.find("#rates"), tuple(1.0 + 0.5 * (index % 7) for index in range(400))
        dots = 2 * rates._line_width
        rates.show(rates.scale, (Trend("poc", points, now="1", high=5.0),))
        for more, redrawn in ((1, False), (400 // dots + 1, True)):
            before = list(rates._rows)
            after = Trend("poc", points + (4.0,) * more, now=f"{more + 1}", high=5.0)
            rates.show(rates.scale, (after,))
            changed = [y for y, row in enumerate(rates._rows) if row != before[y]]
            assert rates._rows[-1][-1][0].split()[0] == f"{more + 1}"
            assert (len(changed) > 1) == redrawn


@pytest.mark.thorough
async def test_kept_styles_follow_the_theme():
    async with on_stage() as stage:
        await running(stage)
        for name, part in (
            ("#comparison-table", "table--head"),
            ("#rates", "trend--line"),
            ("#status", "status--left"),
        ):
            widget = stage.find(name)
            before = widget.part_style(part)
            stage.app.theme = "textual-light" if stage.app.theme != "textual-light" else "nord"
            await stage.pilot.pause()
            assert widget.part_style(part) == widget.get_component_rich_style(part) != before


def test_the_collector_does_not_walk_what_stays(monkeypatch):
    monkeypatch.setattr(FatuiApp, "run", lambda app: app.after_first_paint())
    monkeypatch.setattr(terminal, "watch_terminal", lambda *handlers: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    gc.unfreeze()
    try:
        run_app()
        assert gc.get_freeze_count() > 0
    finally:
        gc.freeze()  # as the session left it, or each later gc.collect() walks all that is imported
