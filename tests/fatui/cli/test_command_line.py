import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Final

import psutil
import pytest

from fatui.cli import INTERRUPTED, run
from fatui.cli import main as cli_main
from fatui.cli.main import main
from fatui.cli.options import split_masks
from fatui.storage.history import RunHistory
from tests.support.fake_engine import FakeEngine
from tests.support.patience import patient
from tests.support.sample_runs import report_of

ROOT = Path(__file__).parents[3]
FAKE = ROOT / "tests" / "support" / "fake_engine.py"


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch):
    monkeypatch.setattr(run, "Engine", FakeEngine)


def fatui(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Run fatui in a separate process on the fake engine."""
    return subprocess.Popen(
        [sys.executable, str(FAKE), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def end_of(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes, float]:
    """Return what a process printed, of either kind less than a pipe holds, and its CPU time in seconds."""
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        out, err = process.stdout.read(), process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)  # that of all children would have those of other tests that end now
    process.returncode = os.waitstatus_to_exitcode(status)
    return out, err, used.ru_utime + used.ru_stime


def reported(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.removeprefix("fatui: ") for line in captured.err.splitlines()]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("command", sorted(cli_main.COMMANDS))
def test_every_commands_help_has_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out and f"fatui {command}" in out


@pytest.mark.parametrize(("command", "blas"), [("bench", "mlx"), ("model", "numpy"), ("stream", "mlx")])
def test_help_names_the_default_blas_of_the_command(command, blas, capsys):
    assert main([command, "--help"]) == 0
    assert f"reference BLAS ({blas})" in " ".join(capsys.readouterr().out.split())


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli_main.COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fatui 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quikc"], "preset: there is none named 'quikc' (did you mean 'quick'?)"),
        ([""], "preset: there is none named ''"),
        (["--seq", "99m"], "seq: got '99m'; it takes a whole number from 1"),
        (["--batch", "0"], "batch: got 0; it takes a whole number from 1"),
        (["--seq=-5"], "seq: got -5; it takes a whole number from 1"),
        (["--head-dim", "1.5"], "head_dim: got '1.5'; it takes a whole number"),
        (["--head-dim", "9" * 5000], "head_dim: got '9999"),
        (["--seq", "64,,128"], "seq: got ''; it takes a whole number"),
        (["--heads", "8", "--kv-heads", "3"], "kv_heads: got 3; it must divide heads, which is 8"),
        (["--dtype", "fp16"], "dtype: got 'fp16'; it takes float32, float16, bfloat16 (did you mean 'float16'?)"),
        (["--mask", "windw:4"], "mask: got 'windw:4'; it takes none, causal, window:N"),
        (["--pass", "backward"], "pass: got 'backward'"),
        (["--impl", "basline"], "implementations: got 'basline'"),
        (["--impl", ""], "implementations: got ''"),
        (["--seconds", "nan"], "--seconds: got nan"),
        (["--seconds", "soon"], "--seconds: got 'soon'"),
        (["--memory-limit", "lots"], "--memory-limit: got 'lots'"),
        (["--json", "nowhere/x.json"], "--json: nowhere/x.json cannot be written: there is no folder"),
        (["--json", "."], "--json: got '.'; it takes a file, or '-' for stdout"),
        (["--parquet", "-"], "--parquet: got '-'; it takes a file"),
        (["--json", "-", "--csv", "-"], "--csv: '-' is already the file of --json"),
        (["--jsno", "x"], "--jsno: not known here (did you mean '--json'?)"),
        (["--batch"], "argument --batch: expected one argument"),
        (["--batch", ",".join(map(str, range(1, 2000)))], "1,999 cases"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    lines = reported(capsys)
    assert any(expected in line for line in lines), lines
    assert all(len(line) < 300 for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_are_reported_at_once(capsys):
    assert main(["bench", "--batch", "0", "--impl", "basline,pco", "--seconds", "x", "--csv", "/nowhere/x"]) == 2
    lines = reported(capsys)
    assert [line.partition(":")[0] for line in lines] == [
        "batch",
        "implementations",
        "implementations",
        "--seconds",
        "--csv",
    ]


def test_a_broken_preset_is_reported_with_its_file(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("schema = 1\nfoo = 1\nbar = 2\n[workload]\nhead_dim = 0\n")
    assert main(["bench", str(path)]) == 2
    assert [line.startswith(f"{path}: ") for line in reported(capsys)] == [True, True, True]
    assert main(["presets", "check", str(path)]) == 2
    path.write_text("schema = = 1\n")
    assert main(["presets", "check", str(path)]) == 2
    assert "line 1, column 10" in capsys.readouterr().err


def test_a_file_that_exits_on_import_does_not_end_explain(capsys, tmp_path):
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    assert main(["explain", "--impl", f"{tmp_path}/leaves.py:X,mlx"]) == 2
    assert reported(capsys) == [f"implementation: '{tmp_path}/leaves.py:X' cannot be loaded: SystemExit: 0"]


def test_a_missing_file_is_named_with_its_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "--impl", "mine.py:fast"]) == 2
    assert reported(capsys) == [
        f"implementation: 'mine.py:fast' cannot be loaded: no Python file at {tmp_path / 'mine.py'}"
    ]


def test_a_function_is_not_said_to_be_unfused(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def fast(q, k, v):\n    return q\n")
    assert main(["explain", "--impl", f"{tmp_path}/mine.py:fast"]) == 0
    shown = capsys.readouterr().out
    assert "it is not known how it works" in " ".join(shown.split()) and "unfused" not in shown


def test_a_function_is_said_to_take_no_quantized_keys(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def fast(q, k, v):\n    return q\n")
    decode = ["--pass", "decode", "--kv-seq", "256", "--head-dim", "64", "--kv-format", "int4"]
    assert main(["explain", *decode, "--impl", f"{tmp_path}/mine.py:fast"]) == 0
    assert "it takes no quantized keys and values" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("ending", "code", "expected"),
    [
        ("", 0, ""),
        ("failed", 1, "poc: failed: killed by signal 9"),
        ("inaccurate", 1, "poc: inaccurate: output: 3e-2"),
        ("refused", 0, "poc: refused: needs 41 GiB of 22"),
    ],
)
def test_the_exit_code_tells_whether_a_case_failed(ending, code, expected, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_ENDING", ending)
    assert main(["bench", "quick"]) == code
    assert expected in capsys.readouterr().out


def test_without_a_backend_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setenv("FAKE_ENDING", "no backend")
    assert main(["bench", "quick"]) == 3
    (line,) = reported(capsys)
    assert "fatui[cpu]" in line


def test_json_on_stdout_is_alone_there(capsys):
    assert main(["bench", "seed-table", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["cases"]) == 6
    assert document["study"]["rows"][0]["baseline"] == 3083


def test_options_override_the_preset_and_the_command_says_so(capsys):
    arguments = ["bench", "quick", "--seq", "64,128", "--mask", "causal", "--impl", "baseline,demo", "--seconds", "2"]
    assert main([*arguments, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [case["workload"]["seq"] for case in document["cases"]] == [64, 128]
    assert [case["workload"]["kv_seq"] for case in document["cases"]] == [64, 128]
    assert {row["implementation"] for case in document["cases"] for row in case["rows"]} == {"baseline", "demo"}
    again = document["run"]["command"]
    assert again == "fatui bench quick --seq 64,128 --mask causal --impl baseline,demo --seconds 2"


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        (["llama-7b", "--pass", "decode", "--kv-seq", "64"], {(1, 64)}),
        (["llama-7b", "--pass", "forward", "--seq", "64"], {(64, 64)}),
        (["llama-7b", "--seq", "64"], {(64, 64), (1, 64)}),
        (["quick", "--kv-seq", "256"], {(128, 256)}),
        (["quick", "--seq", "4k,1K"], {(4096, 4096), (1024, 1024)}),
        (["quick", "--pass", "decode"], {(1, 128)}),
    ],
)
def test_sequences_follow_the_pass(arguments, shapes, capsys):
    assert main(["bench", *arguments, "--json", "-"]) == 0
    workloads = [case["workload"] for case in json.loads(capsys.readouterr().out)["cases"]]
    assert {(workload["seq"], workload["kv_seq"]) for workload in workloads} == shapes


def test_a_run_without_a_preset_is_listed_by_its_case(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    RunHistory().add(report_of())
    assert main(["history"]) == 0
    assert "  B=1 L=128 D=64 H=8 float16  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["quick", "--seconds", "2"], "quick"),
        (["quick", "--seq", "64"], "B=1 L=64 D=32 H=8 float16"),
        (["--seq", "64"], "B=1 L=64 D=32 H=8 float16"),
    ],
)
def test_other_cases_than_the_presets_are_listed_by_shape(arguments, name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["bench", *arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["preset"] == (name if name == "quick" else None)
    assert main(["history"]) == 0
    assert f"  {name}  " in capsys.readouterr().out


@pytest.mark.parametrize("width", ["40", "60"])
@pytest.mark.parametrize("command", ["compare last last", "explain quick", "presets", "predict quick"])
def test_a_narrow_terminal_cuts_no_figure(command, width, capsys, monkeypatch):
    RunHistory().add(report_of())
    monkeypatch.setenv("COLUMNS", width)
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= int(width)


def test_a_long_name_hides_no_column_of_the_history(capsys):
    assert main(["bench", "quick", "--seq", "64,128,256"]) == 0
    capsys.readouterr()
    assert main(["history"]) == 0
    heads, line, *_ = capsys.readouterr().out.splitlines()
    assert "started" in heads and "cases" in heads and "3 cases, B=1" in line


def test_a_narrow_history_keeps_ids_and_findings(capsys, monkeypatch):
    RunHistory().add(report_of())
    monkeypatch.setenv("COLUMNS", "45")
    assert main(["history"]) == 0
    out = capsys.readouterr().out
    assert report_of().run.id in out and "Use poc · 50.0x baseline" in " ".join(out.split())


def test_what_a_narrow_terminal_leaves_out_is_named(capsys, monkeypatch):
    RunHistory().add(report_of())
    monkeypatch.setenv("COLUMNS", "45")
    assert main(["compare", "last", "last"]) == 0
    out = capsys.readouterr().out
    assert "no room for times, before: widen the terminal" in out
    assert "relative to baseline, which is as fast as before" in " ".join(out.split())


def test_every_run_is_kept_and_can_be_shown_and_removed(capsys):
    assert main(["bench", "quick"]) == 0
    table = capsys.readouterr().out
    assert main(["history"]) == 0
    assert "Use poc · 50.0x baseline" in capsys.readouterr().out
    assert main(["history", "show", "last"]) == 0
    assert capsys.readouterr().out == table
    assert main(["history", "rm", "last"]) == 0
    assert main(["history", "show", "last"]) == 2
    assert "no run 'last'" in capsys.readouterr().err


def test_a_history_that_cannot_be_used_costs_no_result(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert main(["bench", "quick"]) == 0
    captured = capsys.readouterr()
    assert "fastest" in captured.out
    assert "not kept in the history" in captured.err


def test_a_damaged_history_is_reported_and_replaced(capsys):
    path = RunHistory().path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nonsense " * 1000)
    assert main(["bench", "quick"]) == 0
    assert "is damaged" in capsys.readouterr().err
    assert len(RunHistory().runs()) == 1
    assert len(list(path.parent.glob("*.damaged-*"))) == 1


def test_exports_are_written_and_say_what_the_table_says(capsys, tmp_path):
    targets = [tmp_path / name for name in ("a.json", "a.csv", "a.md")]
    options = [
        word
        for name, path in zip(("json", "csv", "markdown"), targets, strict=True)
        for word in (f"--{name}", str(path))
    ]
    assert main(["bench", "quick", *options]) == 0
    assert "fastest" in capsys.readouterr().out
    assert json.loads(targets[0].read_text())["cases"][0]["rows"][1]["path"] == "CPU kernel avx512"
    assert len(targets[1].read_text().splitlines()) == 5
    assert "| poc | CPU kernel avx512 |" in targets[2].read_text()


@pytest.mark.thorough
def test_a_full_disk_on_export_keeps_the_old_file(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    process = subprocess.Popen(
        [sys.executable, str(FAKE), "bench", "scaling", "--json", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),  # noqa: PLW1509
    )
    out, err = process.communicate(timeout=patient(20))
    assert process.returncode == 1, err
    assert b"geometric mean" in out
    assert b"out.json could not be written: File too large; the existing file is unchanged" in err
    assert b"Traceback" not in err
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["out.json"]


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}])
def test_the_app_without_a_terminal_is_one_line_and_exit_code_2(environment):
    with fatui("quick", **environment) as process:
        out, err = process.communicate(timeout=patient(30))
    assert (process.returncode, out) == (2, b"")
    assert err == b"fatui: the app needs a terminal; try `fatui bench`, which needs none\n"


@pytest.mark.thorough
def test_a_closed_stdout_is_reported():
    command = f"exec {sys.executable} {FAKE} history >&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, env=environment, check=False)
    assert (done.returncode, done.stderr) == (1, b"fatui: cannot write the results: stdout is closed\n")


def test_the_history_takes_no_word_that_it_would_ignore(capsys):
    assert main(["history", "remove"]) == 2
    assert "it takes list, show ID, rm ID, or add FILE or FOLDER" in capsys.readouterr().err
    assert main(["history", "list", "extra"]) == 2
    assert reported(capsys) == ["history list: it takes nothing further, got 'extra'; `show ID` shows a run"]


@pytest.mark.parametrize("words", [["list"], ["rm", "1"], ["add", "missing.json"]])
def test_the_history_takes_no_export_that_it_would_ignore(words, tmp_path, capsys):
    assert main(["history", *words, "--json", str(tmp_path / "x.json")]) == 2
    assert reported(capsys) == [f"history {words[0]}: it takes no --json; `show ID --json FILE` exports a run"]


@pytest.mark.thorough
def test_stdout_closed_early_is_no_error():
    with fatui("bench", "scaling") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert b"Traceback" not in err and b"rror" not in err


def test_stdout_on_a_full_device_is_reported():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, str(FAKE), "bench", "quick"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr and b"Traceback" not in done.stderr


CTRL_C_AT: Final = """
import os, signal, sys

at, sys.argv = sys.argv[1], ["fatui", "presets", "list"]

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
from fatui.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(("loading", "code"), [("fatui.cli.presets", -signal.SIGINT), ("rich.table", INTERRUPTED)])
def test_ctrl_c_while_the_program_loads(loading, code):
    ended = subprocess.run([sys.executable, "-c", CTRL_C_AT, loading], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_command_with_the_documented_code(number):
    """Commands without an engine of their own end as those with one do: `gate` ends its children on the way."""
    code = (
        "import os, sys\nfrom fatui.cli import explain\nfrom fatui.cli.main import main\n"
        "def wait(arguments):\n    try: os.kill(os.getpid(), int(sys.argv[1]))\n"
        "    finally: print('cleaned up', flush=True)\n"
        "explain.run = wait\nsys.exit(main(['explain']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int(number))], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "cleaned up\n", "")


def test_the_script_begins_as_python_dash_m():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fatui": "fatui.__main__:main"}


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_within_a_second_and_keeps_results(number, tmp_path):
    target = tmp_path / "out.json"
    process = fatui("bench", "scaling", "--json", str(target), FAKE_HOLD="1")
    assert process.stderr is not None
    while b"case 2" not in process.stderr.readline():
        pass
    before = sum(psutil.Process(process.pid).cpu_times()[:2])
    started = time.monotonic()
    process.send_signal(number)
    out, err, cpu_s = end_of(process)
    assert cpu_s - before < 1
    assert time.monotonic() - started < patient(5)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"fastest" in out
    document = json.loads(target.read_text())
    assert document["run"]["interrupted"] is True
    assert len(document["cases"]) == 2


def test_no_colour_and_no_escapes_when_piped():
    process = fatui("bench", "quick", NO_COLOR="")
    out, err = process.communicate(timeout=patient(20))
    assert b"\x1b" not in out + err


@pytest.mark.thorough
def test_an_ascii_terminal_gets_a_table_too():
    process = fatui("bench", "quick", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=patient(20))
    assert process.returncode == 0, err
    assert out.isascii()


@pytest.mark.parametrize(
    ("text", "masks"),
    [
        ("causal", ["causal"]),
        ("blocks:0.5,0.25, 0.1", ["blocks:0.5", "blocks:0.25", "blocks:0.1"]),
        ("strided:256,4", ["strided:256,4"]),
        ("window:8,16,none", ["window:8", "window:16", "none"]),
        ("prefix:4+strided:9,2,causal", ["prefix:4+strided:9,2", "causal"]),
        ("prefix:4+window:8,16", ["prefix:4+window:8", "prefix:4+window:16"]),
        ("strided:8,2,9", ["strided:8,2", "strided:9"]),
    ],
)
def test_commas_separate_masks(text, masks):
    assert split_masks(text) == masks


def test_an_option_takes_several_masks(capsys):
    assert main(["bench", "--mask", "blocks:0.5,2", "--seconds", "x"]) == 2
    assert reported(capsys)[0] == "mask: got 'blocks:2'; blocks takes a density above 0 and at most 1, as in blocks:0.1"
