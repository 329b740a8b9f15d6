"""Damaged and fabricated files: read within limits, refused in one line, and never a traceback."""

import copy
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from attention.core.errors import UsageError
from attention.core.files import parse_toml
from attention.core.workload import Workload
from fatui import storage
from fatui.cli.main import main
from fatui.report import charts, export, gate
from fatui.report.comparison import compare, compare_pairs
from fatui.report.compose import compose
from fatui.report.document import to_markdown
from fatui.report.table import report_table
from fatui.storage import presets, result_files, settings
from fatui.storage.history import HistoryError, RunHistory
from fatui.tui.actions import SCOPES
from tests.support import hostile
from tests.support.sample_runs import plan_of, report_of, run_of

VALUES = (
    *(None, True, 0, -1, 1, 2**63, 10**400, 0.0, -0.0, 1e-320, 1e-9, 1e15, 1e308, -1e308, "", "last", "x" * 50_000),
    *(
        "\x1b[2J",
        "[/x]",
        "\u202e",
        "baseline",
        "poc",
        "window:" + "9" * 5000,
        [],
        {},
        [[[[]]]],
        [0.0] * 9,
        ["a"],
        {"a": 1},
    ),
)
ROUNDS = 30


def leaves(document):
    """Yield every position of a JSON document: its container and its key."""
    found, open_ = [], [document]
    while open_:
        holder = open_.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                open_.append(holder[key])
    return found


def mutated_document(document, draw):
    """Return a copy with one to three positions changed, dropped or duplicated."""
    made = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        holder, key = draw.choice(leaves(made))
        kind = draw.random()
        if kind < 0.7:
            holder[key] = draw.choice(VALUES)
        elif kind < 0.85:
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
    return made


