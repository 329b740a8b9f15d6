"""A wrong value of any option of any command is wrong usage: one line that names it, the exit code 2, and no run."""

import argparse
import importlib

import pytest

from fatui.cli import run
from fatui.cli.main import COMMANDS, main

LONG = "9" * 400
GENERAL = ("", "no such value", "-5", ",")
FILES = ("", "nowhere/file", LONG)
WRONG = {
    "gate --bench": ("'", "--seq", "--no-such"),
    "gate --keep": ("", "file/folder", LONG),
    "bench --hosts": ("", "a,,b", "a:0"),
    "model --hosts": ("", "a,,b", "a:0"),
    "finetune --data": ("", "nowhere/file", LONG),
    "stream --text": ("", "nowhere/file"),
}
"""Values that an option does not take, where those of others may be right."""
ANY_TEXT = ("tune --forget", "remote --python", "remote --serve", *(f"remote -{letter}" for letter in "piFJo"))
"""Options that take any text; those of ssh are for ssh to judge."""
BEFORE = {
    "model": ["tinyllama-1.1b"],
    "finetune": ["tinyllama-1.1b"],
    "stream": [],
    "gate": ["a", "b"],
    "compare": ["a", "b"],
    "history": ["show", "last"],
}
"""What has to be given besides."""
NAMED = {"impl": "implementation", "hosts": "host", "hostfile": "host", "chip": "chip", "beside": "chip"}
"""What messages call an option, where that is not its name."""


def options_of(command):
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"fatui.cli.{command}").add_arguments(parser)
    return [action for action in parser._actions if action.option_strings and action.nargs != 0]


@pytest.mark.parametrize("command", [name for name in COMMANDS if options_of(name)])
def test_a_wrong_value_is_wrong_usage(command, tmp_path, monkeypatch, capsys):
    def never(*arguments, **options):
        raise AssertionError("it ran")

    monkeypatch.setattr(run, "Engine", never)
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("no run")
    for action in options_of(command):
        option = action.option_strings[0]
        if f"{command} {option}" in ANY_TEXT:
            continue
        usual = FILES if action.metavar == "FILE" else GENERAL
        for value in WRONG.get(f"{command} {option}", usual):
            code = main([command, *BEFORE.get(command, ()), f"{option}={value}"])
            said = capsys.readouterr()
            what = f"{command} {option}={value[:20]}: {said.err}"
            name = option.lstrip("-")
            words = (name, name.replace("-", "_"), NAMED.get(name, name), *([value[:20]] if value else []))
            assert code == 2 and said.out == "", what
            assert any(word in said.err for word in words), what
