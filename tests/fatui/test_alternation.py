"""Two versions of the code that measure in turns, and the command `fatui gate` that compares them."""

import os
import socket
import threading
from pathlib import Path

import pytest

from attention.core import events as on
from attention.core.plan import Assignment, Plan
from attention.core.workload import Workload
from attention.engine.bench import Bench
from attention.engine.turns import TURNS, Turns
from fatui.alternation import Ended, in_turns
from fatui.cli.main import main
from fatui.storage.result_files import read
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import sys
from pathlib import Path
from attention.engine.turns import TURNS, Turns
{body}
Path(sys.argv[-1]).write_text("measured")
"""
ROUNDS = """
turns, log = Turns(os.environ[TURNS]), Path("../log")
for number in range({rounds}):
    with log.open("a") as file:
        file.write("{name}%d " % number)
    turns.pass_on()
"""


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """Make folders whose `fatui` is a program of a few lines."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))

    def make(**bodies: str) -> list[Path]:
        for name, body in bodies.items():
            (tmp_path / name / "fatui").mkdir(parents=True)
            (tmp_path / name / "fatui" / "__init__.py").touch()
            (tmp_path / name / "fatui" / "__main__.py").write_text(PROGRAM.format(body=body))
        return [tmp_path / name for name in bodies]

    return make


def run(folders: list[Path]) -> str:
    """Run the versions in turns; return what they logged."""
    files = [folder.parent / f"{folder.name}.json" for folder in folders]
    with in_turns(folders, ["quick"]) as alternation:
        alternation.measure(files)
    assert all(file.read_text() == "measured" for file in files)
    return (folders[0].parent / "log").read_text()


def test_rounds_alternate(versions):
    bodies = {name: ROUNDS.format(name=name, rounds=4) for name in "ab"}
    assert run(versions(**bodies)) == "a0 b0 a1 b1 a2 b2 a3 b3 "


@pytest.mark.thorough
def test_one_goes_on_alone_when_the_other_is_done(versions):
    folders = versions(a=ROUNDS.format(name="a", rounds=1), b=ROUNDS.format(name="b", rounds=3))
    assert run(folders) == "a0 b0 b1 b2 "


@pytest.mark.thorough
def test_a_version_that_takes_no_turns_runs_alone(versions):
    alone = 'Path("../log").open("a").write("old ")'
    assert run(versions(a=ROUNDS.format(name="a", rounds=2), old=alone)) == "old a0 a1 "


def test_a_restarted_worker_takes_the_place_of_the_first(versions):
    again = ROUNDS.format(name="b", rounds=1) + "turns._socket.close()\n" + ROUNDS.format(name="again", rounds=1)
    assert run(versions(a=ROUNDS.format(name="a", rounds=3), b=again)).split()[:3] == ["a0", "b0", "a1"]


@pytest.fixture
def turns_of_one(tmp_path, monkeypatch):
    """Serve turns to one worker of this process; the list says when it connected."""
    happened: list[object] = []
    monkeypatch.chdir(tmp_path)  # the path of a socket has 100 bytes or so
    monkeypatch.setenv(TURNS, "turns")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("turns")
        listening.listen()

        def serve():
            worker = listening.accept()[0]
            happened.append("connected")
            with worker:
                worker.sendall(b".")
                while worker.recv(1):
                    worker.sendall(b".")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield happened
        thread.join(patient(60))
        assert not thread.is_alive()


def test_a_worker_in_turns_measures_only_what_is_compared(turns_of_one):
    """It loads before its first turn, and leaves with its last round; no rates, latencies and repeated reference."""
    plan = Plan(cases=(Workload(seq=8, heads=1, head_dim=8),), implementations=("baseline", "mlx"), seconds=0.05)

    def emit(event):
        turns_of_one.append(event)
        if isinstance(event, on.RunDone):
            assert bench._turns.alone

    bench = Bench(Assignment(plan=plan), plan, emit)
    bench.run()
    kinds = [event if isinstance(event, str) else type(event) for event in turns_of_one]
    assert kinds.index(on.RunStarted) < kinds.index("connected") < kinds.index(on.FirstCall)
    assert on.PeaksMeasured not in kinds
    assert not any(isinstance(event, on.StepStarted) and event.step == "latency" for event in turns_of_one)
    sampled = {name for event in turns_of_one if isinstance(event, on.RoundsDone) for name in event.samples}
    assert sampled == {"baseline", "mlx"}
    assert kinds[-1] is on.RunDone


