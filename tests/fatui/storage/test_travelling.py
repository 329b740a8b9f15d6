"""Results that travel: the JSON Schema, digests, fingerprints, and folders taken into the history."""

import json
from pathlib import Path

import jsonschema
import msgspec
import pytest
from msgspec import structs

from attention.core import events as on
from attention.core import results
from attention.core.results import Fingerprint, MachineState, Report
from attention.core.workload import Workload
from attention.engine.record import record_of
from attention.measure.conditions import fingerprint, machine_state
from attention.measure.device import probe
from fatui.cli.main import main
from fatui.report.compose import compose
from fatui.report.document import to_markdown
from fatui.report.evidence import gather
from fatui.report.export import to_json
from fatui.report.study import beside
from fatui.storage import result_files
from fatui.storage.history import RunHistory, read_runs
from tests.support import hostile
from tests.support.sample_runs import ENVIRONMENT, plan_of, report_of, run_of

ROOT = Path(__file__).parents[3]
KEPT = sorted([*(ROOT / "docs" / "results").rglob("*.json"), *(ROOT / "tests" / "data").rglob("*.json")])
NUMBER = {"type": ["number", "null"]}
DISTRIBUTED = {
    "required": ["part", "workload", "ranks", "method", "layout", "one_s", "compute_s", "exposed_s"],
    "properties": {
        "workload": msgspec.json.schema(Workload)["$defs"]["Workload"],
        "ranks": {"type": "integer"},
        **dict.fromkeys(("one_s", "ranks_s", "compute_s", "exposed_s", "speedup", "share_of_ideal"), NUMBER),
    },
}
LINK = {"required": ["part", "ranks", "measured", "pull_bytes_per_s", "send_bytes_per_s", "latency_s"]}
QUANTIZED = {"anyOf": [{"required": ["label", "seconds"]}, {"required": ["target", "least", "measured", "holds"]}]}
ROWS_OF_BENCHMARKS = {
    "distributed/h200-two.json": {"anyOf": [DISTRIBUTED, LINK]},
    "distributed/h200-two-second.json": DISTRIBUTED,
    "distributed/h200-two-decode.json": DISTRIBUTED,
    "distributed/h200-beyond.json": {"required": ["part", "workload", "ranks", "one_needs_bytes", "peak_bytes"]},
    "distributed/h200-predicted.json": {"required": ["part", "predicted", "seq", "ranks", "ranks_s"]},
    "quantized/decode.json": QUANTIZED,
    "quantized/prefill.json": QUANTIZED,
}
"""Files below docs/results that are not runs: arrays of such objects, written by this repository's benchmarks."""


def problems(document: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(result_files.result_schema())
    return [f"{error.json_path}: {error.message}"[:300] for error in validator.iter_errors(document)]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_every_kept_result_is_as_the_schema_says(path):
    document = json.loads(path.read_bytes())
    rows = ROWS_OF_BENCHMARKS.get("/".join(path.parts[-2:]))
    if rows is None:
        assert problems(document) == []
    else:
        array = {"type": "array", "minItems": 1, "items": {"type": "object", **rows}}
        jsonschema.validate(document, array, jsonschema.Draft202012Validator)


def test_the_schema_is_valid_and_published_as_it_is():
    jsonschema.Draft202012Validator.check_schema(result_files.result_schema())
    assert result_files.PUBLISHED.read_text() == result_files.schema_text(), "`fatui schema --file` writes it again"


def test_what_is_written_is_as_the_schema_says():
    report = report_of()
    study = beside(report)
    reports = [to_json(report, msgspec.to_builtins(study) if study else None)]
    reports += [to_json(hostile.report(kind, "a")) for kind in ("shapes", "model", "finetune")]
    for text in reports:
        assert problems(json.loads(text)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("run", "id"), None),
        (("cases", 0, "workload", "pass"), "sideways"),
        (("cases", 0, "rows", 0, "status"), "fine"),
        (("cases", 0, "rows", 0, "call_s"), 3),
        (("cases", 0, "rows", 0, "samples"), ["fast"]),
        (("schema",), 99),
    ],
)
def test_the_schema_refuses_what_is_wrong(place, value):
    document = json.loads(to_json(report_of()))
    holder = document
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    assert problems(document)


