"""`fatui completion`: the completion script of a shell."""

import argparse
import shlex
from typing import Final

from fatui import cli

SHELLS: Final = ("bash", "zsh", "tcsh")
EXAMPLE: Final = """examples:
  fatui completion bash > ~/.local/share/bash-completion/completions/fatui
  fatui completion zsh > ~/.zfunc/_fatui     (with fpath+=~/.zfunc in ~/.zshrc)
  fatui completion tcsh > ~/.fatui.tcsh      (with `source ~/.fatui.tcsh` in ~/.tcshrc)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's argument."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that the script is for")


def run(arguments: argparse.Namespace) -> int:
    """Print the script: commands, options, their values, files, and the presets of today."""
    import shtab

    from fatui.cli.main import whole_parser
    from fatui.storage.presets import list_presets

    parser = whole_parser()
    for command in _subparsers(parser):
        for action in command._actions:
            if action.dest == "preset":
                action.complete = {"bash": "_fatui_preset", "zsh": "_fatui_preset", "tcsh": "f"}  # type: ignore[attr-defined]
            elif action.metavar in ("FILE", "FOLDER"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    words = shlex.quote(" ".join(listed.name for listed in list_presets()))
    preamble = {
        "bash": f'_fatui_preset() {{ compgen -W {words} -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"_fatui_preset() {{ compadd -- ${{=:-{words}}}; _files }}",
        "tcsh": "",
    }
    print(shtab.complete(parser, arguments.shell, preamble=preamble[arguments.shell]))
    return cli.DONE


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    return [
        command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for command in action.choices.values()
    ]
