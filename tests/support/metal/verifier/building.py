"""Compilation of a kernel's source and the emulated Metal library into a library that runs on the emulated GPU."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import mlx.core as mx

from tests.support.metal.verifier.source import Parameter, parse, place_threadgroup_arrays

HERE: Final = Path(__file__).parent
MLX_HEADERS: Final = Path(mx.__file__).parent / "include"
MIN_VERSION: Final = 12
COMPILER: Final = os.environ.get("CXX", "g++")
INCLUDES: Final = (f"-I{HERE / 'shim'}", f"-I{HERE / 'runtime'}", f"-I{MLX_HEADERS}")
COMMON: Final = ("-std=c++17", "-fPIC", "-shared", "-march=native", "-ffp-contract=off")
FLAGS: Final = (
    *(*COMMON, "-O1", "-g1", "-Wno-attributes"),
    *("-Wuninitialized", "-Werror=uninitialized", "-Wmaybe-uninitialized", "-Werror=maybe-uninitialized"),
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    *("--param", "tsan-instrument-func-entry-exit=0", "-ftrivial-auto-var-init=pattern"),
    *("-fno-tree-loop-distribute-patterns", "-fno-tree-vectorize"),  # an access in the text stays an access
    "-nodefaultlibs",  # the sanitizers' calls go to the runtime, and none of their own libraries is linked
)
"""Flags for a kernel."""
LIBRARIES: Final = ("-lm", "-lc", "-lgcc")
ENTRY: Final = 'extern "C" __attribute__((no_sanitize("thread"))) void entry(void** B, const gpu::Attributes* A)'
HEADERS: Final = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n'
"""The includes of MLX's own preamble, which precede every kernel's source."""
KEPT_S: Final = 2 * 24 * 3600
"""Seconds that libraries of another state of these files are kept."""


class CompileError(AssertionError):
    """Return the compiler's own errors, one per line."""


@cache
def missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    if sys.platform != "linux":
        return f"it runs on Linux, and this is {sys.platform}"
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    version = subprocess.run([COMPILER, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < MIN_VERSION:
        return f"{COMPILER} is {version}, {MIN_VERSION} or later is needed"
    return None


@cache
def folder() -> Path:
    """Return the folder of libraries in the temporary folder, one per state of these files, MLX and the machine."""
    root = Path(tempfile.gettempdir()) / f"fatui-metal-verifier-{os.getuid()}"
    made = root / _state()
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    made.touch()
    for other in root.iterdir():
        with suppress(FileNotFoundError):  # another process may be quicker
            if time.time() - other.stat().st_mtime > KEPT_S:
                shutil.rmtree(other, ignore_errors=True)
    return made


def _state() -> str:
    files = sorted(path for kind in ("shim", "runtime") for path in (HERE / kind).rglob("*") if path.is_file())
    parts = [path.read_bytes() for path in files]
    parts.append(f"{FLAGS}{mx.__version__}{shutil.which(COMPILER)}".encode())
    processor = Path("/proc/cpuinfo")  # -march=native
    if processor.exists():
        parts += [
            line.encode() for line in processor.read_text().splitlines() if line.startswith(("flags", "Features"))
        ]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def call(command: Sequence[str]) -> str:
    """Run a tool.

    Raises:
        CompileError: the tool failed; with its errors.
    """
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        errors = [f"compile: {line}" for line in run.stderr.splitlines() if "error:" in line]
        raise CompileError("\n".join(errors) or run.stderr[-3000:])
    return run.stdout


def _compiled(command: Sequence[str], made: Path) -> Path:
    """Compile unless already done, to a temporary file that is renamed, as other processes may do the same."""
    if not made.exists():
        fresh = made.with_name(f"{os.getpid()}-{made.name}")
        call([COMPILER, *command, *INCLUDES, "-o", str(fresh)])
        fresh.replace(made)
    return made


@cache
def runtime() -> Path:
    """Return the emulated GPU, compiled once, without instrumentation, to link all kernels with."""
    flags = (*COMMON, "-O2", "-Wall", "-Wextra", "-Werror")
    return _compiled([*flags, str(HERE / "runtime" / "launch.cpp")], folder() / "runtime.so")


@cache
def headers(flags: Sequence[str]) -> Path:
    """Return the precompiled headers for a set of flags."""
    header = folder() / f"headers-{hashlib.sha256(str(flags).encode()).hexdigest()[:8]}.h"
    fresh = header.with_name(f"{os.getpid()}-{header.name}")  # no process shall compile what another has half written
    fresh.write_text(HEADERS)
    fresh.replace(header)
    plain = [flag for flag in flags if flag not in ("-shared", "-nodefaultlibs")]
    _compiled([*plain, "-x", "c++-header", str(header)], header.with_suffix(".h.gch"))
    return header


def build(text: str) -> tuple[Path, list[Parameter]]:
    """Return the library of a source as generated by MLX, and the kernel's parameters.

    Raises:
        CompileError: the source does not compile.
    """
    function, parameters, body = parse(text)
    arguments = ", ".join(_argument(parameter) for parameter in parameters)
    return build_source(place_threadgroup_arrays(body), f"{function}({arguments});"), parameters


def build_source(text: str, entered: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """Return the library of a C++ source.

    Args:
        text: the source after the headers.
        entered: statements that call the kernel, with its buffers `void** B` and attributes `const gpu::Attributes* A`.
        flags: flags of the compiler.

    Raises:
        CompileError: the source does not compile.
    """
    source = f'#line 1 "kernel"\n{text}\n#line 1 "entry"\n{ENTRY} {{ {entered} }}\n'
    key = hashlib.sha256(f"{source}{flags}".encode()).hexdigest()[:24]
    library = folder() / f"kernel-{key}.so"
    if library.exists():
        return library
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as file:
        file.write(source)
        file.flush()
        return _compiled([*flags, "-include", str(headers(flags)), file.name, str(runtime()), *LIBRARIES], library)


def _argument(parameter: Parameter) -> str:
    if parameter.attribute != "buffer":
        return f"A->{parameter.attribute}"
    if parameter.type.endswith("&"):
        return f"*({parameter.type[:-1]}*)B[{parameter.index}]"
    return f"({parameter.type})B[{parameter.index}]"


def kernel_line(library: Path, offset: str) -> int | None:
    """Return the line of the kernel's source at an offset of its library."""
    frames = call(["addr2line", "-i", "-e", str(library), f"0x{offset}"]).split()
    found = next((match for frame in frames if (match := re.search(r"kernel:(\d+)", frame))), None)
    return int(found[1]) if found else None
