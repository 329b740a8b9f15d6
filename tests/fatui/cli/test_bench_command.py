"""`fatui bench` on the real engine, in a separate process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.marks import thorough
from tests.support.patience import patient

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "fatui", "bench"]
SMALL = ["--batch", "1", "--seq", "32", "--head-dim", "16", "--heads", "2", "--dtype", "float32"]


def bench(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=patient(timeout), check=False
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "attention.engine.worker" in child.cmdline()]


@pytest.mark.parametrize("command", ["bench quick", thorough("explain"), thorough("doctor --no-measure")])
def test_without_a_backend_it_says_what_to_install_and_exits_3(tmp_path, command):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "fatui", *command.split()], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "fatui[cpu]" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_small_case_gives_rows_that_say_what_ran():
    done = bench("quick", *SMALL, "--impl", "baseline,mlx", "--seconds", "0.1", "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (case,) = document["cases"]
    assert [row["implementation"] for row in case["rows"]] == ["baseline", "mlx"]
    for row in case["rows"]:
        assert row["status"] == "ok"
        assert row["path"] and row["tokens_per_second"] > 0 and row["call_s"]["low"] <= row["call_s"]["median"]
    assert document["environment"]["backend"]
    assert document["peaks"]["matmul_flops_per_s"] > 0


@pytest.mark.slow
def test_what_will_not_fit_is_refused_and_is_no_failure():
    done = bench("quick", *SMALL, "--impl", "baseline", "--memory-limit", "1KiB", "--seconds", "0.3")
    assert done.returncode == 0, done.stderr
    assert "baseline: refused: needs" in done.stdout


@pytest.mark.slow
def test_an_implementation_that_is_not_there_is_reported():
    done = bench("quick", "--impl", "nowhere.py:Mine")
    assert done.returncode == 2
    assert "nowhere.py" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_one_row():
    names = ["baseline", "tests/support/planted.py:KilledInRounds", "mlx"]
    done = bench("quick", *SMALL, "--impl", ",".join(names), "--seconds", "0.3", "--json", "-")
    assert "Traceback" not in done.stderr
    baseline, killed, mlx = json.loads(done.stdout)["cases"][0]["rows"]
    assert killed["status"] == "failed" and "signal 9" in killed["reason"]
    assert baseline["status"] == mlx["status"] == "ok"
    assert done.returncode == 1


@pytest.mark.slow
def test_an_interrupt_leaves_no_process_behind(tmp_path):
    arguments = [*COMMAND, "quick", *SMALL, "--impl", "baseline,mlx", "--seconds", "60", "--json", str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        while "case 1 of 1" not in process.stderr.readline():
            pass
        time.sleep(0.5)
        workers = workers_of(process)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=patient(20))
        assert time.monotonic() - started < patient(1.5)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "baseline" in out or "nothing was measured" in err  # where the machine is too busy to begin in time
    assert json.loads((tmp_path / "x").read_text())["run"]["interrupted"] is True
    assert workers and not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_a_first_look_or_a_later_run_takes_ten_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path / "empty"))  # nothing is compiled yet
    with subprocess.Popen(
        [*COMMAND, "quick"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        started = time.monotonic()
        assert run.stderr is not None
        while "a first look" not in (line := run.stderr.readline()):
            assert line, "it ended without one"
        assert time.monotonic() - started < 10
        run.communicate(timeout=120)
    started = time.monotonic()
    done = bench("quick")
    took = time.monotonic() - started
    print(f"\nquick: {took:.1f} s")
    assert took < 10
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_seed_table_is_done_within_90_seconds():
    started = time.monotonic()
    done = bench("seed-table", "--json", "-", timeout=120)
    assert time.monotonic() - started < 90
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {row["status"] for case in document["cases"] for row in case["rows"]} == {"ok"}
    assert len(document["cases"]) == 6 and "cold start" in document["study"]["note"]
