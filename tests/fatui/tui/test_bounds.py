"""Long runs: memory stays within its buffers, and drawing does not slow down."""

import asyncio
import gc
import time
from statistics import median

import psutil
import pytest

from fatui.tui.widgets.log_pane import LogView
from tests.support.stage import on_stage

ROUNDS = 35
"""Events of rounds added to a case, 50 events in all with the others."""
MAX_BYTES = 24 * 2**20
"""Maximum bytes for all of it: 200 cases with their rows and samples, 10,000 lines of log, 512 points per trend."""


async def repaint_s(stage):
    """Median CPU time to process and draw new events."""
    taken = []
    for _ in range(5):
        stage.engine.rounds(1, case=stage.app.session.case_number)
        began = time.process_time()
        stage.app.main.show_run()
        await stage.pilot.pause()
        taken.append(time.process_time() - began)
    return median(taken)


async def play_case(stage, case):
    stage.engine.begin_case(case)
    for _ in range(ROUNDS):
        stage.engine.rounds(1, case=case)
    stage.engine.end_case(case)
    while not stage.app.session.is_final(case):
        await asyncio.sleep(0)


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "lines"), [(20, 10_500), (200, 100_000)], ids=["few", "many"])
async def test_events_and_lines_stay_within_their_buffers(cases, lines):
    heard, process = 0, psutil.Process()
    async with on_stage(paints=True) as stage:
        draft = stage.app.draft.toggle_sweep().toggle("practical").toggle("demo")
        stage.app.set_draft(
            draft.set_axis("batch", tuple(range(1, 21))).set_axis("seq", tuple(range(64, 64 + cases // 20)))
        )
        await stage.press("r")
        assert len(stage.engine.record.cases) == cases
        stage.engine.begin()
        tell = stage.engine.tell

        def count(*events):
            nonlocal heard
            heard += len(events)
            tell(*events)

        stage.engine.tell = count
        for case in range(10):
            await play_case(stage, case)
        early = await repaint_s(stage)
        gc.collect()
        before = process.memory_info().rss
        for case in range(10, cases):
            await play_case(stage, case)
        for number in range(lines):
            stage.app.journal.write(f"line {number}")
        stage.app.main.show_run()
        await stage.pilot.pause()
        gc.collect()
        grown = process.memory_info().rss - before
        late = await repaint_s(stage)
        print(f"{heard} events, {grown / 2**20:.1f} MiB; repaint {1e3 * early:.1f} ms, then {1e3 * late:.1f} ms")
        assert heard >= 50 * cases
        assert grown < MAX_BYTES
        assert len(stage.find("#log-view", LogView)._lines) <= 10_000
        assert all(len(series.points) <= 512 for series in stage.app.session.rates.values())
        assert late < 2 * early + 0.02
