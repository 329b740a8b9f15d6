"""The command line: dispatch to commands, and conversion of errors to one-line messages and exit codes."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn, TextIO

from fatui import __version__, engine_problem  # no imports of the engine here: --help must not wait for them
from fatui.cli import DONE, FAILED, INTERRUPTED, NO_BACKEND, STOPPING, WRONG_USAGE, print_line

COMMANDS: Final = {
    "bench": "measure a preset, or the shapes that options give, and print the table",
    "model": "measure a whole model with each implementation: tokens/s of prefill and decode",
    "finetune": "fine-tune a model with each implementation: iterations/s, memory, loss curves",
    "stream": "follow a stream of tokens through a bounded cache: time, memory and loss, beside full attention",
    "remote": "open the app, or run a command, with the engine on another machine over ssh",
    "doctor": "report what this machine has, what is missing, and how to fix it",
    "explain": "show which path each implementation would take, and why, without running it",
    "predict": "predict a preset on chips that are not here, each time with an interval",
    "presets": "list presets, show one, or check one",
    "history": "list past runs, show one, or remove one",
    "compare": "compare past runs, row by row: two, pairs of them with a gate, or those of several machines",
    "gate": "measure two versions of the code in turns, until it is decided whether one is slower",
    "tune": "let demo find the fastest candidate for a preset, show what it found, or forget it",
    "schema": "print the JSON Schema of result files",
    "report": "write what past runs found: tables, trends, charts, and which implementation to choose",
    "completion": "print the completion script of a shell",
}
EXAMPLE: Final = """examples:
  fatui                         open the app
  fatui quick --run             open the app and start the preset `quick`
  fatui bench quick             measure without the app
  fatui bench --seq 512,2048 --mask causal --impl baseline,mlx"""


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UsageError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as a UsageError, for main to report."""
        from attention.core.errors import UsageError

        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments; report every unknown option with the nearest known one."""
        known, unknown = self.parse_known_args(arguments)
        if not unknown:
            return known
        from attention.core.errors import UsageError, suggestion

        options = [option for action in self._actions for option in action.option_strings]
        problems = [f"{word}: not known here{suggestion(word.partition('=')[0], options)}" for word in unknown]
        raise UsageError(*problems[:-1], f"{problems[-1]}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; stdout carries only results, stderr everything else."""
    if not _fill_closed_streams():
        print_line("cannot write the results: stdout is closed")
        return FAILED
    for stream in (sys.stdout, sys.stderr):
        # Characters that the terminal's encoding lacks, such as ±, are printed as question marks.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if problem := engine_problem():
        print_line(problem)
        return NO_BACKEND
    try:
        code = _run_and_report(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        return _discard_stdout(DONE)
    except KeyboardInterrupt:
        return _discard_stdout(INTERRUPTED)
    except OSError as error:
        print_line(f"cannot write the results: {error.strerror or error}")
        return _discard_stdout(FAILED)
    return code


def _fill_closed_streams() -> bool:
    """Open /dev/null for closed standard streams, so that no file reuses their numbers; return if stdout was open."""
    was_open = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    return was_open


def _run_and_report(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except SystemExit as error:  # argparse, after --help and --version
        return error.code if isinstance(error.code, int) else DONE
    except (ValueError, RuntimeError) as error:
        code = _code_of(error)
        if code is None:
            raise
        return code


def _code_of(error: Exception) -> int | None:
    """Report a wrong request, a missing backend, or an unusable history or machine; return its exit code, or None."""
    from attention.core.errors import NoBackendError, UsageError
    from fatui.storage.history import HistoryError, UnknownRun

    if isinstance(error, UsageError):
        for problem in error.problems:
            print_line(problem)
        return WRONG_USAGE
    if isinstance(error, NoBackendError):
        from fatui.formatting import problem_text

        print_line(problem_text(error))
        return NO_BACKEND
    if isinstance(error, HistoryError):
        print_line(error)
        return WRONG_USAGE if isinstance(error, UnknownRun) else FAILED
    from fatui.remote import RemoteError

    if isinstance(error, RemoteError):
        print_line(error)
        return FAILED
    return None


def _discard_stdout(code: int) -> int:
    """Redirect stdout to /dev/null, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    return code


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        command, request = command_request(arguments[0], arguments[1:])
        _catch_interrupts(*STOPPING)
        return int(command.run(request))
    return _open_app(arguments)


def command_request(name: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Return a command's module, and its parsed arguments.

    Raises:
        UsageError: an argument is not known, or missing.
    """
    command = importlib.import_module(f"fatui.cli.{name}")
    parser = Parser(
        prog=f"fatui {name}",
        description=_description(name),
        epilog=command.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return command, parser.parse_all(arguments)


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands and their options, for completion scripts and the manual page."""
    parser = argparse.ArgumentParser(prog="fatui", description="A terminal lab for attention kernels on MLX.")
    _add_app_options(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = importlib.import_module(f"fatui.cli.{name}")
        command.add_arguments(commands.add_parser(name, help=summary, description=_description(name)))
    return parser


def _description(name: str) -> str:
    """Return a command's summary as a sentence."""
    return f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."


def app_request(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments of the app.

    Raises:
        UsageError: they are wrong, or there is no terminal.
    """
    given = _app_parser().parse_all(arguments)
    if given.preset is not None:
        _check_preset(given.preset)
    # Textual reads keys from stdin and draws on stderr; served to a browser, it needs no terminal.
    on_terminal = all(map(_is_terminal, (sys.stdin, sys.stdout, sys.stderr))) and os.environ.get("TERM") != "dumb"
    if not on_terminal and not os.environ.get("TEXTUAL_DRIVER", "").endswith(":WebDriver"):
        from attention.core.errors import UsageError

        raise UsageError("the app needs a terminal; try `fatui bench`, which needs none")
    return given


def _open_app(arguments: list[str]) -> int:
    given = app_request(arguments)
    try:
        from fatui.tui.app import run_app  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        if error.name != "fatui.tui.app":
            raise
        from attention.core.errors import UsageError

        raise UsageError("the app is not installed; `fatui bench` measures without it") from None
    _catch_interrupts(signal.SIGINT)
    return int(run_app(given.preset, given.run, given.ascii))


def _catch_interrupts(*numbers: signal.Signals) -> None:
    """Make signals that end the process, as Ctrl-C did while it loaded (`fatui.__main__`), a KeyboardInterrupt."""
    for number in numbers:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _app_parser() -> Parser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="fatui",
        usage="fatui [PRESET] [--run] [--ascii]\n       fatui COMMAND ...",
        description=f"A terminal lab for attention kernels on MLX.\n\ncommands:\n{commands}",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "preset", nargs="?", metavar="PRESET", help="a preset's name or file, loaded when the app opens"
    )
    _add_app_options(parser)
    return parser


def _add_app_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", action="store_true", help="start measuring at once")
    parser.add_argument("--ascii", action="store_true", help="draw with ASCII characters only")
    parser.add_argument("--version", action="version", version=f"fatui {__version__}")


def _check_preset(name: str) -> None:
    from attention.core.errors import UsageError, suggestion
    from fatui.storage.presets import load

    try:
        load(name)
    except UsageError as error:
        command = suggestion(name, COMMANDS).replace("did you mean", "or did you mean the command")
        raise UsageError(*(f"{problem}{command}" for problem in error.problems)) from error
