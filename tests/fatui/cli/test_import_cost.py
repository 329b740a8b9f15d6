import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def cpu_seconds(program: str) -> float:
    """Return the minimum CPU time of a few processes that run a program."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.thorough
def test_help_takes_less_than_100_ms_beyond_bare_python():
    ours = cpu_seconds("from fatui.cli.main import main; main(['--help'])")
    assert ours - cpu_seconds("pass") < 0.1


def test_no_command_imports_textual():
    commands = [
        ["--help"],
        ["bench", "--help"],
        ["presets"],
        ["history"],
        ["bench", "quick", "--batch", "0"],
        ["doctor", "--no-measure"],
    ]
    program = f"""
import sys
from fatui.cli.main import main
for arguments in {commands}:
    main(arguments)
    assert "textual" not in sys.modules, arguments
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_mlx_nor_rich():
    heavy = "{'mlx', 'rich', 'numpy'}"
    program = (
        f"import sys; from fatui.cli.main import main; main(['--help']); sys.exit(bool({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
