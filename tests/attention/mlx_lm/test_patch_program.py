"""An unmodified mlx-lm program runs with attention replaced, and prints a report at its end."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
print(sys.argv[1:], __name__)
import mlx.core as mx
from mlx_lm.models import llama
q = mx.zeros((1, 2, 3, 8))
llama.scaled_dot_product_attention(q, q, q, None, 1.0, None)
def fail():
    raise KeyError("its own")
if "fail" in sys.argv:
    fail()
sys.exit(int(sys.argv[1]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "attention.patch", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_program_runs_as_it_is_and_ends_with_a_report(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run("--implementation", "baseline", str(tmp_path / "program.py"), "7", "--implementation")
    assert done.returncode == 7, done.stderr
    assert done.stdout == "['7', '--implementation'] __main__\n"
    assert done.stderr.splitlines() == [
        "baseline took 1 of 1 calls of attention",
        "baseline took 1 as manual, unfused",
    ]


@pytest.mark.slow
def test_a_programs_traceback_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    done = run(str(path), "fail")
    alone = subprocess.run([sys.executable, str(path), "fail"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (alone.returncode, alone.stdout)
    assert done.stderr.startswith(alone.stderr)
    assert "practical took 1 of 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "attention.patch: got no program; it takes SCRIPT ARGS... or -m MODULE ARGS...; see --help"),
        (["missing.py"], "attention.patch: there is no file missing.py"),
        (["-m", "mlx_lm.missing"], "attention.patch: -m: there is no module mlx_lm.missing"),
    ],
)
def test_a_wrong_command_line_is_reported_in_one_line(words: list[str], line: str) -> None:
    from attention.patch import main

    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr(sys.stderr, "write", written.append)
        assert main(words) == 2
    assert "".join(written).strip() == line


@pytest.mark.thorough
def test_without_mlx_lm_the_error_says_how_to_get_it() -> None:
    program = (
        "import sys; sys.modules['mlx_lm'] = None\n"
        "import attention\n"
        "try:\n    attention.patch_mlx_lm().__enter__()\nexcept attention.UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "mlx-lm is not installed: pip install 'mlx-lm>=0.32'"