STAYS = """
from fatui.alternation import next_file
file = sys.argv[-1]
while True:
    turns = Turns(os.environ[TURNS])
    Path(file).write_text(f"{{os.getpid()}} {{Path(os.environ[TURNS]).parent.name}}")
    turns.end()
    if (file := next_file()) is None:
        raise SystemExit(0)
"""
ONCE = """
Turns(os.environ[TURNS])
Path(sys.argv[-1]).write_text(f"{{os.getpid()}} {{Path(os.environ[TURNS]).parent.name}}")
raise SystemExit(0)
"""


def test_a_command_stays_for_all_pairs_if_it_knows_how(versions, tmp_path):
    """Its runs name their pair; one of an older version is started again for each."""
    folders = versions(a=STAYS.format(), b=ONCE.format())
    (tmp_path / "a" / "fatui" / "alternation.py").symlink_to(ROOT / "fatui" / "alternation.py")
    processes, pairs = [], []
    with in_turns(folders, ["quick"]) as alternation:
        for number in range(3):
            files = [tmp_path / f"{name}{number}.json" for name in "ab"]
            alternation.measure(files, first=number % 2)
            found = [file.read_text().split() for file in files]
            processes.append([process for process, _ in found])
            pairs.append({pair for _, pair in found})
    assert len({a for a, _ in processes}) == 1
    assert len({b for _, b in processes}) == 3
    assert [len(pair) for pair in pairs] == [1, 1, 1]
    assert len(set.union(*pairs)) == 3


def test_a_command_that_stays_ends_with_the_code_of_its_run(versions, tmp_path):
    body = "from fatui.alternation import next_file\nnext_file()\nraise SystemExit(2)"
    folders = versions(a=body)
    (tmp_path / "a" / "fatui" / "alternation.py").symlink_to(ROOT / "fatui" / "alternation.py")
    with in_turns(folders, ["quick"]) as alternation, pytest.raises(Ended) as ended:
        alternation.measure([tmp_path / "a.json"])
    assert ended.value.code == 2


def test_a_version_without_rows_is_named_with_its_last_line(versions):
    folders = versions(a="", b='raise SystemExit("no such implementation: x")')
    with pytest.raises(Ended, match=r"b: no run was measured: no such implementation: x$"):
        run(folders)


def test_without_others_nobody_waits(tmp_path):
    for path in (None, str(tmp_path / "gone")):
        turns = Turns(path)
        turns.pass_on()
        assert turns.alone


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--bench", "quick --impl"], "--bench: argument --impl"),
        (["--bench", "'quick"], "--bench: No closing quotation"),
        (["--pairs", "2"], "--pairs: got 2; it takes 5 to 25"),
        (["--fail-on", "slow"], "--fail-on: got 'slow'"),
    ],
)
def test_wrong_options_are_one_line_each(arguments, problem, tmp_path, capsys):
    assert main(["gate", str(tmp_path), str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_what_the_versions_do_not_take_is_wrong_usage(versions, capsys):
    refuses = 'print("seq: got 0", file=sys.stderr); raise SystemExit(2)'
    folders = map(str, versions(a=refuses, b=refuses))
    assert main(["gate", *folders, "--bench", "quick --seq 0"]) == 2
    assert "no run was measured: seq: got 0" in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main(["gate", str(tmp_path), str(tmp_path / "none")]) == 2
    assert "none: there is no such folder" in capsys.readouterr().err


def test_runs_are_not_kept_beside_others(tmp_path, capsys):
    """`fatui compare` of the folders would judge runs that the gate has not measured."""
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "09.json").write_text("{}")
    assert main(["gate", str(tmp_path), str(tmp_path), "--keep", str(tmp_path / "runs")]) == 2
    assert "has runs already" in capsys.readouterr().err


PLANTED = """
import time

def planted(q, k, v, scale):
    from attention import attention
    import mlx.core as mx
    out = attention(q, k, v, scale=scale)
    mx.eval(out)
    time.sleep({delay})
    return out
"""


@pytest.mark.slow
def test_a_slower_version_fails_the_gate(tmp_path, capsys):
    folders = [tmp_path / name for name in ("base", "new")]
    for folder, delay in zip(folders, (0.0, 0.02), strict=True):
        folder.mkdir()
        (folder / "planted.py").write_text(PLANTED.format(delay=delay))
    bench = "--seq 64 --impl baseline,planted.py:planted --seconds 0.3"
    code = main(["gate", *map(str, folders), "--bench", bench, "--keep", str(tmp_path / "runs"), "--pairs", "8"])
    captured = capsys.readouterr()
    assert code == 4, captured.err
    assert "planted.py:planted on" in captured.err and "SLOWER" in captured.out
    first, second = (read(tmp_path / "runs" / name / "01.json") for name in ("base", "new"))
    assert first.run.in_turns and first.run.in_turns == second.run.in_turns
