"""The report on counterparts: sparse patterns over dense, quantized keys and values over unquantized; break-even."""

from typing import Any

import pytest
from msgspec import structs

from attention.core.results import Case, Interval, ModelCase, ModelRow, Ratio, Row
from attention.core.workload import Generation, Workload
from fatui.report import charts
from fatui.report.charts import density_charts, format_charts
from fatui.report.counterparts import (
    by_length,
    density_break_even,
    density_break_even_text,
    density_points,
    format_points,
    formats_text,
    length_break_even,
    length_break_even_text,
    quantized_blocks,
    sparse_blocks,
)
from fatui.report.document import Claim, Table


def ratio(value: float, *, significant: bool = True) -> Ratio:
    """Return a speedup with an interval of 2 %."""
    return Ratio(value=value, low=value * 0.99, high=value * 1.01, significant=significant)


def row_of(status: str, **figures: Any) -> Row:
    """Return a row of poc whose calls take a second."""
    second = Interval(median=1.0, low=0.99, high=1.01)
    return Row(implementation="poc", status=status, call_s=second, samples=(1.0,) * 8, **figures)  # type: ignore[arg-type]


def time_of(over: Ratio | None) -> Interval | None:
    """Return the time of the counterpart of calls that take a second."""
    return Interval(median=over.value, low=over.low, high=over.high) if over else None


def masked(mask: str, over_dense: Ratio | None, status: str = "ok") -> Case:
    """Return a case with a row of poc."""
    row = row_of(status, over_dense=over_dense, dense_s=time_of(over_dense))
    return Case(workload=Workload(mask=mask, seq=1280, heads=2), reference="poc", rows=(row,))


DENSITIES = (
    masked("blocks:1", ratio(0.8)),
    masked("blocks:0.9", ratio(1.001, significant=False)),
    masked("blocks:0.5", ratio(1.6)),
    masked("window:100", ratio(9.0)),
    masked("blocks:0.1", ratio(7.0)),
)


def test_break_even_is_between_the_clear_neighbours() -> None:
    points = density_points(DENSITIES, "poc")
    masks = ["window:100", "blocks:0.1", "blocks:0.5", "blocks:0.9", "blocks:1"]
    assert [point.workload.mask for point in points] == masks
    found = density_break_even(points[1:])
    assert found is not None
    assert (found.low, found.high) == (0.5, 1.0)
    # shares of dense time: 0.625 at 0.5 and 1.25 at 1; linear between, 1 is reached at 0.8
    assert found.density == pytest.approx(0.8)
    assert "breaks even with dense at a density of about 0.8" in (density_break_even_text("poc", points) or "")


def test_without_a_slower_density_there_is_no_break_even() -> None:
    points = density_points(DENSITIES[2:], "poc")
    assert density_break_even(points) is None
    text = density_break_even_text("poc", points)
    assert text == "poc is faster than dense with random blocks at densities from 0.1 to 0.5"
    unclear = density_points(DENSITIES[1:], "poc")
    assert (
        density_break_even_text("poc", unclear) == f"{text}; at the other densities measured noise hides the difference"
    )


def test_noise_and_unsound_rows_support_no_break_even() -> None:
    noise = [masked(f"blocks:{each}", ratio(1.01, significant=False)) for each in (0.1, 0.5, 1)]
    assert density_break_even_text("poc", density_points(noise, "poc")) is None
    assert density_points([masked("blocks:0.5", ratio(2.0), "inaccurate"), masked("causal", None)], "poc") == []


def test_sparse_patterns_have_claims_and_a_table_by_density() -> None:
    blocks = sparse_blocks(DENSITIES, ["poc", "demo"])
    claims = [block.text for block in blocks if isinstance(block, Claim)]
    assert any("breaks even" in claim for claim in claims)
    assert any("poc, 9.00 ±0.09x on" in claim and "window:100" in claim for claim in claims)
    (table,) = (block for block in blocks if isinstance(block, Table))
    assert table.heads == ("case", "visible pairs", "dense / visible", "poc", "demo")
    masks = ["blocks:1", "blocks:0.9", "blocks:0.5", "blocks:0.1", "window:100"]
    assert [row[0].rpartition(" ")[2] for row in table.rows] == masks
    assert table.rows[2][1:] == ("50 %", "2.00", "1.60 ±0.02x", "-")
    assert sparse_blocks([masked("causal", None)], ["poc"]) == []


@pytest.mark.thorough
@pytest.mark.skipif(not charts.available(), reason="matplotlib is not installed")
def test_the_report_draws_time_by_density_with_break_even() -> None:
    [chart] = density_charts(DENSITIES, ["poc", "mlx"])
    assert chart.title == "Time of random blocks over dense time by density, B=1 L=1280 D=64 H=2 float16"
    for words in ("poc breaks even: 0.8", "pairs", "times dense"):
        assert words in chart.svg
    assert density_charts(DENSITIES[:1], ["poc"]) == []
    [without] = density_charts(DENSITIES[2:], ["poc"])
    assert "breaks even" not in without.svg


