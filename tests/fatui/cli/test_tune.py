"""`fatui tune` runs trials, shows, forgets and checks choices, and reports invalid requests."""

import time
import tomllib
from pathlib import Path

import pytest

from attention.implementations.autotune.implementation import Demo
from fatui.cli.main import main

SMALL = """schema = 1
implementations = ["baseline", "demo"]
[workload]
heads = 1
head_dim = 8
dtype = "float32"
[sweep]
seq = [8, 32]
"""


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache folder, with the session's compiled kernels."""
    from attention.kernels.common import cache

    kernels = cache.folder()
    folder = tmp_path / "own"
    folder.mkdir()
    if kernels.is_dir():
        (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv("FATUI_CACHE_DIR", str(folder))
    return folder / "tuning.toml"


def test_it_tries_each_case_shows_what_it_found_and_forgets(
    preset: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", preset, "--seconds", "0.05"]) == 0
    captured = capsys.readouterr()
    table = captured.out
    assert f"demo uses these from now on; they are stored in {file}" in captured.err
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["BH≤1", "L≤8"], ["BH≤1", "L≤32"]]
    assert len(tomllib.loads(file.read_text())["class"]) == 2
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == table
    assert main(["tune", "--forget", "L≤8"]) == 0
    assert main(["tune", "--show"]) == 0
    assert "L≤8" not in capsys.readouterr().out
    assert main(["tune", "--forget"]) == 0
    assert main(["tune", "--show"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing is stored" in captured.err


@pytest.mark.slow
def test_the_check_prints_two_figures(
    preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Demo.__init__  # with a clock that waiting for a core does not move
    monkeypatch.setattr(Demo, "__init__", lambda demo, **more: made(demo, **more, clock=time.process_time))
    code = main(["tune", "--check", preset, "--seconds", "0.1"])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert code in (0, 1)  # so short a check may find anything
    assert first.startswith("demo is at least ")
    assert "the best single candidate, at B=1 L=" in first
    assert second.startswith("it found the best, or one inside the noise floor, in ")
    assert "of 2 cases" in second
    assert first.endswith("; 0.97x is required")
    assert second.endswith("; 95% is required")


@pytest.mark.thorough
def test_choices_that_other_kernels_were_tried_for_are_marked(
    preset: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", preset, "--seconds", "0.05"]) == 0
    first, rest = file.read_text().split("made_with = ", 1)
    file.write_text(f'{first}made_with = "another{rest.removeprefix(chr(34))}')
    capsys.readouterr()
    assert main(["tune", "--show"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count(" * ") == 1
    assert "will be tried again" in captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quikc"], "there is none named 'quikc' (did you mean 'quick'?)"),
        (["--seconds", "soon"], "--seconds: got 'soon'"),
        (["--show", "quick"], "--show and --forget take no preset"),
        (["--show", "--check"], "not allowed with argument"),
    ],
)
def test_a_mistake_is_reported_with_exit_code_2(
    arguments: list[str], expected: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
    assert not file.exists()


def test_a_case_that_fails_is_reported_and_the_others_are_kept(
    preset: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = Demo.tune

    def failing(self, task):
        if task.workload.seq == 8:
            raise RuntimeError("none of them could be run")
        return tune(self, task)

    monkeypatch.setattr(Demo, "tune", failing)
    assert main(["tune", preset, "--seconds", "0.05"]) == 1
    captured = capsys.readouterr()
    assert "failed: none of them could be run" in captured.err
    assert "L≤32" in captured.out


def test_a_case_that_does_not_fit_is_refused_and_not_begun(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "huge.toml"
    path.write_text('schema = 1\nimplementations = ["demo"]\n[workload]\nseq = 1_000_000\nheads = 4096\n')
    assert main(["tune", str(path)]) == 0
    assert "refused: needs " in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.thorough
def test_a_damaged_file_is_reported_and_kept(preset: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("nonsense")
    assert main(["tune", preset, "--seconds", "0.05"]) == 0
    assert "damaged; it is kept as tuning.damaged-" in capsys.readouterr().err
    assert [path.read_text() for path in file.parent.glob("*.damaged-*")] == ["nonsense"]


def test_a_newer_file_is_reported_and_not_forgotten(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("schema = 99\n")
    assert main(["tune", "--forget"]) == 0
    assert "written by a newer fatui" in capsys.readouterr().err
    assert file.read_text() == "schema = 99\n"
