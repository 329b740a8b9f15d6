"""The report on quantized keys and values: by format, by length, and what supports it."""

import pytest
from msgspec import structs

from attention.core.results import Case, Interval, ModelCase, ModelRow, Ratio, Row
from attention.core.workload import Generation, Workload
from fatui.report import charts
from fatui.report.charts import format_charts
from fatui.report.document import Claim, Table
from fatui.report.quantized import (
    break_even,
    break_even_text,
    by_length,
    format_points,
    formats_text,
    quantized_blocks,
)


def case(kv_format: str, over: float | None, *, kv_seq: int = 1024, clear: bool = True, status: str = "ok") -> Case:
    """Return a case with a row of poc, `over` times as fast as with unquantized keys and values."""
    ratio = None if over is None else Ratio(value=over, low=over * 0.99, high=over * 1.01, significant=clear)
    row = Row(
        implementation="poc",
        status=status,  # type: ignore[arg-type]
        call_s=Interval(median=1.0, low=0.99, high=1.01),
        samples=(1.0,) * 8,
        over_unquantized=ratio,
        unquantized_s=ratio and Interval(median=ratio.value, low=ratio.low, high=ratio.high),
        kv_error=0.11,
    )
    return Case(workload=Workload(pass_="decode", kv_seq=kv_seq, kv_format=kv_format), reference="poc", rows=(row,))


FORMATS = (case("int3", 0.8), case("int8", 1.5), case("none", None), case("int4", 2.0), case("nvfp4", 1.0, clear=False))
LENGTHS = (
    case("int4", 1.9, kv_seq=4096),
    case("int4", 0.7, kv_seq=256),
    case("int4", 1.0, kv_seq=512, clear=False),
    case("int4", 1.3, kv_seq=1024),
)


def test_points_go_by_bits_with_their_scales() -> None:
    points = format_points(FORMATS, "poc")
    assert [(point.workload.kv_format, point.bits) for point in points] == [
        *(("int8", 8.5), ("int4", 4.5), ("nvfp4", 4.5), ("int3", 3.5))
    ]
    assert FORMATS[2].workload.value_bits == 16


def test_formats_are_told_by_gain_and_loss() -> None:
    text = formats_text("poc", format_points(FORMATS, "poc"))
    assert text == (
        "poc gains most with int4, 2.00 ±0.02x as fast as with float16, 3.56x less memory, K/V error 11 %; "
        "it also gains with int8; it loses with int3"
    )
    assert formats_text("poc", format_points([case("int8", 1.0, clear=False)], "poc")) is None


def test_a_format_breaks_even_between_clear_lengths() -> None:
    points = format_points(LENGTHS, "poc")
    found = break_even(points)
    assert found is not None
    assert (found.slower, found.faster) == (256, 1024)
    assert "poc with keys and values in int4 breaks even with float16 between 256 keys" in (
        break_even_text("poc", points) or ""
    )
    faster = break_even_text("poc", format_points([LENGTHS[0], LENGTHS[3]], "poc"))
    assert faster == (
        "poc with keys and values in int4 is faster than with float16 at every length measured, 1,024 to 4,096 keys"
    )
    assert break_even_text("poc", format_points(LENGTHS[:1], "poc")) is None
    at_one_length = [case("int4", 0.7, kv_seq=1024), case("int4", 1.3, kv_seq=1024)]
    assert break_even(format_points(at_one_length, "poc")) is None


def test_a_forward_row_over_many_keys_is_not_grouped_with_squares() -> None:
    workloads = [Workload(seq=seq, kv_seq=kv_seq, kv_format="int4") for seq, kv_seq in ((1, 1024), (512, 512))]
    cases = [Case(workload=workload, reference="poc", rows=()) for workload in workloads]
    assert len(by_length(cases)) == 2


def test_unsound_rows_support_nothing() -> None:
    assert format_points([case("int4", 2.0, status="inaccurate")], "poc") == []
    assert quantized_blocks([FORMATS[2]], [], ["poc"]) == []


def test_the_section_has_findings_and_a_table_of_all_formats() -> None:
    blocks = quantized_blocks([*FORMATS, *LENGTHS[:3]], [], ["poc", "demo"])
    claims = [block.text for block in blocks if isinstance(block, Claim)]
    assert any(text.endswith("(B=1 L=1x1024 D=64 H=8 float16 decode).") for text in claims)
    assert any("breaks even" in text and text.endswith("(B=1 D=64 H=8 float16 decode).") for text in claims)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.rows[0][:7] == (
        *("B=1 L=1x1024 D=64 H=8 float16 decode", "int8", "8.50", "1.06 KiB", "1.06 MiB", "1.88x", "11 %"),
    )
    assert table.rows[0][7:] == ("1.50 ±0.02x",), "demo has no row"
    assert [row[1] for row in table.rows[:4]] == ["int8", "int4", "nvfp4", "int3"]


def test_models_caches_are_beside_the_unquantized_one() -> None:
    def model(kv_format: str, phase: str = "decode") -> ModelCase:
        row = ModelRow(
            implementation="poc",
            status="ok",
            tokens_per_second=50.0,
            call_s=Interval(median=0.02, low=0.02, high=0.02),
            samples=(0.02,) * 8,
            kl_divergence=None if kv_format == "none" else 0.0012,
            over_unquantized=FORMATS[1].rows[0].over_unquantized if kv_format != "none" else None,
        )
        work = Generation(model="m", phase=phase, prompt=8, layers=2, kv_format=kv_format)  # type: ignore[arg-type]
        return ModelCase(workload=work, reference="poc", rows=(row,), kv_token_bytes=1024, cache_bytes=2**20)

    (table,) = quantized_blocks([], [model("none"), model("int4"), model("none", "prefill")], ["poc"])
    assert isinstance(table, Table)
    assert [row[1:] for row in table.rows] == [
        ("poc", "50.0", "-", "1 MiB", "1 KiB", "-"),
        ("poc", "50.0", "1.50 ±0.02x", "1 MiB", "1 KiB", "1.2e-3"),
    ]


@pytest.mark.skipif(not charts.available(), reason="matplotlib is not installed")
def test_charts_show_speed_and_error_over_the_formats() -> None:
    speed, error = format_charts(FORMATS, ["poc"])
    assert speed.title == "Speedup over unquantized keys and values, B=1 L=1x1024 D=64 H=8 float16 decode"
    assert all(word in speed.svg for word in ("int8", "8.5 bits", "nvfp4", "times unquantized"))
    assert "Error" in error.title
    assert format_charts(FORMATS[:1], ["poc"]) == []


@pytest.mark.skipif(not charts.available(), reason="matplotlib is not installed")
def test_a_chart_shows_speed_over_the_length_with_a_line_of_unquantized_ones() -> None:
    (chart,) = format_charts(LENGTHS, ["poc"])
    assert chart.title.startswith("Speedup of poc over unquantized keys and values by length, B=1 D=64 H=8 float16")
    assert all(word in chart.svg for word in ("int4", "unquantized", "4096"))


def test_cases_of_two_shapes_are_apart() -> None:
    wide = structs.replace(FORMATS[0], workload=structs.replace(FORMATS[0].workload, heads=16, kv_heads=16))
    claims = [block for block in quantized_blocks([FORMATS[3], wide], [], ["poc"]) if isinstance(block, Claim)]
    assert len(claims) == 2
