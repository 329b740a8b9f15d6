"""Rows as JSON lines, SQL and Parquet, and runs of several machines side by side."""

import csv
import io
import json
import os
import sqlite3
import sys
from typing import Annotated, Literal, NewType, Optional, Union

import msgspec
import pytest
from msgspec import Meta, structs

from attention.core.results import Conditions, Environment, Report, flat_rows
from attention.core.workload import Workload
from fatui.cli import output
from fatui.cli import run as cli_run
from fatui.cli.main import main
from fatui.report import comparison, export
from fatui.storage.history import RunHistory
from tests.support import hostile
from tests.support.fake_engine import FakeEngine
from tests.support.sample_runs import plan_of, report_of, run_of

CASES = [Workload(seq=64), Workload(seq=128)]
KINDS = ("shapes", "model", "finetune")


def loaded(text: str) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    database.executescript(text)
    return database


def test_sql_gives_sqlite_the_rows_of_the_csv():
    report = report_of(plan_of(CASES))
    database = loaded(export.to_sql(report))
    columns = [line[1] for line in database.execute("PRAGMA table_info(attention)")]
    lines = list(csv.DictReader(io.StringIO(export.to_csv(report))))
    assert columns == list(export.COLUMNS)
    assert database.execute("SELECT count(*) FROM attention").fetchone() == (len(lines),)
    names = "implementation, seq, speedup_value"
    found = database.execute(f"SELECT {names} FROM attention WHERE peak_bytes > 0").fetchall()
    assert found == [(row["implementation"], int(row["seq"]), float(row["speedup_value"])) for row in lines]


def test_sql_of_several_runs_goes_into_one_table():
    database = loaded(export.to_sql(report_of()) + export.to_sql(report_of(run=run_of(identity="other"))))
    assert database.execute("SELECT count(DISTINCT run_id) FROM attention").fetchone() == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_stay_texts(kind):
    report = hostile.report(kind, "a'; DROP TABLE attention; --")
    reports = [report, structs.replace(report, run=structs.replace(report.run, started="'\x00'"))]
    for made in reports:
        text = export.to_sql(made)
        assert not hostile.unsafe_in(text)
        (table,) = (name for (name,) in loaded(text).execute("SELECT name FROM sqlite_master"))
        ids = loaded(text).execute(f"SELECT DISTINCT run_id FROM {table}").fetchall()
        assert ids == [("a'; DROP TABLE attention; --",)]
        lines = export.to_json_lines(made)
        assert not hostile.unsafe_in(lines)
        assert len(list(map(json.loads, lines.splitlines()))) == sum(len(case.rows) for case in made.all_cases)


def test_parquet_says_what_it_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["bench", "quick", "--parquet", str(tmp_path / "x.parquet")]) == 2
    assert capsys.readouterr().err == (
        "fatui: --parquet: pyarrow is not installed; `pip install pyarrow`, or use --csv\n"
    )
    assert main(["bench", "quick", "--parquet", "-"]) == 2
    assert "it takes a file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\x00rows", "rows"])
def test_a_pipe_is_written_to_in_place(content, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert output.write_text(output.Export("parquet", str(pipe)), content) is None
        assert pipe.is_fifo()
        assert os.read(end, 100).endswith(b"rows")
    finally:
        os.close(end)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_parquet_has_the_rows(kind, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    report = hostile.report(kind, "a") if kind else report_of(plan_of(CASES))
    path = tmp_path / "rows.parquet"
    path.write_bytes(export.to_parquet(report))
    table = parquet.read_table(path)
    assert table.num_rows == sum(len(case.rows) for case in report.all_cases)
    assert {"implementation", "call_s_median"} <= set(table.column_names)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_columns_have_the_declared_types(kind):
    report = hostile.report(kind, "a") if kind else report_of(plan_of(CASES))
    for record in flat_rows(report):
        for column in export.columns_of(report):
            value = export._plain(record.get(column))
            declared = export.column_type(column)
            assert value is None or type(value) is declared or (declared is float and type(value) is int), column


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        *((float | None, float), (None | int, int), (Optional[bool], bool), (Union[None, int, float], float)),  # noqa: UP007, UP045
        *((Annotated[int, Meta(ge=0)], int), (Annotated[float, "s"] | None, float), (Annotated[int | None, "s"], int)),
        (Annotated[int, Meta(extra_json_schema={"unit": "bytes"})] | None, int),
        *((NewType("Bytes", int), int), (Literal["a"] | None, str), (tuple[int, ...] | None, str)),
    ],
)
def test_columns_of_every_way_to_declare_a_type(monkeypatch, declared, expected):
    monkeypatch.setitem(export.DECLARED, "figure", declared)
    assert export.column_type("figure") is expected