def quantized(
    kv_format: str, over: float | None, *, kv_seq: int = 1024, clear: bool = True, status: str = "ok"
) -> Case:
    """Return a case with a row of poc, `over` times as fast as with unquantized keys and values."""
    speedup = None if over is None else ratio(over, significant=clear)
    row = row_of(status, over_unquantized=speedup, unquantized_s=time_of(speedup), kv_error=0.11)
    return Case(workload=Workload(pass_="decode", kv_seq=kv_seq, kv_format=kv_format), reference="poc", rows=(row,))


FORMATS = (
    quantized("int3", 0.8),
    quantized("int8", 1.5),
    quantized("none", None),
    quantized("int4", 2.0),
    quantized("nvfp4", 1.0, clear=False),
)
LENGTHS = (
    quantized("int4", 1.9, kv_seq=4096),
    quantized("int4", 0.7, kv_seq=256),
    quantized("int4", 1.0, kv_seq=512, clear=False),
    quantized("int4", 1.3, kv_seq=1024),
)


def test_points_go_by_bits_with_their_scales() -> None:
    points = format_points(FORMATS, "poc")
    assert [(point.workload.kv_format, point.bits) for point in points] == [
        *(("int8", 8.5), ("int4", 4.5), ("nvfp4", 4.5), ("int3", 3.5))
    ]
    assert FORMATS[2].workload.value_bits == 16


def test_formats_are_reported_by_gain_and_loss() -> None:
    text = formats_text("poc", format_points(FORMATS, "poc"))
    assert text == (
        "poc gains most with int4, 2.00 ±0.02x as fast as with float16, 3.56x less memory, K/V error 11 %; "
        "it also gains with int8; it loses with int3"
    )
    assert formats_text("poc", format_points([quantized("int8", 1.0, clear=False)], "poc")) is None


def test_a_format_breaks_even_between_clear_lengths() -> None:
    points = format_points(LENGTHS, "poc")
    found = length_break_even(points)
    assert found is not None
    assert (found.slower, found.faster) == (256, 1024)
    assert "poc with keys and values in int4 breaks even with float16 between 256 keys" in (
        length_break_even_text("poc", points) or ""
    )
    faster = length_break_even_text("poc", format_points([LENGTHS[0], LENGTHS[3]], "poc"))
    assert faster == (
        "poc with keys and values in int4 is faster than with float16 at every length measured, 1,024 to 4,096 keys"
    )
    assert length_break_even_text("poc", format_points(LENGTHS[:1], "poc")) is None
    at_one_length = [quantized("int4", 0.7, kv_seq=1024), quantized("int4", 1.3, kv_seq=1024)]
    assert length_break_even(format_points(at_one_length, "poc")) is None


def test_a_row_over_many_keys_is_not_grouped_with_squares() -> None:
    workloads = [Workload(seq=seq, kv_seq=kv_seq, kv_format="int4") for seq, kv_seq in ((1, 1024), (512, 512))]
    cases = [Case(workload=workload, reference="poc", rows=()) for workload in workloads]
    assert len(by_length(cases)) == 2


def test_unsound_quantized_rows_support_nothing() -> None:
    assert format_points([quantized("int4", 2.0, status="inaccurate")], "poc") == []
    assert quantized_blocks([FORMATS[2]], [], ["poc"]) == []


def test_quantized_ones_have_findings_and_a_table_of_formats() -> None:
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


@pytest.mark.thorough
@pytest.mark.skipif(not charts.available(), reason="matplotlib is not installed")
def test_charts_show_speed_and_error_over_the_formats() -> None:
    speed, error = format_charts(FORMATS, ["poc"])
    assert speed.title == "Speedup over unquantized keys and values, B=1 L=1x1024 D=64 H=8 float16 decode"
    assert all(word in speed.svg for word in ("int8", "8.5 bits", "nvfp4", "times unquantized"))
    assert "Error" in error.title
    assert format_charts(FORMATS[:1], ["poc"]) == []


@pytest.mark.thorough
@pytest.mark.skipif(not charts.available(), reason="matplotlib is not installed")
def test_a_chart_shows_speed_over_length_by_format() -> None:
    (chart,) = format_charts(LENGTHS, ["poc"])
    assert chart.title.startswith("Speedup of poc over unquantized keys and values by length, B=1 D=64 H=8 float16")
    assert all(word in chart.svg for word in ("int4", "unquantized", "4096"))


def test_a_quantized_case_on_ranks_has_no_counterpart() -> None:
    divided = Case(workload=Workload(kv_format="int4", ranks=2), reference=None, rows=())
    assert quantized_blocks([divided], [], ["poc"]) == []
    assert format_charts([divided], ["poc"]) == []


def test_cases_of_two_shapes_are_apart() -> None:
    wide = structs.replace(FORMATS[0], workload=structs.replace(FORMATS[0].workload, heads=16, kv_heads=16))
    claims = [block for block in quantized_blocks([FORMATS[3], wide], [], ["poc"]) if isinstance(block, Claim)]
    assert len(claims) == 2
