"""The check of predictions: what it counts, and that the shipped constants are those of the kept rows."""

from collections import Counter

import msgspec
import pytest
from msgspec import structs

from attention.chips.calibration import Measured
from attention.chips.prediction import Prediction, calibration
from attention.chips.table import chips
from attention.core.results import Interval, digest_of
from attention.core.workload import Workload
from attention.measure.device import processor_name
from benchmarks import chips as benchmark
from tests.support.sample_runs import plan_of, report_of

ROW = Measured(Workload(seq=512), "poc", "Hopper", chips()["h100"], 1e-4)


def checked(ratio, factor=1.1):
    predicted = ROW.seconds * ratio
    made = Prediction(
        workload=ROW.workload,
        implementation="poc",
        chip="h100",
        predicted_s=predicted,
        low_s=predicted / factor,
        high_s=predicted * factor,
    )
    return ROW, made


def test_the_summary_counts_errors_and_rows_inside_the_interval():
    lines = benchmark.summary_lines("title", [checked(1.05), checked(0.96), checked(1.5)])
    assert "| all | 3 | 5.0% | 67% |" in lines
    assert any(line.startswith("Worst: poc B=1 L=512") and "+50%" in line for line in lines)
    assert any("not met" in line for line in lines)


def test_a_check_that_meets_its_targets_says_so():
    assert any(line.endswith(": met.") for line in benchmark.summary_lines("title", [checked(1.02)] * 10))


def test_a_row_outside_its_interval_is_marked_in_the_table():
    lines = benchmark.table_lines([checked(1.05), checked(1.5)])
    assert lines[-2].endswith("|  |") and lines[-1].endswith("| outside |")


def test_shipped_constants_name_the_kept_runs_by_digest():
    kept = {
        path.name: digest_of(msgspec.json.decode(path.read_bytes())) for path in benchmark.CALIBRATED_ON.glob("*.json")
    }
    assert kept and calibration().files == kept


@pytest.mark.slow  # fits every family nine times
def test_the_shipped_constants_are_those_of_the_kept_rows():
    made = benchmark.calibrate(benchmark.calibration_rows())
    assert set(made.families) == set(calibration().families)
    for key, family in calibration().families.items():
        assert made.families[key].constants == pytest.approx(family.constants, rel=0.01), key


def test_of_passes_over_a_call_the_fastest_is_the_row(tmp_path):
    report = report_of(plan_of(names=("baseline", "poc")))
    slower = structs.replace(
        report,
        cases=tuple(
            structs.replace(case, rows=tuple(scaled_row(row, 1.21) for row in case.rows)) for case in report.cases
        ),
    )
    for number, each in enumerate((slower, report), 1):
        (tmp_path / f"cpu-{number}.json").write_bytes(msgspec.json.encode(each))
    passes = benchmark.read_passes(tmp_path, "cpu-*.json", chips()["xeon-8580"])
    assert benchmark.repeatability(passes) == pytest.approx(1 - 1 / 1.21)
    assert benchmark.repeatability([rows[:1] for rows in passes]) is None
    merged = benchmark.read_rows(tmp_path, "cpu-*.json", chips()["xeon-8580"])
    assert [row.seconds for row in merged] == [rows[1].seconds for rows in passes]


def test_a_grid_that_would_end_after_the_limit_is_left_out(tmp_path, monkeypatch, capsys):
    clock, made = [0.0], []

    class Result(list):
        def save(self, path):
            path.write_text("{}")

    def bench(cases, implementations, seconds):
        clock[0] += 40
        made.append(cases)
        return Result()

    grids = [("long", ["a"], ["poc"], 0.1), ("short", ["b"], ["poc"], 0.1)]
    monkeypatch.setitem(benchmark.GRIDS, "cpu", lambda: iter(grids))
    monkeypatch.setattr(benchmark, "bench", bench)
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: clock[0])
    assert benchmark.measure("cpu", tmp_path, 150.0, None, passes=2) == 0
    assert made == [["a"], ["b"], ["a"]]
    assert "cpu-short-2: left out" in capsys.readouterr().out
    made.clear()
    benchmark.measure("cpu", tmp_path, 150.0, None, passes=2)  # again: what is missing
    assert made == [["b"]]


@pytest.mark.parametrize(("name", "family", "model"), [("Intel(R) Xeon(R) Processor", 6, 207), ("AMD EPYC", 25, 1)])
def test_rows_of_today_are_of_a_known_cpu(monkeypatch, name, family, model):
    fields = {"model name": name, "cpu family": str(family), "model": str(model)}
    monkeypatch.setattr("attention.measure.device.first_processor", lambda: fields)
    monkeypatch.setattr("sys.platform", "linux")
    assert processor_name() in benchmark.CPU_CHIPS


def test_rows_of_two_machines_are_kept_apart(tmp_path):
    report = report_of(plan_of(names=("baseline", "poc")))
    for device in benchmark.CPU_CHIPS:
        where = structs.replace(report.environment, device=device)
        own = structs.replace(report, environment=where)
        (tmp_path / f"cpu-{device[:3]}.json").write_bytes(msgspec.json.encode(own))
    found = benchmark.read_passes(tmp_path, "cpu-*.json")
    assert {len(rows) for rows in found} == {1}
    assert {row.chip.vendor for rows in found for row in rows} == {"AMD", "Intel"}


def scaled_row(row, factor):
    call_s = Interval(**{name: factor * getattr(row.call_s, name) for name in ("median", "low", "high")})
    return structs.replace(row, call_s=call_s, samples=tuple(factor * each for each in row.samples))


def test_half_of_the_shapes_is_half_of_each_pass_and_dtype():
    shapes = {
        Workload(seq=seq, dtype=dtype, pass_=pass_)
        for seq in (64, 128, 256, 512)
        for dtype in ("float32", "bfloat16")
        for pass_ in ("forward", "training")
    }
    half = benchmark.half_of(shapes, 1)
    assert Counter((shape.pass_, shape.dtype) for shape in half) == dict.fromkeys(
        ((shape.pass_, shape.dtype) for shape in shapes), 2
    )
    assert half != benchmark.half_of(shapes, 2)
