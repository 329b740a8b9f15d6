"""The Scaling screen and its view model."""

import pytest
from msgspec import structs

from attention.core.results import Interval, Peaks, Ratio, Row
from attention.core.workload import Workload
from fatui import formatting
from fatui.report.scaling import RatePoint, curves_of, sorted_cases
from fatui.tui.screens.dialogs import RowDetails
from fatui.tui.screens.scaling import CurveChart, HeatMap
from fatui.tui.view_models import roofline, sweep
from fatui.tui.view_models.plot import CROSSING, decades, from_zero
from fatui.tui.widgets.bars import KeyBar
from fatui.tui.widgets.row_table import RowTable
from tests.support.sample_runs import plan_of, report_of
from tests.support.stage import on_stage

LENGTHS = tuple(Workload(seq=seq) for seq in (64, 128, 256, 512))


def line(*rates):
    return [RatePoint(2**index, rate, rate * 0.99, rate * 1.01) for index, rate in enumerate(rates)]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_crossover_is_marked_where_the_drawn_lines_meet(logarithmic):
    lines = {"a": line(10, 10, 10, 10), "b": line(2, 5, 20, 40)}
    plot = sweep.curve_plot((1, 2, 4, 8), lines, logarithmic=logarithmic, say=str, crossing=True)
    (note,) = plot.notes
    assert note.sign == CROSSING and note.words == "b overtakes"
    assert 2 < note.x < 4 and note.y == pytest.approx(10)
    part = (plot.x.place(note.x) - plot.x.place(2)) / (plot.x.place(4) - plot.x.place(2))
    assert part == pytest.approx(1 / 2 if logarithmic else 1 / 3)


def test_words_are_equally_spaced_and_lengths_by_size():
    words = sweep.AxisPlaces(("none", "int8", "int4")).axis
    assert words.place(1) - words.place(0) == pytest.approx(words.place(2) - words.place(1))
    lengths = sweep.AxisPlaces((64, 128, 1024)).axis
    assert lengths.logarithmic and [text for _, text in lengths.ticks] == ["64", "128", "1 K"]
    assert lengths.place(1024) - lengths.place(128) == pytest.approx(3 * (lengths.place(128) - lengths.place(64)))


def test_each_figure_is_that_of_the_rows():
    report = report_of(plan_of(LENGTHS))
    row = report.cases[1].rows[1]
    found = {figure: sweep.figure_curves(report.cases, "seq", figure)["poc"][1] for figure in sweep.FIGURES}
    assert found["tokens/s"].rate == pytest.approx(row.tokens_per_second)
    assert found["latency"] == RatePoint(128, row.latency_s, row.latency_s, row.latency_s)
    assert found["FLOP/s"].rate == pytest.approx(row.flops_per_s)
    assert found["memory"].rate == row.peak_bytes
    assert found["tokens/s"].low < found["tokens/s"].rate < found["tokens/s"].high
    assert sweep.figure_curves(report.cases, "seq", "tokens/s") == curves_of(sorted_cases(report, "seq", ""), "seq")


def test_the_roof_of_each_case_is_its_own():
    report = report_of(plan_of(LENGTHS))
    roof = sweep.roof_curve(report.cases, "seq", report.peaks)
    for point, case in zip(roof, report.cases, strict=True):
        assert point.rate == case.workload.flops / roofline.limits_of(case.workload, report.peaks).seconds
    assert sweep.roof_curve(report.cases, "seq", Peaks()) == []


def test_letters_differ_and_begin_a_name_if_free():
    assert sweep.letters_of(["baseline", "poc", "practical", "poc-fp8", "mlx"]) == {
        "baseline": "B",
        "poc": "P",
        "practical": "R",
        "poc-fp8": "O",
        "mlx": "M",
    }


def test_a_cell_names_the_winners_with_their_speedup():
    report = report_of(plan_of(LENGTHS[:1]))
    letters = sweep.letters_of([row.implementation for row in report.cases[0].rows])
    cell = sweep.winner_cell(report.cases[0], letters)
    assert cell.text.startswith("P 50") and cell.tone == "much-faster"


def test_a_cell_without_a_fastest_says_whether_all_are_equal():
    (case,) = report_of(plan_of(LENGTHS[:1])).cases
    base, poc, *_ = case.rows
    unclear = structs.replace(poc, call_s=Interval(median=1e-6, low=1e-7, high=1e-5))
    assert sweep.winner_cell(structs.replace(case, rows=(base, unclear)), {}).text == "?"
    same = structs.replace(base, implementation="poc", speedup=Ratio(value=1.001, low=0.999, high=1.003))
    assert sweep.winner_cell(structs.replace(case, rows=(base, same)), {}).text == "≈"