def test_parquet_files_of_several_runs_are_read_together(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run = report_of(plan_of(CASES))
    case = run.cases[0]
    unknown = structs.replace(case, rows=tuple(structs.replace(row, call_s=None, speedup=None) for row in case.rows))
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, report in zip(paths, (run, structs.replace(run, cases=(unknown,))), strict=True):
        path.write_bytes(export.to_parquet(report))
    for files in (paths, paths[::-1]):
        assert parquet.read_table(list(map(str, files))).num_rows == len(flat_rows(run)) + len(case.rows)


@pytest.fixture
def fake_engine(monkeypatch):
    monkeypatch.setattr(cli_run, "Engine", FakeEngine)


def test_json_lines_arrive_case_by_case(fake_engine, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    counts = []
    finished = cli_run.RowLines.write

    def write(self, case, record):
        finished(self, case, record)
        counts.append(path.read_text().count("\n"))

    monkeypatch.setattr(cli_run.RowLines, "write", write)
    assert main(["bench", "--seq", "64,128", "--impl", "baseline,poc", "--jsonl", str(path)]) == 0
    assert counts[:2] == [2, 4] and counts[-1] == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["case"], line["seq"], line["implementation"]) for line in lines] == [
        (1, 64, "baseline"),
        (1, 64, "poc"),
        (2, 128, "baseline"),
        (2, 128, "poc"),
    ]
    assert {line["run_id"] for line in lines} == {RunHistory().get("last").run.id}
    assert all(line["call_s_median"] > 0 and line["device"] for line in lines)


def test_json_lines_on_stdout_replace_the_table(fake_engine, capsys):
    assert main(["bench", "--seq", "64", "--impl", "baseline,poc", "--jsonl", "-"]) == 0
    assert len(list(map(json.loads, capsys.readouterr().out.splitlines()))) == 2


def test_json_lines_that_cannot_be_written_are_reported(fake_engine, capsys):
    assert main(["bench", "--seq", "64", "--jsonl", "/dev/full"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("fatui: --jsonl: /dev/full could not be written")


def test_a_kept_run_is_shown_in_every_format(capsys):
    RunHistory().add(report_of())
    for name, start in (("--sql", "CREATE TABLE"), ("--jsonl", '{"run_id"')):
        assert main(["history", "show", "last", name, "-"]) == 0
        assert capsys.readouterr().out.startswith(start)


def on_device(name: str, identity: str, seed: int = 1) -> Report:
    report = report_of(plan_of(CASES), run_of(identity=identity), seed)
    return structs.replace(report, environment=structs.replace(report.environment, device=name))


def test_machines_stand_side_by_side():
    table = comparison.by_machine([on_device("A", "a1"), on_device("B", "b1"), on_device("A", "a2", seed=2)])
    assert table.machines == ("A, cpu", "B, cpu")
    assert len(table.rows) == 8
    for (workload, name), entries in table.rows.items():
        assert [entry.machine for entry in entries] == [0, 1]
        assert entries[0].across is None
        assert entries[1].across is not None
        assert entries[0].row.speedup == next(
            row.speedup
            for case in on_device("A", "a2", seed=2).cases
            if case.workload == workload
            for row in case.rows
            if row.implementation == name
        )


def test_one_processor_with_other_cores_is_another_machine():
    runs = [
        structs.replace(on_device("A", f"a{cores}"), conditions=Conditions(cores=cores, other_cores=0.0))
        for cores in (2, 4)
    ]
    table = comparison.by_machine(runs)
    assert [name.split(", ")[2] for name in table.machines] == ["2 cores", "4 cores"]
    assert all(entries[1].across is not None for entries in table.rows.values())
    assert comparison.by_machine(runs[:1]).machines == ("A, cpu",)


def test_ratios_between_machines_are_marked(tmp_path, capsys):
    for name in ("A", "B"):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(on_device(name, name.lower())))
    assert main(["compare", str(tmp_path / "A.json"), str(tmp_path / "B.json"), "--by", "device"]) == 0
    out = capsys.readouterr().out
    assert "[1] A, cpu" in out and "across ≈ 1" in out and "different machines" in out
    assert main(["compare", str(tmp_path), "--by", "device", "--markdown", "-"]) == 0
    out = capsys.readouterr().out
    assert "1. A, cpu" in out and out.count("across ≈ 1") + out.count("across 1.0") == 8


@pytest.mark.parametrize(
    ("width", "heads"), [(100, {"tokens/s", "memory"}), (78, {"memory"}), (60, set())], ids=("wide", "narrow", "least")
)
def test_side_by_side_columns_go_before_figures_are_cut(width, heads, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("A", "B"):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(on_device(name, name.lower())))
    assert main(["compare", str(tmp_path), "--by", "device"]) == 0
    head = next(line for line in capsys.readouterr().out.splitlines() if "per call" in line)
    assert {"tokens/s", "memory"} & set(head.split()) == heads
    assert "status" in head


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["last"], "got one name;"),
        (["a", "b", "c"], "got 3 names"),
        (["a", "--by", "colour"], "--by: got 'colour'"),
        (["a", "--by", "device", "--fail-on", "slower:3%"], "takes no gate"),
    ],
)
def test_a_wrong_comparison_is_one_line(arguments, problem, capsys):
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_hostile_machines():
    report = hostile.report("shapes", "a")
    other = structs.replace(report, environment=Environment())
    text = comparison.to_markdown(comparison.by_machine([report, other]))
    assert not hostile.unsafe_in(text)