@pytest.mark.thorough
def test_the_command_prints_the_schema(tmp_path, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(result_files.schema_text())
    assert main(["schema", "--file", str(tmp_path / "s.json")]) == 0
    assert (tmp_path / "s.json").read_text() == result_files.schema_text()
    assert main(["schema", "--file", str(tmp_path / "no" / "s.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def edited(text: str) -> str:
    """A file in which the second row's median was made better by hand."""
    document = json.loads(text)
    row = document["cases"][0]["rows"][1]
    for name in ("median", "low", "high"):
        row["call_s"][name] *= 0.99
    return json.dumps(document)


def test_only_an_edited_file_is_marked():
    text = to_json(report_of())
    assert not result_files.decode(text.encode()).edited
    assert not result_files.decode(json.dumps(json.loads(text)).encode()).edited  # only written otherwise
    assert result_files.decode(edited(text).encode()).edited


def test_files_of_before_have_no_digest_and_load():
    document = json.loads(to_json(report_of()))
    for name in ("digest", "edited", "fingerprint", "conditions"):
        del document[name]
    assert result_files.decode(json.dumps(document).encode()) == report_of()


def test_a_new_field_that_is_unknown_leaves_the_digest_as_it_is():
    document = json.loads(to_json(report_of()))
    document["cases"][0]["rows"][0]["a_figure_of_later"] = None
    assert not result_files.decode(json.dumps(document).encode()).edited


def test_an_edited_run_stays_one_in_the_history(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(edited(to_json(report_of())))
    assert main(["history", "add", str(path)]) == 0
    assert "added run 0a1b2c3d, which was edited since it was written" in capsys.readouterr().err
    kept = RunHistory().get("last")
    assert kept.edited
    assert result_files.decode(to_json(kept).encode()).edited
    assert main(["compare", "last", str(path)]) == 0
    assert "0a1b2c3d: edited since it was written" in capsys.readouterr().out
    assert "0a1b2c3d was edited after the measurement was written" in to_markdown(compose([kept]))
    assert "edited" not in to_markdown(compose([report_of()]))


@pytest.mark.parametrize("value", [3, "", "sha256:", "x" * 10_000, [], {}])
def test_a_digest_that_is_none_is_refused_or_counts_as_edited(value):
    document = json.loads(to_json(report_of()))
    document["digest"] = value
    try:
        assert result_files.decode(json.dumps(document).encode()).edited
    except ValueError as error:
        assert "\n" not in str(error)


def test_a_number_without_end_is_no_traceback():
    content = to_json(report_of()).replace('"seconds": 12.3', '"seconds": 12.3, "x": ' + "9" * 400)
    assert result_files.decode(content.encode()).edited


def test_a_folder_is_taken_in(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.json").write_text(to_json(report_of(run=run_of(identity=f"run{number}"))))
    assert main(["history", "add", str(tmp_path)]) == 0
    assert sorted(line.id for line in RunHistory().runs()) == ["run0", "run1", "run2"]
    (tmp_path / "9.json").write_text("[]")
    (tmp_path / "8.json").write_text(to_json(report_of(run=run_of(identity="run8"))))
    capsys.readouterr()
    assert main(["history", "add", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum("in the history already" in line for line in lines) == 3
    assert sum("9.json is not a run" in line for line in lines) == 1
    assert "fatui: added run run8" in lines


def test_a_run_carries_what_its_figures_depend_on():
    device = probe()
    made = fingerprint(device)
    assert made.versions["mlx"] and made.architecture
    record = record_of(plan_of())
    record.apply(on.RunStarted(environment=ENVIRONMENT, fingerprint=made))
    record.apply(on.RunDone(state=machine_state(device)))
    report = record.report(run_of())
    assert report.fingerprint and report.fingerprint.before == made.before and report.fingerprint.after
    assert result_files.decode(to_json(report).encode()).fingerprint == report.fingerprint
    assert problems(json.loads(to_json(report))) == []


@pytest.mark.parametrize("state", [{"clock_hz": -1.0}, {"load": 1e300}, {"throttle_events": -3}])
def test_an_impossible_fingerprint_is_refused(state):
    report = structs.replace(report_of(), fingerprint=Fingerprint(before=MachineState(**state)))
    with pytest.raises(ValueError, match=r"fingerprint\.before"):
        result_files.decode(msgspec.json.encode(report))


def test_infinities_do_not_change_the_digest():
    report = report_of()
    (case,) = report.cases
    rows = tuple(structs.replace(row, max_error=float("inf")) for row in case.rows)
    made: Report = structs.replace(report, cases=(structs.replace(case, rows=rows),))
    assert not results.is_edited(results.sealed(made))


def test_runs_of_several_time_zones_are_in_order(tmp_path):
    times = {"late": "2026-10-25T02:10:00+01:00", "early": "2026-10-25T02:30:00+02:00", "none": "some day"}
    reports = [report_of(run=structs.replace(run_of(identity=name), started=times[name])) for name in times]
    for report in reports:
        (tmp_path / f"{report.run.id}.json").write_text(to_json(report))
    in_order = ["none", "early", "late"]  # the hour in which summer time ends is there twice
    assert [report.run.id for report in read_runs(str(tmp_path), RunHistory())] == in_order
    (evidence,) = gather(reports)
    assert [report.run.id for report in evidence.runs] == in_order