@pytest.mark.parametrize(
    ("ratio", "text", "tone"),
    [
        (Ratio(value=0.5, low=0.49, high=0.51, significant=True), "0.500x", "slower"),
        (Ratio(value=1.0, low=0.99, high=1.01, significant=False), "≈ 1", "same"),
        (Ratio(value=1.5, low=1.49, high=1.51, significant=True), "1.50x", "faster"),
        (Ratio(value=3.0, low=2.9, high=3.1, significant=True), "3.00x", "much-faster"),
        (None, "n/a", "none"),
    ],
)
def test_the_shade_of_a_cell_repeats_its_text(ratio, text, tone):
    row = Row(implementation="x", status="ok", call_s=Interval(median=1.0), speedup=ratio)
    assert sweep.speedup_cell(row) == sweep.MapCell(text, tone)


async def scaled(stage, lengths=LENGTHS):
    stage.app.runs.show_past(report_of(plan_of(lengths)))
    await stage.press("g")


@pytest.mark.slow
async def test_tab_turns_through_the_figures(stage):
    await scaled(stage)
    titles = []
    for _ in range(4):
        titles.append(str(stage.find("#chart-pane").border_title))
        await stage.press("tab")
    assert [title.partition(" over")[0] for title in titles] == list(sweep.MEANS.values())
    assert "tokens/s over seq" in stage.seen()


async def test_the_cursor_reads_a_point_and_enter_opens_its_row(stage):
    await scaled(stage)
    assert "seq 64 · B=1 L=64" in stage.seen()
    await stage.press("right", "right", "right", "right", "left", "down")
    assert "seq 256 · B=1 L=256" in stage.seen()
    await stage.press("enter")
    dialog = stage.app.screen
    assert isinstance(dialog, RowDetails)
    assert (dialog._case.workload.seq, dialog._row.implementation) == (256, "poc")


async def test_scaling_is_over_the_row_that_b_chose():
    async with on_stage(size=(120, 50)) as stage:
        grid = tuple(Workload(seq=seq, batch=batch) for seq in (64, 128) for batch in (1, 2))
        report = report_of(plan_of(grid))
        first = report.cases[0]
        without = [
            structs.replace(row, status="failed", call_s=None) for row in first.rows if row.implementation == "poc"
        ]
        rows = tuple(without[0] if row.implementation == "poc" else row for row in first.rows)
        report = structs.replace(report, cases=(structs.replace(first, rows=rows), *report.cases[1:]))
        stage.app.runs.show_past(report)
        stage.app.main.show_run()
        table = stage.find("#comparison-table", RowTable)
        table.focus()
        table.go_to("1:poc")
        await stage.press("b", "g")
        title = str(stage.find("#map-pane").border_title)
        assert "with its speedup over poc: " in title and "* over baseline" in title
        assert "over poc" not in str(stage.find("#point-pane").border_title)  # the first case has no figures of it
        cells = stage.find("#map", HeatMap).data.cells
        assert [cell.text.endswith("*") for cell in cells.values()] == [True, False, False, False]
        await stage.press("right")
        assert "over poc" in str(stage.find("#point-pane").border_title)
        lines = {line.cells["implementation"]: line.cells for line in stage.find("#point", RowTable).lines}
        assert lines["poc"]["speedup"] == "1"
        await stage.press("down", "enter")
        assert stage.app.screen._case.reference == "poc"


@pytest.mark.slow
async def test_a_click_moves_the_cursor_to_the_nearest_value(stage):
    await scaled(stage)
    chart = stage.find("#chart", CurveChart)
    await stage.pilot.click(chart, offset=(chart.size.width - 2, 2))
    await stage.pilot.pause()
    assert "seq 512 ·" in stage.seen()


@pytest.mark.slow
async def test_with_one_axis_only_keys_that_do_something_are_offered(stage):
    await scaled(stage)
    offered = [label for _, label, _ in stage.find(KeyBar).keys]
    assert offered == ["Figure", "Log scale", "Back", "Help"]
    await stage.press("a", "i", "v")
    assert "tokens/s over seq" in stage.seen() and not stage.find("#map-pane").display


@pytest.mark.slow
async def test_a_short_terminal_turns_from_rows_to_the_map():
    async with on_stage(size=(80, 24)) as stage:
        grid = tuple(Workload(seq=seq, batch=batch) for seq in (64, 128) for batch in (1, 2))
        await scaled(stage, grid)
        assert stage.find("#point-pane").display and not stage.find("#map-pane").display
        await stage.press("i")
        assert stage.find("#map-pane").display and not stage.find("#point-pane").display
        assert "P 50" in stage.seen()


def test_ticks_of_sizes_are_round_in_their_units():
    assert [words for _, words in from_zero(4 * 2**20, formatting.size).ticks] == [
        "0",
        "1 MiB",
        "2 MiB",
        "3 MiB",
        "4 MiB",
    ]
    words = [words for _, words in decades(3e5, 2e9, formatting.size).ticks]
    assert words == ["1 MiB", "10 MiB", "100 MiB", "1 GiB"]
