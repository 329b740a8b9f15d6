"""The Chips screen: the case on chips that are not here."""

import pytest

from attention.core.results import Peaks
from attention.core.workload import Workload
from fatui.tui.screens.chips import Chips
from fatui.tui.view_models import chips
from fatui.tui.view_models.roofline import ROOF
from tests.support.sample_runs import report_of
from tests.support.stage import on_stage

PREFILL = Workload(seq=8192, heads=16, head_dim=128, dtype="bfloat16", mask="causal")


def test_each_chip_has_a_roof_and_this_machine_a_measured_one():
    report = report_of()
    made = chips.predict_chips(PREFILL, ("mlx",), ("h200", "m4-max"), {})
    plot = chips.plot(PREFILL, made, report.peaks)
    assert plot is not None
    roofs = {line.number for line in plot.lines if len(line.points) == 3 or line.number == ROOF}
    assert ROOF in roofs and {0, 1} <= {line.number for line in plot.lines}
    words = [note.words for note in plot.notes]
    assert {"h200", "m4-max", "this machine"} <= set(words)
    predicted = [note for note in plot.notes if note.sign == chips.PREDICTED]
    assert predicted[0].y > predicted[1].y  # the faster chip's point is higher


def test_only_the_first_chip_has_other_figures():
    made = chips.predict_chips(PREFILL, ("mlx",), ("h200", "h100"), {"bandwidth": 200, "rate": 100})
    assert made.chips[0].changed == ("bytes_per_s",)
    assert made.chips[1].changed == ()


def test_words_say_what_is_measured_and_what_is_predicted():
    report = report_of()
    made = chips.predict_chips(PREFILL, ("mlx",), ("h200", chips.NONE), {})
    said = "\n".join(chips.description_lines(PREFILL, made, report.peaks))
    assert said.startswith("this machine, measured.")
    assert "mlx predicted" in said and "Calibrated on" in said


def test_a_chip_beside_itself_keeps_its_own_predictions():
    made = chips.predict_chips(PREFILL, ("mlx",), ("h200", "h200"), {"rate": 50})
    plot = chips.plot(PREFILL, made, report_of().peaks)
    assert plot is not None
    assert [note.number for note in plot.notes if note.sign == chips.PREDICTED] == [0, 1]
    said = chips.description_lines(PREFILL, made, report_of().peaks)
    changed, itself = (number for number, line in enumerate(said) if line.startswith("NVIDIA H200"))
    assert [sum("mlx predicted" in line for line in part) for part in (said[changed:itself], said[itself:])] == [1, 1]


@pytest.mark.slow
async def test_a_slider_moves_the_case_and_a_figure_of_the_chip(stage):
    await stage.press("C")
    screen = stage.app.screen
    assert isinstance(screen, Chips)
    assert "predicted, not measured" in stage.seen()
    before = stage.app.draft.axes["seq"]
    screen.query_one("#axis-seq").focus()
    await stage.press("right")
    assert stage.app.draft.axes["seq"] > before
    screen.query_one("#factor-bandwidth").focus()
    await stage.press("right", "right")
    assert "* with changed figures" in stage.seen() and "125 %" in stage.seen()
    await stage.press("n")
    assert "changed figures" not in stage.seen()
    await stage.press("escape")
    assert not isinstance(stage.app.screen, Chips)


@pytest.mark.thorough
async def test_a_short_terminal_has_the_controls_without_the_roofs():
    async with on_stage(size=(60, 16)) as stage:
        await stage.press("C")
        assert not stage.app.screen.query_one("#chart-pane").display
        assert "What limits it" in stage.seen() and "heads" in stage.seen()


def test_a_case_on_several_devices_has_the_roofs_of_as_many():
    one, two = (Workload(seq=512, heads=8, ranks=ranks) for ranks in (1, 2))
    peaks = Peaks(matmul_flops_per_s=60e9, fma_flops_per_s=900e9, copy_bytes_per_s=12e9)
    tops = []
    for case in (one, two):
        made = chips.predict_chips(case, ("poc",), ("h200", chips.NONE), {})
        tops.append([max(point.y for point in line.points) for line in chips.plot(case, made, peaks).lines[:2]])
    assert tops[1] == pytest.approx([2 * top for top in tops[0]])
    assert "2 of each" in chips.title(two, made)
