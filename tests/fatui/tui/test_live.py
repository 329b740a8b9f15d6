"""The trends and the roofline of the Live pane."""

import re

import pytest

from attention.core import events as on
from attention.core.results import Peaks
from attention.core.workload import Workload
from attention.engine import record
from fatui.telemetry import Reading
from fatui.tui.view_models import plot, roofline, table_lines
from fatui.tui.view_models.plot import DOWN, Canvas, area
from fatui.tui.view_models.trends import energy_text, memory_chart, rate_chart
from fatui.tui.widgets import live_pane
from tests.support.sample_runs import plan_of, report_of
from tests.support.stage import PEAKS, on_stage


def text(cells):
    return ["".join(glyph for glyph, _ in row) for row in cells]


def test_a_canvas_has_two_by_four_dots_a_character():
    canvas = Canvas(2, 1)
    for y in range(4):
        canvas.dot(0, y, 3)
    canvas.dot(3, 3, 5)
    canvas.dot(4, 0, 5)
    canvas.dot(0, -1, 5)
    assert canvas.cells() == [[("\u2847", 3), ("\u2880", 5)]]


def test_a_positive_area_is_never_invisible():
    assert area([1.0, 0.5, 1e-9, 0.0], 1.0, 2, 1) == ["\u28e7\u2840"]
    rows = area([2.0, 2.0], 4.0, 1, 2)
    assert rows == [" ", "\u28ff"]


async def start(stage, rounds=(), factor=None):
    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    for count in rounds:
        stage.engine.rounds(count, factor=factor)
    stage.app.main.show_run()
    await stage.pilot.pause()
    return stage.app.session


@pytest.mark.slow
async def test_v_changes_the_scale_and_is_remembered(stage):
    await start(stage, [12])
    assert "tokens/s · 0 to 800 K" in stage.seen()
    await stage.press("v")
    assert "each from its lowest to highest" in stage.seen() and "spans" in stage.seen()
    await stage.press("v")
    seen = stage.seen()
    assert "ratio to baseline · band: noise floor 0.5 %" in seen
    assert stage.app.remembered.view == "ratio"
    await stage.press("v")
    assert "0 to 800 K" in stage.seen()


@pytest.mark.thorough
async def test_ratios_have_a_noise_band_and_a_narrowing_interval(stage):
    session = await start(stage, [6])
    _, first = rate_chart(session, "ratio")
    for _ in range(8):
        stage.engine.rounds(24)
    _, later = rate_chart(session, "ratio")
    poc = later[1]
    low, high = poc.band
    floor = session.record.case(0).noise_floor.floor
    assert high / low == pytest.approx((1 + floor) ** 2)
    assert poc.low < low < 49.3 < high < poc.high
    assert float(poc.best.strip("± %")) < float(first[1].best.strip("± %"))
    assert poc.note == f"from {first[1].best}"
    assert poc.now.startswith("49.3 ±")


@pytest.mark.slow
async def test_too_few_rounds_have_no_ratio_but_their_number(stage):
    session = await start(stage, [3])
    assert rate_chart(session, "ratio")[1][1].note == "collecting: 3 of 6 rounds"


@pytest.mark.slow
async def test_a_row_that_ended_says_why_in_every_view(stage):
    session = await start(stage, [6])
    stage.engine.tell(on.RowEnded(case=0, implementation="poc", status="failed", reason="killed by signal 9"))
    for view in ("common", "own", "ratio"):
        assert rate_chart(session, view)[1][1].note == "failed: killed by signal 9"


@pytest.mark.slow
async def test_the_predicted_memory_is_a_line_that_fits_on_the_scale(stage):
    session = await start(stage, [6])
    scale, trends = memory_chart(session)
    peak = next(trend for trend in trends if trend.label == "MLX peak")
    predicted = session.plan.cases[0].held_bytes + 2**22
    assert peak.line == predicted <= scale.highest
    assert "line: 5.5 MiB predicted" in scale.words


@pytest.mark.slow
async def test_each_rank_has_a_trend_of_its_memory(stage):
    session = await start(stage, [6])
    for size in (2**20, 2**21):
        stage.engine.tell(on.RankAlive(rank=1, commands=1, busy=True, active_bytes=size))
    ranks = [trend for trend in memory_chart(session)[1] if trend.label == "rank 1"]
    assert [trend.points for trend in ranks] == [(2**20, 2**21)]


