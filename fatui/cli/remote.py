"""`fatui remote`: the app, or a command, with the engine on another machine over ssh."""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Final

from attention.core.errors import UsageError, suggestion
from fatui import cli

if TYPE_CHECKING:
    from fatui.remote import Remote

MEASURING: Final = ("bench", "model", "finetune", "stream")
"""Commands whose run is the other machine's, and whose rows, files and history are here."""
THERE: Final = ("doctor", "explain", "tune")
"""Commands that run on the other machine as a whole."""
SSH_OPTIONS: Final = {"p": "PORT", "i": "FILE", "F": "FILE", "J": "HOST", "o": "OPTION"}
"""ssh's options that are handed on, each with what it takes."""
EXAMPLE: Final = """examples:
  fatui remote gpu-box                            the app: sliders here, kernels there
  fatui remote gpu-box bench quick --seconds 3    rows, files and history here
  fatui remote gpu-box doctor
  fatui remote --python '~/venv' me@10.0.0.7 llama-7b --run
  fatui remote -p 2222 gpu-box bench --seq 8192 --mask causal

HOST is what ssh takes: a name of its config, USER@HOST, or ssh://USER@HOST:PORT; also [ADDRESS]:PORT of IPv6.
ssh must log in without asking.
fatui of the same version has to be installed there, with MLX for its device.
Exit codes: those of the command; 1 if the machine cannot be reached or used, 2 wrong usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--python", metavar="PATH", help="the interpreter there, or the folder of its environment (that of its fatui)"
    )
    for letter, takes in SSH_OPTIONS.items():
        parser.add_argument(f"-{letter}", action="append", default=[], metavar=takes, help=f"ssh's -{letter}")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("host", nargs="?", metavar="HOST", help="the machine, as ssh takes it")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="...",
        help=f"a command ({', '.join((*MEASURING, *THERE))}) with its options, or those of the app",
    )


def run(arguments: argparse.Namespace) -> int:
    """Connect, and run the app or the command; return its exit code.

    Raises:
        UsageError: the request is wrong.
        RemoteError: the machine cannot be used.
    """
    if arguments.serve is not None:
        from fatui.remote_host import serve

        return serve(arguments.serve)
    from fatui.remote import parse_remote

    if arguments.host is None:
        raise UsageError("remote: the machine is missing; see `fatui remote --help`")
    options = [(f"-{letter}", value) for letter in SSH_OPTIONS for value in getattr(arguments, letter)]
    ssh = tuple(word for option in options for word in option)
    remote = parse_remote(arguments.host, arguments.python, ssh)
    words: list[str] = arguments.words
    name = words[0] if words else ""
    if name in THERE:
        return _run_there(remote, words)
    from fatui.cli.main import COMMANDS, app_request, command_request
    from fatui.cli.options import model_dtype

    if name in MEASURING:
        command, request = command_request(name, words[1:])
        if getattr(request, "hostfile", None):
            raise UsageError("--hostfile: not taken, since it is a file of this machine; `fatui remote` takes --hosts")
        request.remote = _greeted(remote)
        if name in ("model", "finetune"):
            request.dtype = model_dtype(request.dtype, request.remote.computes_on_cpu)
        return int(command.run(request))
    if name in COMMANDS:
        raise UsageError(f"remote: '{name}' runs on this machine; the other runs {', '.join((*MEASURING, *THERE))}")
    try:
        given = app_request(words)
    except UsageError as error:
        hint = "; options of ssh and --python come before HOST" if name.startswith("-") else ""
        near = suggestion(name, (*MEASURING, *THERE)) if name else ""
        raise UsageError(*(f"{problem}{hint}{near}" for problem in error.problems)) from error
    from fatui.tui.app import run_app

    return int(run_app(given.preset, given.run, given.ascii, _greeted(remote)))


def _greeted(remote: "Remote") -> "Remote":
    """Connect once, print what differs, and return the machine with what it said of itself.

    Raises:
        RemoteError: the machine cannot be used.
    """
    from msgspec import structs

    from fatui.remote import check, greeting_of

    greeting = asyncio.run(greeting_of(remote))
    notes = check(greeting, remote)
    for note in notes:
        cli.print_line(note)
    return structs.replace(remote, computes_on_cpu=greeting.computes_on_cpu, notes=tuple(notes))


def _run_there(remote: "Remote", words: Sequence[str]) -> int:
    """Run a command on the other machine, and print what it prints."""
    from fatui.remote import MARK

    _greeted(remote)
    command = remote.command("command", *words)
    process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    threading.Thread(target=_ping, args=(process.stdin,), daemon=True).start()
    try:
        while not process.stdout.readline().startswith(MARK) and process.poll() is None:
            pass
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        return process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _ping(stream: IO[bytes]) -> None:
    """Write an empty line every second: the other end ends without."""
    from fatui.remote import PING_S

    with contextlib.suppress(OSError, ValueError):
        while True:
            stream.write(b"\n")
            time.sleep(PING_S)
