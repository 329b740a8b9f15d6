"""The report's section on streams, and the curves over position."""

import pytest
from msgspec import structs

from attention.core.results import Report
from attention.core.stream import FULL, STREAMING
from fatui.report import charts
from fatui.report.compose import compose
from fatui.report.document import Document, section, to_html, to_markdown
from fatui.report.stream_curves import drawn, loss_chart, memory_chart, text_chart, time_chart
from fatui.report.streaming import stream_blocks
from tests.support.streams import stream_report


def section_of(*reports: Report) -> str:
    cases = [case for report in reports for case in report.streams]
    return to_markdown(Document("", (section("Streaming", stream_blocks(cases)),)))


def test_the_section_states_cost_flatness_and_extrapolation() -> None:
    text = section_of(stream_report(drift=0.1))
    assert "over 100,000 tokens" in text
    assert "by at most 7.9 %" in text
    assert "(extrapolated from 16,384 keys)" in text
    assert "reading what a token needs takes 48 % of its time" in text


def test_the_section_compares_losses_of_models() -> None:
    text = section_of(stream_report("tiny-llama"))
    assert "1.400 nats a token with streaming" in text
    assert "recomputed windows 1.420 (+1.4%)" in text
    assert "full attention, as far as it was measured, 4.000 (+185.7%)" in text


def test_without_a_stream_the_section_says_how_to_measure_one() -> None:
    assert "fatui stream --tokens 100000" in section_of()


@pytest.mark.slow
@pytest.mark.skipif(not charts.available(), reason="matplotlib is not installed")
def test_the_page_has_curves_and_extrapolation() -> None:
    page = to_html(compose([stream_report("tiny-llama")]))
    for title in ("time per token", "resident memory", "loss per token"):
        assert f"<figcaption>{title}" in page
    assert "full, extrapolated" in page


def test_full_attention_is_extrapolated_as_dots() -> None:
    chart = time_chart(stream_report().streams[0])
    full = next(curve for curve in chart.curves if curve.name == FULL)
    assert full.extrapolated[0] == full.points[-1]
    assert full.extrapolated[-1] == pytest.approx((100_000, 1.02e-3))
    cells = drawn(chart, 40, 10)
    assert [character for character, _ in cells[-2]].count("━") == 40  # flat, near zero
    assert cells[0][-1][0] == "·"
    assert cells[0][0][0] == " "


def test_a_busy_moment_does_not_set_the_axis() -> None:
    case = stream_report().streams[0]
    rows = {row.implementation: row for row in case.rows}
    blocks = [*rows[STREAMING].blocks]
    blocks[100:104] = [structs.replace(block, seconds=1.0) for block in blocks[100:104]]
    busy = structs.replace(rows[STREAMING], blocks=tuple(blocks))
    assert time_chart(structs.replace(case, rows=(busy,))).high < 2e-3


def test_losses_that_explode_stay_at_the_edge() -> None:
    chart = loss_chart(stream_report("tiny-llama").streams[0])
    assert chart.low == 0
    assert chart.high == pytest.approx(1.3 * 1.5)
    assert drawn(chart, 30, 8)[0][0][0] == "●"


def test_memory_is_that_of_bounded_rows() -> None:
    assert [curve.name for curve in memory_chart(stream_report().streams[0]).curves] == [STREAMING]


def test_a_text_chart_fits_its_width() -> None:
    lines = text_chart(time_chart(stream_report().streams[0]), 60, 6)
    assert max(map(len, lines)) <= 60
    assert lines[7].endswith("100,000 tokens")
    assert "full, extrapolated: 1.02 ms" in "\n".join(lines[8:])