def mutated_bytes(content, draw):
    """Return a copy with some bytes changed, cut, or written twice."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(made) + 1)
        match draw.randrange(4):
            case 0 if at < len(made):
                made[at] = draw.randrange(256)
            case 1:
                del made[at : at + draw.randint(1, 40)]
            case 2:
                made[at:at] = made[at : at + draw.randint(1, 40)]
            case 3:
                made[at:at] = draw.choice((b"\x00", b"\xff", b"[", b"{", b'"', b".", b"=", b"\x1b", b"9" * 400))
        if not made:
            made.append(0)
    return bytes(made)


def shown(report):
    """Make everything that can be made from a report."""
    from fatui.cli.compare import comparison_table
    from fatui.cli.output import console

    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        out = console(nothing)
        out.print(report_table(report))
        out.print(comparison_table(compare(report, report)))
    comparison = compare_pairs([(report, report)] * 3)
    assert not hostile.unsafe_in(gate.to_markdown(gate.judge(comparison, gate.Thresholds(slower=0.03, memory=0.1))))
    document = compose([report, report])
    for text in (to_markdown(document), export.to_json(report), export.to_csv(report), export.to_markdown(report)):
        assert not hostile.unsafe_in(text)


def one_line(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 1000
    assert not hostile.unsafe_in(text)


def valid_documents():
    reports = (report_of(plan_of([Workload(seq=16), Workload(seq=32), Workload(seq=64)])), report_of())
    reports += tuple(hostile.report(kind, "a") for kind in ("shapes", "model", "finetune"))
    return [json.loads(msgspec.json.encode(report)) for report in reports]


def fuzz_results(rounds, seed):
    documents, draw = valid_documents(), random.Random(seed)
    accepted = 0
    for _ in range(rounds):
        document = mutated_document(draw.choice(documents), draw)
        content = json.dumps(document).encode()
        if draw.random() < 0.3:
            content = mutated_bytes(content, draw)
        try:
            report = result_files.decode(content)
        except ValueError as error:
            one_line(error)
        else:
            accepted += 1
            shown(report)
    return accepted


def fuzz_presets(rounds, seed):
    draw = random.Random(seed)
    texts = [path.read_bytes() for path in sorted(storage.bundled_presets().glob("*.toml"))]
    texts += [hostile.PRESET.encode(), hostile.BROKEN_PRESET.encode()]
    path = storage.own_presets() / "fuzzed.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(rounds):
        path.write_bytes(mutated_bytes(draw.choice(texts), draw))
        try:
            made = presets.load(path)
        except UsageError as error:
            assert error.problems
        else:
            assert presets.parse(presets.to_toml(made), None).cases == made.cases


def fuzz_settings(rounds, seed):
    draw = random.Random(seed)
    text = b'theme = "nord"\nascii = true\n[keys]\nrun = "f5"\nstop = "x"\nhistory = "ctrl+h,h"\n'
    state = msgspec.json.encode(settings.SavedState())
    for path, content in ((settings.config_path(), text), (settings.state_path(), state)):
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(rounds // 2):
            path.write_bytes(mutated_bytes(content, draw))
            settings.read_settings(SCOPES, ("nord",))
            settings.read_state()


def fuzz_history(rounds, seed, folder):
    draw = random.Random(seed)
    whole = folder / "whole.sqlite"
    kept = RunHistory(whole)
    for number in range(4):
        kept.add(report_of(run=run_of(identity=f"run{number}")))
    with sqlite3.connect(whole) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = whole.read_bytes()
    for number in range(rounds):
        history = RunHistory(folder / str(number) / "h.sqlite")
        history.path.parent.mkdir()
        history.path.write_bytes(mutated_bytes(content, draw))
        for use in (history.runs, lambda: history.get("last"), lambda: history.add(report_of()), history.runs):  # noqa: B023
            try:
                use()
            except HistoryError as error:
                one_line(error)


def test_a_mutated_result_file_is_shown_or_refused(monkeypatch):
    monkeypatch.setattr(charts, "available", lambda: False)  # drawing takes most of the time
    assert fuzz_results(ROUNDS, seed=1)


def test_a_mutated_preset_is_read_or_refused():
    fuzz_presets(4 * ROUNDS, seed=2)


def test_mutated_settings_are_read_as_far_as_they_are_right():
    fuzz_settings(4 * ROUNDS, seed=3)


def test_a_mutated_history_is_read_or_set_aside(tmp_path):
    fuzz_history(ROUNDS // 2, seed=4, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_mutated_files(seed, tmp_path):
    fuzz_results(3000, seed)
    fuzz_presets(10_000, seed)
    fuzz_settings(5_000, seed)
    fuzz_history(500, seed, tmp_path)


HEAD = {"schema": 1, "environment": {}, "peaks": {}, "cases": []}
RUN = {"id": "a", "started": "2026-01-02", "seconds": 1.0, "command": "c"}


def with_figure(path, value):
    """Return a valid run with one figure of its last row replaced."""
    document = json.loads(msgspec.json.encode(report_of()))
    holder = document["cases"][0]["rows"][1]
    *front, last = path.split(".")
    for name in front:
        holder = holder[name]
    holder[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("speedup.value", 0.0),
        ("speedup.value", -1.0),
        ("speedup.value", 1e308),
        ("speedup.high", 1e300),
        ("speedup.low", 100.0),
        ("call_s.median", 0.0),
        ("call_s.median", 1e300),
        ("call_s.low", None),
        ("call_s.low", 1e-320),
        ("speedup.low", 5e-324),
        ("latency_s", -1.0),
        ("tokens_per_second", 1e308),
        ("peak_bytes", -1),
        ("peak_bytes", 10**400),
        ("efficiency", -0.1),
        ("samples", [0.0] * 9),
        ("samples", [1e308] * 9),
        ("implementation", "baseline"),
        ("implementation", ""),
    ],
)
def test_a_figure_or_name_that_cannot_be_is_refused_in_one_line(path, value):
    with pytest.raises(ValueError, match=r"got|occurs twice|without an implementation|one end") as caught:
        result_files.decode(with_figure(path, value))
    one_line(caught.value)


@pytest.mark.parametrize("identity", ["", "a b", "x" * 65, "x" * 100_000, "last", "last~1", "\x1b[2J", "[/x]", "../a"])
def test_a_run_needs_an_id_by_which_it_can_be_found(identity):
    with pytest.raises(ValueError, match=r"run\.id"):
        result_files.decode(json.dumps({**HEAD, "run": {**RUN, "id": identity}}).encode())


@pytest.mark.parametrize(
    "content",
    [b'{"a":' * 100_000, b"\xff", b"", b"[]", b'{"schema": 9}', b"{}" * 300_000, b"0," * 5_000_000, b"\x00" * 99],
    ids=range(8),
)
def test_a_file_that_is_no_run_is_refused_at_once(content):
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        result_files.decode(content)
    one_line(caught.value)
    assert time.process_time() - started < 2


def test_a_text_without_end_is_cut():
    made = result_files.decode(json.dumps({**HEAD, "run": {**RUN, "command": "x" * 10**6}}).encode())
    assert len(made.run.command) < 1.1 * result_files.MAX_TEXT


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("command", [["history", "add"], ["report"], ["presets", "check"], ["bench"], ["explain"]])
def test_devices_pipes_and_folders_are_refused_without_waiting(command, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**33)
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "large", "~nosuchuser/run", "./a\0b"):
        assert main([*command, str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_is_taken_in_once(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_bytes(msgspec.json.encode(report_of()))
    assert main(["history", "add", str(path)]) == 0
    assert main(["history", "add", str(path)]) == 1
    assert "there is a run '0a1b2c3d' already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 20_000) + " = 1",
        "[" + ".".join("a" * 20_000) + "]",
        "".join(".".join(["a"] * 90) + f".k{number} = 1\n" for number in range(300)),
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 3000,
        "a = " + "9" * 5000,
    ],
    ids=range(6),
)
def test_nested_toml_is_read_or_refused_in_a_second(text):
    started = time.process_time()
    try:
        parse_toml(text)
    except ValueError as error:
        one_line(error)
    assert time.process_time() - started < 1


def test_dots_inside_of_texts_are_no_key():
    assert parse_toml(f'title = "{"a." * 500}"')["title"] == "a." * 500


def test_all_errors_of_a_preset_are_reported_even_absurd_ones(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        f'schema = 1\nseed = -1\nseconds = 1e400\n[workload]\nmask = "window:{"9" * 5000}"\nseq = {10**400}\n'
    )
    with pytest.raises(UsageError) as caught:
        presets.load(path)
    assert len(caught.value.problems) == 4
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)


def test_a_folder_in_a_home_that_does_not_exist_is_not_made(tmp_path, monkeypatch, capsys):
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    assert main(["history"]) == 0
    with pytest.raises(HistoryError, match="there is no home folder"):
        RunHistory().add(report_of())
    with pytest.raises(OSError, match="there is no home folder"):
        presets.save(presets.load("quick"), "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_that_is_a_file_is_reported(capsys):
    storage.data_dir().parent.mkdir(parents=True, exist_ok=True)
    storage.data_dir().write_text("")
    for command in (["history"], ["history", "show", "last"], ["report"], ["compare", "last", "last~1"]):
        assert main(command) == 1
        assert "Not a directory" in capsys.readouterr().err


def test_what_can_be_read_of_a_damaged_history_is_taken_over(tmp_path):
    kept = RunHistory(tmp_path / "h.sqlite")
    for number in range(40):
        kept.add(report_of(run=run_of(identity=f"run{number:02}")))
    with sqlite3.connect(kept.path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(kept.path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 3 * 4096] = b"\xa5" * (3 * 4096)
    kept.path.write_bytes(content)
    with pytest.raises(HistoryError):
        for number in range(40):
            kept.get(f"run{number:02}")
    assert kept.notice and "runs that could be read" in kept.notice
    assert len(kept.runs()) > 20
    kept.add(report_of(run=run_of(identity="new")))


def test_a_full_disk_costs_no_run_that_was_kept(tmp_path):
    path = tmp_path / "h.sqlite"
    RunHistory(path).add(report_of())
    program = (
        "import resource, signal, sys; from pathlib import Path; from tests.support.sample_runs import report_of, "
        "run_of\n"
        "from fatui.storage.history import RunHistory, HistoryError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: RunHistory(Path(sys.argv[1])).add(report_of(run=run_of(identity='other')))\n"
        "except HistoryError as error: print(error); sys.exit(7)"
    )
    here = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.count("\n") == 1
    assert [line.id for line in RunHistory(path).runs()] == ["0a1b2c3d"]


def test_a_case_that_is_there_twice_is_refused():
    report = report_of(plan_of([Workload(seq=64), Workload(seq=128)]))
    twice = structs.replace(report, cases=(*report.cases, report.cases[1]))
    assert result_files.decode(msgspec.json.encode(report)) == report
    with pytest.raises(ValueError, match="case 3: it is case 2 again"):
        result_files.decode(msgspec.json.encode(twice))
