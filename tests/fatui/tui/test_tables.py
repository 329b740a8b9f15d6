"""Tables: order, filter, legend and reference, on every screen that has one."""

import pytest
from msgspec import structs
from textual.widgets import Input

from attention.core.statistics import median_interval
from attention.core.workload import Workload
from fatui.report.comparison import rebased, rebased_report
from fatui.report.export import to_markdown
from fatui.report.scaling import references_text
from fatui.storage.history import RunHistory
from fatui.tui.screens.dialogs import ChangeDetails
from fatui.tui.screens.history import Compare
from fatui.tui.view_models.row_details import figure_lines
from fatui.tui.view_models.table_lines import TableLine, filtered, legend, ordered
from fatui.tui.widgets.row_table import RowTable
from tests.support.sample_runs import compared, plan_of, report_of, run_of
from tests.support.stage import on_stage
from tests.support.streams import stream_report

LINES = (
    TableLine(span="first", tone="head"),
    TableLine(key="a", cells={"name": "apple", "x": "1 ★"}, figures={"x": 1.0}),
    TableLine(key="b", cells={"name": "pear", "x": "n/a"}, figures={"x": None}),
    TableLine(key="c", cells={"name": "plum", "x": "≈ 1"}, figures={"x": 3.0}),
    TableLine(span="second", tone="head"),
    TableLine(key="d", cells={"name": "apple", "x": "2"}, figures={"x": 2.0}),
)


def keys(lines):
    return [line.key or line.span for line in lines]


def test_lines_are_sorted_in_blocks_with_unknown_last():
    assert keys(ordered(LINES, "x", True)) == ["first", "c", "a", "b", "second", "d"]
    assert keys(ordered(LINES, "x", False)) == ["first", "a", "c", "b", "second", "d"]
    assert ordered(LINES, "", True) == list(LINES)


def test_a_filter_keeps_the_heading_of_what_it_finds():
    assert keys(filtered(LINES, "APPLE")) == ["first", "a", "second", "d"]
    assert keys(filtered(LINES, "plum")) == ["first", "c"]
    assert keys(filtered(LINES, "second")) == ["second", "d"]


def test_the_legend_explains_only_what_is_there():
    assert legend(LINES) == "★ best, or equal to it · ≈ 1 inside the noise floor"
    assert legend(LINES[-1:]) == ""
    assert legend(LINES, ["name"]) == ""


def test_another_reference_changes_speedups_not_times():
    (case,) = report_of(plan_of(names=("baseline", "poc", "practical"))).cases
    made = rebased(case, "poc")
    speedups = {row.implementation: row.speedup for row in made.rows}
    assert made.reference == "poc" and speedups["poc"].value == 1
    assert speedups["baseline"].value == pytest.approx(1 / case.rows[1].speedup.value, rel=1e-3)
    assert speedups["baseline"].significant and speedups["practical"].value < 0.03
    assert [row.call_s for row in made.rows] == [row.call_s for row in case.rows]
    fewer = structs.replace(case.rows[0], samples=case.rows[0].samples[:-1])
    unpaired = rebased(structs.replace(case, rows=(fewer, *case.rows[1:])), "poc")
    assert unpaired.rows[0].speedup.value == pytest.approx(speedups["baseline"].value, rel=0.01)
    assert rebased(case, "nobody") is case


def test_means_are_of_the_cases_over_the_reference():
    report = report_of(plan_of(tuple(Workload(seq=seq) for seq in (64, 128))))
    made = rebased_report(report, "poc")
    assert {line.implementation: line.speedup.value for line in made.summary}["poc"] == 1
    case = report.cases[0]
    rows = tuple(structs.replace(row, call_s=None) if row.implementation == "poc" else row for row in case.rows)
    made = rebased_report(structs.replace(report, cases=(structs.replace(case, rows=rows), report.cases[1])), "poc")
    assert references_text(made) == "baseline in 1 case, poc in 1 case"
    assert {line.cases for line in made.summary} == {1}
    assert "Speedups are relative to baseline in 1 case, poc in 1 case." in to_markdown(made)


@pytest.mark.thorough
async def test_the_comparison_is_filtered_and_shown_over_another_row(stage):
    await stage.run_to_the_end()
    table = stage.find("#comparison-table", RowTable)
    table.focus()
    await stage.press("slash", *"poc")
    assert [line.cells["implementation"] for line in table.lines] == ["poc", "demo"]
    await stage.press("escape")
    assert len(table.lines) == 4
    await stage.press("slash")
    stage.find("#comparison Input", Input).value = "[/b]"
    await stage.pilot.pause()
    assert not table.lines and "only '[/b]'" in stage.seen()
    await stage.press("escape")
    table.go_to("0:poc")
    await stage.press("b")
    assert table.lines[1].cells["speedup"] == "1" and "over poc" in str(stage.find("#comparison").border_subtitle)
    await stage.press("b")
    assert table.lines[0].cells["speedup"] == "1"


