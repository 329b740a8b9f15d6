"""The report on sparse patterns: points, break-even and what supports them."""

import pytest

from attention.core.results import Case, Interval, Ratio, Row
from attention.core.workload import Workload
from fatui.report.document import Claim, Table
from fatui.report.sparse import break_even, break_even_text, density_points, sparse_blocks


def ratio(value: float, *, significant: bool = True) -> Ratio:
    """Return a speedup with an interval of 2 %."""
    return Ratio(value=value, low=value * 0.99, high=value * 1.01, significant=significant)


def case(mask: str, over_dense: Ratio | None, status: str = "ok") -> Case:
    """Return a case with a row of poc."""
    dense = Interval(median=over_dense.value, low=over_dense.low, high=over_dense.high) if over_dense else None
    row = Row(
        implementation="poc",
        status=status,  # type: ignore[arg-type]
        call_s=Interval(median=1.0, low=0.99, high=1.01),
        samples=(1.0,) * 8,
        over_dense=over_dense,
        dense_s=dense,
    )
    return Case(workload=Workload(mask=mask, seq=1280, heads=2), reference="poc", rows=(row,))


SWEEP = (
    case("blocks:1", ratio(0.8)),
    case("blocks:0.9", ratio(1.001, significant=False)),
    case("blocks:0.5", ratio(1.6)),
    case("window:100", ratio(9.0)),
    case("blocks:0.1", ratio(7.0)),
)


def test_break_even_is_between_the_clear_neighbours() -> None:
    points = density_points(SWEEP, "poc")
    masks = ["window:100", "blocks:0.1", "blocks:0.5", "blocks:0.9", "blocks:1"]
    assert [point.workload.mask for point in points] == masks
    found = break_even(points[1:])
    assert found is not None
    assert (found.low, found.high) == (0.5, 1.0)
    # shares of dense time: 0.625 at 0.5 and 1.25 at 1; linear between, 1 is reached at 0.8
    assert found.density == pytest.approx(0.8)
    assert "breaks even with dense at a density of about 0.8" in (break_even_text("poc", points) or "")


def test_without_a_slower_density_there_is_no_break_even() -> None:
    points = density_points(SWEEP[2:], "poc")
    assert break_even(points) is None
    text = break_even_text("poc", points)
    assert text == "poc is faster than dense with random blocks at densities from 0.1 to 0.5"
    unclear = density_points(SWEEP[1:], "poc")
    assert break_even_text("poc", unclear) == f"{text}; at the other densities measured noise hides the difference"


def test_noise_and_unsound_rows_support_nothing() -> None:
    noise = [case(f"blocks:{each}", ratio(1.01, significant=False)) for each in (0.1, 0.5, 1)]
    assert break_even_text("poc", density_points(noise, "poc")) is None
    assert density_points([case("blocks:0.5", ratio(2.0), "inaccurate"), case("causal", None)], "poc") == []


def test_the_section_has_claims_and_a_table_by_density() -> None:
    blocks = sparse_blocks(SWEEP, ["poc", "demo"])
    claims = [block.text for block in blocks if isinstance(block, Claim)]
    assert any("breaks even" in claim for claim in claims)
    assert any("poc, 9.00 ±0.09x on" in claim and "window:100" in claim for claim in claims)
    (table,) = (block for block in blocks if isinstance(block, Table))
    assert table.heads == ("case", "visible pairs", "dense / visible", "poc", "demo")
    masks = ["blocks:1", "blocks:0.9", "blocks:0.5", "blocks:0.1", "window:100"]
    assert [row[0].rpartition(" ")[2] for row in table.rows] == masks
    assert table.rows[2][1:] == ("50 %", "2.00", "1.60 ±0.02x", "-")
    assert sparse_blocks([case("causal", None)], ["poc"]) == []


def test_the_report_draws_the_time_by_density_and_names_the_break_even() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from fatui.report.charts import density_charts

    [chart] = density_charts(SWEEP, ["poc", "mlx"])
    assert chart.title == "Time of random blocks over dense time by density, B=1 L=1280 D=64 H=2 float16"
    for words in ("poc breaks even: 0.8", "pairs", "times dense"):
        assert words in chart.svg
    assert density_charts(SWEEP[:1], ["poc"]) == []
    [without] = density_charts(SWEEP[2:], ["poc"])
    assert "breaks even" not in without.svg
