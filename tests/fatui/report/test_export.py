import csv
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.results import Peaks
from attention.core.workload import Workload
from fatui import formatting, storage
from fatui.report import export
from tests.support.sample_runs import plan_of, record_of, report_of, run_of

ROOT = Path(__file__).parents[3]
TWO = (Workload(seq=64), Workload(seq=128))


def partial_report():
    """A report with one refused row, and one whose error is NaN."""
    record = record_of(plan_of(TWO))
    record.apply(on.RowEnded(case=0, implementation="poc", status="refused", reason="needs 41 GiB of 22 | a\nb"))
    error = float("nan")
    record.apply(
        on.AccuracyChecked(
            case=1, implementation="demo", max_error=error, rms_error=error, accurate=False, detail="NaN"
        )
    )
    return record.report(run_of())


def test_json_has_the_schema_and_null_for_what_is_not_known():
    document = json.loads(export.to_json(partial_report()), parse_constant=pytest.fail)
    kinds = ["cases", "summary", "models", "fine_tunings", "streams"]
    further = ["fingerprint", "digest", "edited"]
    assert list(document) == ["schema", "run", "environment", "peaks", "conditions", *kinds, *further]
    assert document["run"]["command"] == "fatui bench quick"
    row = document["cases"][0]["rows"][1]
    assert (row["status"], row["speedup"], row["reason"]) == ("refused", None, "needs 41 GiB of 22 | a\nb")
    assert set(row["call_s"]) == {"median", "low", "high"}
    assert document["cases"][1]["rows"][3]["max_error"] is None
    assert document["cases"][0]["workload"]["pass"] == "forward"


def test_json_has_the_studys_figures_under_their_own_key():
    document = json.loads(export.to_json(report_of(), {"machine": "M3 Max"}))
    assert document["study"] == {"machine": "M3 Max"}


def test_csv_has_a_line_for_each_row_with_the_rows_own_figures():
    report = partial_report()
    lines = list(csv.DictReader(io.StringIO(export.to_csv(report))))
    rows = [row for case in report.cases for row in case.rows]
    assert len(lines) == len(rows) == 8
    for line, row in zip(lines, rows, strict=True):
        assert line["implementation"] == row.implementation
        assert float(line["call_s_median"]) == row.call_s.median
        assert line["speedup_value"] == ("" if row.speedup is None else repr(row.speedup.value))
    assert lines[7]["max_error"] == ""
    assert (lines[4]["seq"], lines[4]["fused"], lines[5]["fused"]) == ("128", "false", "true")


def test_markdown_tables_have_as_many_cells_in_every_line():
    text = export.to_markdown(partial_report())
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "fatui bench quick" in text and "Geometric mean" in text


def test_markdown_names_the_rate_that_efficiency_is_of():
    slow = structs.replace(report_of().cases[0].rows[0], flops_per_s=2.5e8, efficiency=0.0025)
    case = structs.replace(report_of().cases[0], rows=(slow,))
    peaks = Peaks(matmul_flops_per_s=2e10, fma_flops_per_s=1e11, copy_bytes_per_s=1e10)
    text = export.to_markdown(structs.replace(report_of(), cases=(case,), peaks=peaks))
    assert "- best rate 100 GFLOP/s, which is 100 % efficiency, best copy 10.0 GB/s" in text
    heads, _, cells = (line.split(" | ") for line in text.splitlines() if line.startswith("| "))
    assert dict(zip(heads, cells, strict=True))["GFLOP/s"] == "0.250"


def test_over_dense_is_a_column_of_masked_cases_only():
    masked = report_of(plan_of([Workload(seq=256, mask="window:32"), Workload(seq=256, mask="causal")]))
    poc = masked.cases[0].rows[1]
    assert poc.over_dense.value == pytest.approx(256 * 256 / masked.cases[0].workload.pairs * 8, rel=0.05)
    first, second = (part.splitlines()[4:] for part in export.to_markdown(masked).split("## ")[1:3])
    assert "| over dense |" in first[0]
    assert f"| {formatting.speedup_text(poc.over_dense)} |" in first[3]
    assert "over dense" not in second[0]
    lines = list(csv.DictReader(io.StringIO(export.to_csv(masked))))
    assert float(lines[1]["over_dense_value"]) == poc.over_dense.value
    assert lines[5]["over_dense_value"] == ""
    read = json.loads(export.to_json(masked))
    assert read["cases"][0]["rows"][1]["over_dense"]["value"] == poc.over_dense.value


def test_quantized_keys_and_values_have_columns_of_their_own():
    report = report_of(plan_of([Workload(seq=256, kv_format="int4"), Workload(seq=256)]))
    poc = report.cases[0].rows[1]
    assert poc.over_unquantized.value == pytest.approx(2.5, rel=0.02)
    first, second = export.to_markdown(report).split("## ")[1:3]
    assert "| K/V speedup | K/V error |" in first
    assert f"| {formatting.speedup_text(poc.over_unquantized)} | 11 % |" in first
    assert "- K/V in int4: 576 B a token" in first
    assert "unquantized" not in second
    lines = list(csv.DictReader(io.StringIO(export.to_csv(report))))
    assert (lines[1]["kv_format"], lines[1]["kv_token_bytes"], lines[1]["kv_error"]) == ("int4", "576", "0.11")
    assert float(lines[1]["unquantized_s_median"]) == poc.unquantized_s.median
    assert json.loads(export.to_json(report))["cases"][0]["kv_token_bytes"] == 576
    assert (lines[5]["kv_format"], lines[5]["kv_token_bytes"], lines[5]["over_unquantized_value"]) == (
        "none",
        "2048",
        "",
    )


def test_a_write_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    target.write_text("old")
    target.chmod(0o640)
    storage.write_atomically(target, "new")
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", 0o640)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomically(target, "newer")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "true").write_text("old")
    (tmp_path / "link").symlink_to("true")
    storage.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "true").read_text() == "new"


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    program = (
        "import signal, sys; from pathlib import Path; from fatui.storage import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: write_atomically(Path(sys.argv[1]), 'x' * 100_000)\n"
        "except OSError as error: sys.exit(7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(target)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        check=False,
    )
    assert done.returncode == 7
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.txt"]