@pytest.mark.slow
async def test_energy_per_token_is_shown_where_there_is_a_sensor(stage):
    session = await start(stage, [6])
    assert energy_text(session, None) == ""
    stage.app.main.show_reading(Reading(power_w=85.0))
    stage.app.main.show_run()
    await stage.pilot.pause()
    assert "energy per token at 85.0 W: baseline 5.9" in stage.seen()
    assert "poc 121 µJ" in stage.seen()


@pytest.mark.slow
async def test_after_the_run_no_load_is_shown_as_that_of_now(stage):
    session = await start(stage, [6])
    reading = Reading(cpu_percent=199.0)
    stage.app.main.show_reading(reading)
    assert (rate_chart(session)[0].columns[0], memory_chart(session)[0].columns[0]) == ("now", "now")
    assert "CPU 199 %" in stage.seen()
    stage.engine.finish()
    await stage.settle(lambda: stage.app.report is not None)
    stage.app.main.show_run()
    stage.app.main.show_reading(reading)  # taken in a thread, it may come late
    await stage.pilot.pause()
    assert "CPU 199 %" not in stage.seen()
    assert (rate_chart(session)[0].columns[0], memory_chart(session)[0].columns[0]) == ("last", "last")


MACHINE = Peaks(matmul_flops_per_s=1e11, copy_bytes_per_s=1e10, launch_s=1e-5)


@pytest.mark.parametrize(
    ("workload", "roof"),
    [
        (Workload(seq=2048), "compute"),
        (Workload(seq=32_768, pass_="decode"), "copy"),
        (Workload(seq=16, heads=1), "launch"),
    ],
)
def test_what_limits_a_case_is_its_longest_time(workload, roof):
    limits = roofline.limits_of(workload, MACHINE)
    assert limits.roof == roof
    assert limits.compute == workload.flops / 1e11 and limits.copy == workload.bytes_moved / 1e10
    assert limits.seconds == max(limits.compute, limits.copy, 1e-5)
    assert roofline.limit_words(workload, MACHINE)[0].startswith(roofline.WHAT[roof])


@pytest.mark.parametrize("seq", [256, 2048, 16_384])
@pytest.mark.parametrize("width", [60, 70, 80])
def test_the_case_leaves_the_words_of_the_roofs_whole(seq, width):
    seen = "\n".join(text(plot.drawn(roofline.roofline(Workload(seq=seq), MACHINE), width, 12)))
    assert re.search(r"(?<!\w)compute 100 GFLOP/s", seen) and re.search(r"at best(?!\w)", seen)
    assert seen.count(roofline.PREDICTED) == 1
    assert plot.CURSOR_SIGN in seen and plot.CURSOR_SIGN not in plot.MARKS


def test_without_measured_rates_there_is_no_roofline():
    assert roofline.roofline(Workload(), Peaks()) is None
    assert roofline.limit_words(Workload(), Peaks(matmul_flops_per_s=1e9)) == []


def test_a_case_is_on_its_roof_and_rows_are_below():
    report = report_of(plan_of((Workload(seq=128), Workload(seq=512))))
    names = tuple(row.implementation for row in report.cases[0].rows)
    found = roofline.roofline(Workload(seq=512), report.peaks, report.cases, names)
    at_best = next(note for note in found.notes if note.sign == roofline.PREDICTED)
    work = Workload(seq=512)
    assert at_best.x == work.flops / work.bytes_moved == found.cursor
    assert at_best.y == pytest.approx(min(1.3e11, at_best.x * 2.1e10))
    baseline = next(line for line in found.lines if line.number == names.index("baseline"))
    assert [point.x for point in baseline.points] == sorted(roofline.intensity(case.workload) for case in report.cases)
    assert all(point.low <= point.y <= point.high for point in baseline.points)
    words = roofline.limit_words(work, report.peaks, report.cases)
    assert "poc at" in words[1] and "Unfused" in words[2] and "poc" not in words[2]


