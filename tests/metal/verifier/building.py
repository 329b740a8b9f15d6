"""Compiles a kernel's text, the stand-in for Metal's library and the runtime into one shared library."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import mlx.core as mx

from verifier.source import Parameter, parse, place_threadgroup_arrays

HERE: Final = Path(__file__).parent
MLX_HEADERS: Final = Path(mx.__file__).parent / "include"
OLDEST: Final = 12
COMPILER: Final = os.environ.get("CXX", "g++")
INCLUDES: Final = (f"-I{HERE / 'shim'}", f"-I{HERE / 'runtime'}", f"-I{MLX_HEADERS}")
FLAGS: Final = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wno-attributes"),
    *("-Wuninitialized", "-Werror=uninitialized", "-Wmaybe-uninitialized", "-Werror=maybe-uninitialized"),
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    *("--param", "tsan-instrument-func-entry-exit=0", "-ftrivial-auto-var-init=pattern"),
    *("-fno-tree-loop-distribute-patterns", "-fno-tree-vectorize"),
)
ENTRY: Final = 'extern "C" __attribute__((no_sanitize("thread"))) void msl_entry(void** B, const msl_attr* A)'


class CompileError(AssertionError):
    """The compiler's own errors, a line each."""


@cache
def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    version = subprocess.run([COMPILER, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < OLDEST:
        return f"{COMPILER} is {version}, {OLDEST} or later is needed"
    return None


@cache
def folder() -> Path:
    """Where compiled kernels lie for as long as the machine keeps its temporary files."""
    path = Path(tempfile.gettempdir()) / f"fatui-metal-verifier-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def call(command: Sequence[str]) -> str:
    """Runs a tool.

    Raises:
        CompileError: it failed; with its errors.
    """
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        errors = [f"compile: {line}" for line in run.stderr.splitlines() if "error:" in line]
        raise CompileError("\n".join(errors) or run.stderr[-3000:])
    return run.stdout


@cache
def _own_digest() -> str:
    parts = (path.read_bytes() for path in sorted((*HERE.glob("shim/**/*"), *HERE.glob("runtime/*"))) if path.is_file())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@cache
def runtime() -> Path:
    """The runtime, compiled once without any instrumentation."""
    made = folder() / f"runtime-{_own_digest()[:16]}.o"
    if not made.exists():
        _compiled(("-O2", "-std=c++17", "-fPIC", "-w"), HERE / "runtime" / "launch.cpp", made)
    return made


def _compiled(flags: Sequence[str], source: Path, made: Path) -> None:
    """Compiles beside the place and renames: other processes may do the same at once."""
    fresh = made.with_suffix(f".{os.getpid()}.o")
    call([COMPILER, *flags, *INCLUDES, "-c", str(source), "-o", str(fresh)])
    fresh.replace(made)


def build(text: str) -> tuple[Path, list[Parameter]]:
    """The library of a text as MLX generates it, and the kernel's parameters.

    Raises:
        CompileError: the text does not compile.
    """
    function, parameters, body = parse(text)
    arguments = ", ".join(_argument(parameter) for parameter in parameters)
    source = (
        '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n#line 1 "kernel"\n'
        f'{place_threadgroup_arrays(body)}\n#line 1 "entry"\n{ENTRY} {{ {function}({arguments}); }}\n'
    )
    return build_source(source), parameters


def build_source(source: str, flags: Sequence[str] = FLAGS) -> Path:
    """The library of a whole C++ text that defines `msl_entry`."""
    key = hashlib.sha256(f"{source}{flags}{_own_digest()}{mx.__version__}".encode()).hexdigest()[:24]
    library = folder() / f"kernel-{key}.so"
    if library.exists():
        return library
    text, made = folder() / f"kernel-{key}.{os.getpid()}.cpp", folder() / f"kernel-{key}.o"
    text.write_text(source)
    _compiled(flags, text, made)
    fresh = library.with_suffix(f".{os.getpid()}.so")
    call([COMPILER, "-shared", str(made), str(runtime()), "-o", str(fresh)])
    fresh.replace(library)
    return library


def _argument(parameter: Parameter) -> str:
    if parameter.attribute != "buffer":
        return f"A->{parameter.attribute}"
    if parameter.type.endswith("&"):
        return f"*({parameter.type[:-1]}*)B[{parameter.index}]"
    return f"({parameter.type})B[{parameter.index}]"


def kernel_line(library: Path, offset: str) -> int | None:
    """The line of the kernel's text at an offset of its library."""
    frames = call(["addr2line", "-i", "-e", str(library), f"0x{offset}"]).split()
    found = next((match for frame in frames if (match := re.search(r"kernel:(\d+)", frame))), None)
    return int(found[1]) if found else None
