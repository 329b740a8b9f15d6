"""The wheel, the names that its packages can be imported by, the completion scripts and the manual page."""

import argparse
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fatui.cli.main import COMMANDS, main, whole_parser
from tests.support.manual import PAGE
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]


def run_python(*arguments, path, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        capture_output=True,
        text=True,
        timeout=patient(60),
        cwd="/",
    )


@pytest.fixture
def foreign_package(tmp_path):
    """What PyPI's project `attention` installs."""
    package = tmp_path / "attention"
    package.mkdir()
    (package / "__init__.py").write_text("from attention.attention import Attention  # noqa\n")
    (package / "attention.py").write_text("import tensorflow\n")
    return tmp_path


def test_a_foreign_package_called_attention_is_one_line(foreign_package):
    ran = run_python("-m", "fatui", "presets", path=(foreign_package, ROOT))
    assert ran.returncode == 3 and ran.stdout == ""
    assert ran.stderr.splitlines() == [
        f"fatui: the package `attention` at {foreign_package / 'attention'} is another project's: "
        "pip uninstall attention, then pip install --force-reinstall --no-deps fatui"
    ]


def test_fatui_attention_names_a_foreign_package(foreign_package):
    ran = run_python("-c", "import fatui.attention", path=(foreign_package, ROOT))
    assert "is another project's: pip uninstall attention" in ran.stderr.splitlines()[-1]


@pytest.mark.thorough
def test_the_engine_by_fatuis_name_is_the_same_engine():
    code = """
import attention.core.workload
import fatui.attention.core.workload
from fatui.attention import masks
from fatui.attention.core.errors import UsageError
assert fatui.attention is attention
assert fatui.attention.core.workload is attention.core.workload
assert masks is attention.masks and masks.__spec__.name == "attention.masks"
assert UsageError is attention.UsageError
try:
    import fatui.attention.nothing
except ModuleNotFoundError as error:
    print(error.name)
"""
    ran = run_python("-c", code, path=(ROOT,))
    assert (ran.stdout, ran.stderr) == ("attention.nothing\n", "")


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fatui", "be"], {"bench"}),
        (["fatui", "bench", "--se"], {"--seq", "--seconds"}),
        (["fatui", "bench", "qui"], {"quick"}),
        (["fatui", "completion", ""], {"bash", "zsh", "tcsh"}),
    ],
)
def test_bash_completes(words, expected, capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "fatui.bash"
    script.write_text(capsys.readouterr().out)
    typed = " ".join(f"'{word}'" for word in words)
    call = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_fatui; echo ${{COMPREPLY[@]}}"
    ran = subprocess.run(
        ["bash", "-c", call], check=False, capture_output=True, text=True, timeout=patient(20), cwd=tmp_path
    )
    assert set(ran.stdout.split()) == expected, ran.stderr


def test_the_manual_page_has_every_command_option_and_help():
    page = " ".join(PAGE.read_text().replace("\\-", "-").split())
    parser = whole_parser()
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    assert set(commands.choices) == set(COMMANDS)
    expected = {f"fatui {name}" for name in COMMANDS}
    for command in (parser, *commands.choices.values()):
        for action in command._actions:
            if action.help not in (None, argparse.SUPPRESS) and not isinstance(action, argparse._HelpAction):
                expected |= {*action.option_strings, " ".join(command._get_formatter()._expand_help(action).split())}
    missing = {text for text in expected if text not in page}
    assert not missing, f"{missing}; `make manual` writes the page"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("build"), reason="needs the extra `release`")
def test_the_wheel_is_whole_and_reproducible(tmp_path):
    def build(folder):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
        subprocess.run(command, check=True, capture_output=True, timeout=patient(300))
        return sorted(folder.iterdir())

    first, second = build(tmp_path / "first"), build(tmp_path / "second")
    assert [path.name for path in first] == [path.name for path in second] and len(first) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, first)],
        check=False,
        capture_output=True,
        timeout=patient(60),
    )
    assert checked.returncode == 0, checked.stdout
    (wheel,) = (path for path in first if path.suffix == ".whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "attention", "fatui"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert {name for name in tracked if Path(ROOT, name).is_file()} <= held
    assert {f"fatui/_presets/{path.name}" for path in Path(ROOT, "presets").glob("*.toml")} <= held
    metadata = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    info = f"fatui-{first[0].name.split('-')[1].removesuffix('.tar.gz')}"
    others = held - set(tracked) - {f"fatui/_presets/{path.name}" for path in Path(ROOT, "presets").glob("*.toml")}
    expected = {f"{info}.dist-info/{name}" for name in metadata}
    assert others == expected | {f"{info}.data/data/share/man/man1/fatui.1"}