def test_the_marks_of_other_cases_are_said_to_be_theirs():
    report = report_of(plan_of((Workload(seq=128), Workload(seq=512))))
    set_up = Workload(seq=2048)
    one = roofline.limit_words(set_up, report.peaks, report.cases[:1])
    assert one[1:] == [f"Not measured; the marks are of {Workload(seq=128).label}."]
    assert roofline.limit_words(set_up, report.peaks, report.cases)[1:] == [
        "Not measured; the marks are of 2 other cases."
    ]
    assert "marks" not in " ".join(roofline.limit_words(Workload(seq=512), report.peaks, report.cases))
    assert len(roofline.limit_words(set_up, report.peaks)) == 1


@pytest.mark.slow
async def test_the_roofline_follows_the_sliders_before_a_run():
    async with on_stage() as stage:
        await stage.press("i")
        assert "The roofs are measured at the start of a run; r starts one" in stage.seen()
        stage.app.remembered.peaks, stage.app.remembered.peaks_of = PEAKS, "Test CPU"
        stage.app.main.show_run()
        await stage.pilot.pause()
        assert "Compute limits this case: 537 MFLOP" in stage.seen() and roofline.PREDICTED in stage.seen()
        stage.find("#axis-seq").focus()
        await stage.press("home")
        assert "limits this case: 537" not in stage.seen() and "The launch of a call limits" in stage.seen()
        stage.app.remembered.peaks_of = "another device"
        stage.app.main.show_run()
        await stage.pilot.pause()
        assert "The roofs are measured" in stage.seen()


@pytest.mark.thorough
async def test_the_roofline_has_the_points_of_a_run(stage):
    await stage.run_to_the_end()
    await stage.settle(lambda: stage.app.remembered.peaks_of == "Test CPU")
    assert stage.app.remembered.peaks == PEAKS
    await stage.press("i")
    assert "Of that: poc at 82 %" in stage.seen() and "■ poc" in stage.seen()
    await stage.press("v")
    assert "Of that" not in stage.seen()


def test_axes_have_round_ticks_within_their_ends():
    logarithmic = plot.decades(3e3, 4e6)
    assert [words for _, words in logarithmic.ticks] == ["10 K", "100 K", "1 M"]
    assert [words for _, words in plot.decades(1.1e3, 5e3).ticks] == ["1 K", "2 K", "5 K"]
    linear = plot.from_zero(930.0)
    assert [words for _, words in linear.ticks] == ["0", "200", "400", "600", "800"]
    assert linear.place(0) == 0 and linear.place(linear.high) == 1


def test_marks_at_one_place_are_side_by_side():
    axis = plot.Axis(0, 10)
    lines = [plot.Line(number, (plot.Point(5, 5, 1, 9),)) for number in (0, 1)]
    drawn = text(plot.drawn(plot.Plot(axis, axis, tuple(lines)), 40, 12))
    assert any("●■" in row for row in drawn)
    bars = [row for row in drawn[:-2] if any("\u2800" < letter <= "\u28ff" for letter in row)]
    assert len(bars) >= 7
    assert len(drawn) == 12 and DOWN == 4


async def test_a_tick_without_news_computes_neither_rows_nor_trends(stage, monkeypatch):
    made = []

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **options: made.append(name) or real(*given, **options))

    await stage.press("r")
    stage.engine.begin()
    stage.engine.begin_case()
    stage.engine.rounds()
    main = stage.app.main
    main.show_run()
    counted(live_pane, "rate_chart")
    counted(live_pane, "memory_chart")
    counted(table_lines, "case_lines")
    counted(record, "timed_row")
    stage.engine.tell(on.Progress(done=0.5, remaining_s=3.0, now="rounds"), on.Message(level="info", text="aside"))
    main.show_run()
    assert not made and "left" in stage.find("#progress").text
    stage.engine.rounds()
    main.show_run()
    assert {"rate_chart", "memory_chart", "case_lines", "timed_row"} == set(made)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_words_below_the_roofline_end_on_small_terminals(size):
    async with on_stage(size=size) as stage:
        await stage.run_to_the_end()
        await stage.press("3", "i")
        await stage.settle(lambda: stage.find("#roofline-words").region.height)
        words = stage.find("#roofline-words")
        words.update("\n".join(f"line {number}" for number in range(9)))
        await stage.pilot.pause()
        assert "line 8" in stage.seen() and stage.find("#roofline").region.height >= 6
