"""`python -m attention.patch SCRIPT ...`: run an unmodified program with attention in mlx-lm's models replaced.

The program keeps its arguments, exit code and tracebacks. In your own program, call `attention.patch_mlx_lm`.
"""

import atexit
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Final

from msgspec import Struct

import attention
from attention.core.errors import NoBackendError, UsageError

USAGE: Final = """usage: python -m attention.patch [--implementation NAME] SCRIPT ARGS...
       python -m attention.patch [--implementation NAME] -m MODULE ARGS...

Runs a program with attention in mlx-lm's models replaced, by `practical` unless another is named. At its end stderr
lists which calls were replaced, and which were not and why.

  python -m attention.patch -m mlx_lm.generate --model PATH --prompt Hello
  python -m attention.patch --implementation poc train.py --layers 4

Exit codes are the program's; 2 for wrong usage, 3 where MLX has no backend."""
WRONG_USAGE: Final = 2
NO_BACKEND: Final = 3


class ProgramCommand(Struct, frozen=True):
    """The program to run."""

    implementation: str
    name: str
    """A file, or a module's name."""
    is_module: bool
    arguments: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Run the program in this process; returns only if it ends normally or could not be started."""
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        program = read(argv)
        patch = attention.patch_mlx_lm(program.implementation).__enter__()
    except (UsageError, NoBackendError) as error:
        print(*(f"attention.patch: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return NO_BACKEND if isinstance(error, NoBackendError) else WRONG_USAGE
    # Open until the interpreter exits, so that the program's threads and exit handlers are patched too.
    atexit.register(lambda: print(patch.summary(), file=sys.stderr, flush=True))
    try:
        _run(program)
    except BaseException:
        _show_own_frames_only()
        raise
    return 0


def read(argv: Sequence[str]) -> ProgramCommand:
    """Parse the command line up to the program's name; the rest belongs to the program.

    Raises:
        UsageError: no program is named, it does not exist, or an option is unknown.
    """
    words = [*argv]
    implementation = "practical"
    while words and words[0].startswith("--implementation"):
        option, equals, value = words.pop(0).partition("=")
        if option != "--implementation" or not (equals or words):
            raise UsageError(f"{option}: it takes --implementation NAME")
        implementation = value if equals else words.pop(0)
    is_module = words[:1] == ["-m"]
    name, *arguments = words[is_module:] or [""]
    if not name or name.startswith("-"):
        raise UsageError(f"got {name or 'no program'}; it takes SCRIPT ARGS... or -m MODULE ARGS...; see --help")
    if is_module and not _exists(name):
        raise UsageError(f"-m: there is no module {name}")
    if not is_module and not Path(name).exists():
        raise UsageError(f"there is no file {name}")
    return ProgramCommand(implementation, name, is_module, tuple(arguments))


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _run(program: ProgramCommand) -> None:
    sys.argv[:] = [program.name, *program.arguments]
    if program.is_module:
        runpy.run_module(program.name, run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(program.name).resolve().parent)
    runpy.run_path(program.name, run_name="__main__")


def _show_own_frames_only() -> None:
    """Make sys.excepthook omit the frames before the program's."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and _is_ours(trace):
            trace = trace.tb_next
        shown(kind, error.with_traceback(trace), trace)

    sys.excepthook = show


def _is_ours(trace: TracebackType) -> bool:
    names = trace.tb_frame.f_globals
    return names is globals() or names is vars(runpy)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
