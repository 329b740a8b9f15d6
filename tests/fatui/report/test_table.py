import io

import pytest
from msgspec import structs
from rich.cells import cell_len
from rich.console import Console

from attention.core import events as on
from attention.core.route import FALLS_BACK, Route
from attention.core.workload import Workload
from fatui import formatting
from fatui.report.export import to_csv, to_markdown
from fatui.report.study import beside, study
from fatui.report.table import report_table
from fatui.storage import presets
from tests.support.sample_runs import plan_of, record_of, report_of, run_of

LONG = "some/folder/of/mine/my_very_long_file_name.py:MyVeryLongImplementation"
WIDE = Workload(
    batch=16,
    seq=16384,
    kv_seq=32768,
    heads=64,
    kv_heads=8,
    head_dim=128,
    value_dim=64,
    dtype="bfloat16",
    mask="causal",
    pass_="training",
)


def printed(report, width: int, shown_study=None) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(report_table(report, shown_study, width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(("width", "own"), [(100, "mine.py:A"), (140, LONG)])
def test_everything_fits_also_with_long_names_and_large_figures(width, own):
    record = record_of(plan_of([WIDE, Workload(seq=64)], ["baseline", "practical", own, "demo"]))
    record.apply(on.RowEnded(case=1, implementation="demo", status="unsupported", reason="a reason " * 20))
    lines = printed(record.report(run_of()), width)
    text = "\n".join(lines)
    assert max(map(cell_len, lines)) <= width
    for head in ("path", "tokens/s", "per call", "speedup", "FLOP/s", "of peak", "memory", "error", "verdict"):
        assert head in text
    assert text.count("…") == (
        5 if own == LONG else 0
    )  # the long name alone: in two tables, explained below each, and in the means
    assert "no room" not in text


def test_a_fallback_is_explained_below_its_table():
    record = record_of(plan_of([Workload(seq=64)], ["baseline", "poc"]))
    route = Route(path=f"{FALLS_BACK}MLX SDPA", fused=False, reason="no CPU kernel: compiling failed", fallback=True)
    record.apply(on.RouteFound(case=0, implementation="poc", route=route))
    assert "  poc: no CPU kernel: compiling failed" in printed(record.report(run_of()), 100)


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_drops_columns_and_says_so(width):
    lines = printed(report_of(plan_of([Workload(seq=64)])), width)
    text = "\n".join(lines)
    assert max(map(cell_len, lines)) <= width
    for head in ("tokens/s", "speedup", "verdict"):
        assert head in text
    assert "no room for" in text and "FLOP/s" in text


@pytest.mark.parametrize("width", [100, 80])
def test_the_speedup_over_dense_stays_in_a_narrow_table(width):
    report = report_of(plan_of([Workload(seq=256, mask="window:32"), Workload(seq=256)]))
    masked, dense = "\n".join(printed(report, width)).split("2 of 2 ·")
    assert max(map(cell_len, printed(report, width))) <= width
    assert "over dense" in masked
    first = next(line for line in masked.splitlines() if line.startswith("poc"))
    assert formatting.speedup_text(report.cases[0].rows[1].over_dense) in first
    assert next(line for line in dense.splitlines() if line.startswith("poc")).count("x") == 1


def max_gain(report):
    gains = [row.over_unquantized for row in report.cases[0].rows]
    return max(gains, key=lambda ratio: ratio.value)


@pytest.mark.parametrize("width", [100, 80])
def test_quantized_cases_have_speedup_error_and_bytes(width):
    report = report_of(plan_of([Workload(seq=256, kv_format="int4"), Workload(seq=256)]))
    quantized, plain = "\n".join(printed(report, width)).split("2 of 2 ·")
    assert max(map(cell_len, printed(report, width))) <= width
    assert "K/V speedup" in quantized
    first = next(line for line in quantized.splitlines() if line.startswith("poc"))
    assert f"{formatting.speedup_text(report.cases[0].rows[1].over_unquantized)}" in first
    assert "11 %" in first
    assert "K/V in int4: 576 B a token, 144 KiB in all, 3.56x less than float16" in quantized
    assert "K/V in int4:" not in plain
    gain = formatting.speedup_text(max_gain(report))
    assert f"with K/V in int4 is {gain} as fast as unquantized" in " ".join(plain.split())


def test_the_energy_of_a_token_is_a_column_where_it_is_known():
    record = record_of(plan_of(names=["baseline", "poc"]))
    without = printed(record.report(run_of()), 140)
    record.apply(on.EnergyMeasured(case=0, implementation="poc", joules=0.5))
    report = record.report(run_of())
    table = "\n".join(printed(report, 140))
    assert "J/token" not in "\n".join(without)
    assert "J/token" in table and "3.91 mJ" in table  # of 128 tokens
    assert "3.91 mJ" not in "\n".join(printed(report, 60))
    assert "| J/token |" in to_markdown(report)
    assert ",0.00390625," in to_csv(report)


def test_the_title_names_the_reference_and_the_noise_floor():
    assert "speedup over baseline, noise floor 0.5 %" in printed(report_of(), 100)[0]


def test_several_cases_end_with_their_geometric_means():
    text = "\n".join(printed(report_of(plan_of([Workload(seq=64), Workload(seq=128)])), 100))
    assert "geometric mean over 2 cases" in text
    assert "geometric mean" not in "\n".join(printed(report_of(), 100))


def test_what_did_not_run_says_why_below_the_table():
    record = record_of(plan_of())
    record.apply(on.RowEnded(case=0, implementation="poc", status="refused", reason="needs 41 GiB of 22"))
    assert "  poc: refused: needs 41 GiB of 22" in printed(record.report(run_of()), 100)


def test_a_failure_is_told_once():
    report = report_of()
    reason = "killed by signal 9 (SIGKILL)"
    rows = tuple(
        structs.replace(row, status="failed", reason=reason, call_s=None, speedup=None)
        if row.implementation == "demo"
        else row
        for row in report.cases[0].rows
    )
    report = structs.replace(report, cases=(structs.replace(report.cases[0], rows=rows),))
    lines = printed(report, 120)
    assert [line.strip() for line in lines if reason in line] == [f"demo: failed: {reason}"]
    assert any("Use poc" in line for line in lines)


def test_the_studys_figures_are_its_own_and_marked():
    report = report_of(presets.load("seed-table").plan(), run_of("seed-table"))
    text = "\n".join(printed(report, 100, beside(report)))
    assert "Apple M3 Max" in text and "not measured here" in text and "cold start" in text
    for figure in ("3,083*", "99,298*", "82,367*", "32.2x*", "26.7x*", "1,481,943", "1,569,569", "0.71x", "1.30x"):
        assert figure in text
    assert len(study().rows) == 6
    assert all(study().row_for(case.workload) for case in report.cases)


def test_other_runs_have_no_study_beside_them():
    assert beside(report_of()) is None


@pytest.mark.parametrize("width", range(72, 124, 4))
def test_a_path_wraps_into_two_lines_at_most(width):
    names = ["baseline", "poc", "demo"]
    record = record_of(plan_of([Workload(seq=64, ranks=2)], names))
    for name, path in zip(names, ("manual, unfused", "CPU kernel avx512_bf16", "tuned: poc"), strict=True):
        route = Route(path=f"x2 {path}", fused=False, reason="a reason")
        record.apply(on.RouteFound(case=0, implementation=name, route=route))
    lines = printed(record.report(run_of()), width)
    first = next(number for number, line in enumerate(lines) if line.startswith("baseline"))
    last = next(number for number, line in enumerate(lines) if line.startswith("demo"))
    assert last - first <= 4
    assert "x2" not in "".join(lines[first : last + 1])  # the title says it