@pytest.mark.thorough
@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 55)])
async def test_compare_shows_drift_and_the_change_beyond_it(size):
    async with on_stage(size=size) as stage:
        stage.app.push_screen(Compare(*compared(mlx="0.33.0", blas="MKL")))
        await stage.pilot.pause()
        seen = stage.seen()
        assert "MLX: 0.32.4, then 0.33.0" in seen and "BLAS: OpenBLAS, then MKL" in seen
        assert "beyond the drift" in seen and "baseline itself ≈ 1" in seen and "same" in seen
        await stage.press("down", "enter")
        assert isinstance(stage.app.screen, ChangeDetails) and "first call" in stage.seen()
        await stage.press("escape", "b")
        assert "poc itself" in stage.seen()
        await stage.press("slash", *"demo", "enter")
        assert [line.cells["implementation"] for line in stage.find("#changes", RowTable).lines[1:]] == ["demo"]
        await stage.press("escape")
        assert len(stage.find("#changes", RowTable).lines) == 5
        await stage.press("escape")
        assert stage.app.screen is stage.app.main


@pytest.mark.thorough
async def test_runs_in_turns_are_compared_without_a_reference(stage):
    runs = (structs.replace(each, run=structs.replace(each.run, in_turns="both")) for each in compared())
    stage.app.push_screen(Compare(*runs))
    await stage.pilot.pause()
    assert "measured in turns: times are compared as they are" in stage.seen()
    table = stage.find("#changes", RowTable)
    assert not any(line.cells["word"] == "reference" for line in table.lines[1:])
    assert not {"drift", "times"} & {column.name for page in table.pages for column in page}
    assert "beyond the drift" not in stage.seen() and "after / before" in stage.seen()
    await stage.press("enter")
    seen = stage.seen()
    assert isinstance(stage.app.screen, ChangeDetails) and "round by round" in seen and "n/a" not in seen


@pytest.mark.slow
async def test_the_history_is_ordered_and_filtered(stage):
    for number, preset in enumerate(("quick", "scaling", "quick")):
        run = structs.replace(run_of(preset=preset, identity=f"{number}" * 8), seconds=float(3 - number))
        RunHistory().add(report_of(run=run))
    await stage.press("h")
    table = stage.find("#runs", RowTable)
    await stage.settle(lambda: len(table.lines) == 3)
    stage.find("#history-pane").order_by("seconds", True)
    assert keys(table.lines) == ["0" * 8, "1" * 8, "2" * 8]
    await stage.press("slash", *"scaling", "enter")
    assert keys(table.lines) == ["1" * 8] and not stage.app.screen.query(".filter")
    await stage.press("escape")
    assert len(table.lines) == 3
    await stage.press("escape")
    assert stage.app.screen is stage.app.main


@pytest.mark.slow
async def test_presets_are_filtered_and_ordered(stage):
    await stage.press("p")
    table = stage.find("#preset-list", RowTable)
    count = len(table.lines)
    await stage.press("slash", *"llama", "enter")
    assert 0 < len(table.lines) < count
    await stage.press("escape")
    stage.find("#presets-pane").order_by("cases", True)
    cases = [int(line.cells["cases"]) for line in table.lines]
    assert cases == sorted(cases, reverse=True)


@pytest.mark.slow
async def test_notes_below_the_last_row_are_scrolled_to():
    async with on_stage(size=(80, 24)) as stage:
        stage.app.open_report(stream_report("tiny-llama"))
        await stage.settle(lambda: len(stage.app.screen_stack) > 1)
        table = stage.find("#model-rows", RowTable)
        await stage.settle(lambda: bool(table.lines))
        await stage.press("end", *["down"] * len(table.lines))
        assert table.scroll_offset.y == table.max_scroll_y > 0


def test_a_first_call_excludes_what_was_compiled_before_it():
    case = report_of().cases[0]
    (line,) = [text for text in figure_lines(case.rows[0], case) if text.startswith("first call")]
    assert "timed apart" in line and "including compilation" not in line


def test_rows_that_skipped_other_rounds_are_not_paired():
    (case,) = report_of(plan_of(names=("baseline", "poc", "practical"))).cases
    slow = [0.001 * (1 + number) for number in range(12)]  # a machine that gets slower: halves of different rounds
    rows = tuple(
        structs.replace(row, samples=tuple(slow[first::step]), call_s=median_interval(slow[first::step]))
        for row, first, step in zip(case.rows, (0, 0, 1), (1, 2, 2), strict=True)
    )
    made = rebased(structs.replace(case, rows=rows), "poc")
    practical = made.rows[2].speedup
    assert practical.low < 0.6 and practical.high > 1.2  # in pairs of rounds it would be 0.5 to 0.92


async def test_a_file_whose_path_has_a_blank_becomes_the_reference(stage):
    def renamed(report):
        (case,) = report.cases
        rows = [structs.replace(row, implementation="my own/a.py:Fast") for row in case.rows if row.fused]
        return structs.replace(report, cases=(structs.replace(case, rows=(case.rows[0], *rows)),))

    stage.app.push_screen(Compare(*map(renamed, compared())))
    await stage.pilot.pause()
    await stage.press("down", "b")
    assert "my own/a.py:Fast itself" in stage.seen()
