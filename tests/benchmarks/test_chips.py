"""The check of predictions: what it counts, and that the shipped constants are those of the kept rows."""

import msgspec
import pytest

from attention.chips.calibration import Measured
from attention.chips.prediction import Prediction, calibration
from attention.chips.table import chips
from attention.core.results import digest_of
from attention.core.workload import Workload
from benchmarks import chips as benchmark

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
