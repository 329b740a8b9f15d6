"""Compilation of the kernel for this machine: each source once, in parallel, then one link."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache
from attention.measure.device import first_processor, processor_name

_MODEL = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part", "CPU revision")
"""Fields of /proc/cpuinfo: the first four on x86, the others on ARM."""


@dataclass(frozen=True)
class Toolchain:
    """Paths of everything that a compilation reads."""

    compiler: tuple[str, ...]
    python_include: Path
    nanobind: Path
    backend: Path | None
    """nanobind's compiled part, if it is installed and fits MLX's; otherwise it is compiled."""
    mlx: Path

    @property
    def mlx_module(self) -> Path:
        """MLX's compiled Python module, mlx.core."""
        return next(self.mlx.glob("core.*.so"))


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None if there is none."""
    spec = importlib.util.find_spec(name)
    places = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    # MLX has no __init__.py: its places are all folders called mlx on the path, one beside a script too.
    return next((place for place in places if any(place.glob("*.so"))), places[0] if places else None)


def compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler, $CXX if set.

    Raises:
        KernelUnavailable: there is none.
    """
    wished = os.environ.get("CXX")
    for command in [wished] if wished else ["c++", "g++", "clang++"]:
        words = _split(command, "CXX")
        found = shutil.which(words[0]) if words else None
        if found:
            return (found, *words[1:])
    raise KernelUnavailable(f"no C++ compiler found ({wished or 'c++, g++ or clang++'})")


def find() -> Toolchain:
    """Find compiler, headers and packages.

    Raises:
        KernelUnavailable: names the first missing one.
    """
    if sys.platform not in ("linux", "darwin"):
        raise KernelUnavailable(f"the kernel is built on Linux and macOS only, not on {sys.platform}")
    mlx = package_folder("mlx")
    if mlx is None or next(mlx.glob("core.*.so"), None) is None:
        raise KernelUnavailable("MLX is not installed")
    if not (mlx / "include" / "mlx" / "primitives.h").exists():
        raise KernelUnavailable("this MLX ships no C++ headers")
    nanobind = package_folder("nanobind")
    if nanobind is None:
        raise KernelUnavailable("nanobind is not installed (pip install nanobind)")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise KernelUnavailable(f"no Python.h in {include} (install the Python development headers)")
    return Toolchain(compiler(), include, nanobind, _backend(nanobind, mlx), mlx)


@functools.lru_cache(maxsize=8)
def _can_call(header: Path, backend: Path) -> bool:
    """Return whether an installed backend serves a header of nanobind: it has at least that version of the ABI."""
    wanted = [int(n) for n in re.findall(r"define NB_BACKEND_ABI_(?:MAJOR|MINOR) (\d+)", header.read_text())]
    places = [path.name for path in backend.parent.glob("nanobind_backend-*.dist-info")]
    found = re.match(r"nanobind_backend-(\d+)\.(\d+)", places[0]) if len(places) == 1 else None
    installed = [int(n) for n in found.groups()] if found else []
    return len(wanted) == len(installed) and wanted[0] == installed[0] and wanted <= installed


def _backend(nanobind: Path, mlx: Path) -> Path | None:
    """Return nanobind's compiled backend if these headers can call it and it shares types with MLX: by its ABI tag."""
    folder = package_folder("nanobind_backend")
    if folder is None or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    if not _can_call(nanobind / "include" / "nanobind" / "nb_backend.h", folder):
        return None
    theirs = _abi_tag(next(mlx.glob("core.*.so")))
    return next((path for path in sorted(folder.glob("*.so")) if _abi_tag(path) == theirs != _UNKNOWN), None)


_UNKNOWN = "unknown"


def _abi_tag(module: Path) -> str:
    """Return nanobind's ABI tag of a compiled module: platform, C++ library and the version of its internals."""
    return _read_tag(str(module), module.stat().st_size, module.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_tag(module: str, size: int, time: int) -> str:
    found = re.search(rb"nanobind_[a-z0-9_]+_v[0-9]+[a-z0-9_]*", Path(module).read_bytes())
    return found[0].decode() if found else _UNKNOWN


def check_abi(tools: Toolchain, module: Path | None = None) -> None:
    """Compare nanobind's ABI with that of MLX's build: types are shared only if they agree.

    Args:
        tools: paths of nanobind and MLX.
        module: a compiled module, whose whole tag must equal MLX's; without it only the versions are compared.

    Raises:
        KernelUnavailable: they differ; the message has both.
    """
    theirs = _abi_tag(tools.mlx_module)
    if module is not None and tools.backend is not None:
        return  # the backend's tag is MLX's; importing the module compares the platform with the backend's
    if module is not None:
        ours, same = _abi_tag(module), _abi_tag(module) == theirs
    else:
        header = (tools.nanobind / "src" / "nb_internals.h").read_text()
        number = re.search(r"define NB_INTERNALS_VERSION (\d+)", header)
        ours = f"v{number[1]}" if number else "unknown"
        same = bool(re.search(rf"_{ours}(?![0-9])", theirs))
    if not same:
        raise KernelUnavailable(f"nanobind's ABI is {ours}, MLX was built with {theirs}")


def cpu_features() -> frozenset[str]:
    """Return the processor's instruction sets by Linux's names; on ARM just `neon`."""
    if platform.machine() in ("arm64", "aarch64"):
        return frozenset({"neon"})
    return frozenset(first_processor().get("flags", "").split())


@functools.cache
def cpu_name() -> str:
    """Return the processor's model, down to the stepping."""
    fields = first_processor()
    return " ".join(fields[name] for name in _MODEL if name in fields) or processor_name()


def cpu_fingerprint() -> str:
    """Return what machine code depends on: the model, and the instruction sets (a virtual machine may hide some)."""
    fields = first_processor()
    return f"{cpu_name()} {fields.get('flags') or fields.get('Features', '')}"


SOURCES = Path(__file__).parent
MODULE = "fatui_cpu_kernel"
SHARED = ("shared",)
"""Sources of the kernel that every library has."""
PARTS = {
    "float32": ("forward_float32",),
    "float16": ("forward_float16",),
    "bfloat16": ("forward_bfloat16", "forward_widened"),
    "few": ("few",),
    "gradients": ("backward_bfloat16", "backward"),
    "quantized": ("quantized", "integer_products", "append"),
    "streams": ("streaming",),
    "lists": ("mask_lists",),
}
"""Sources of what a library is linked without until a call needs it (`require_forward` in module.cpp)."""
ALL = frozenset(PARTS)
SEPARABLE = sys.platform != "darwin"
"""Whether a library can be linked without a part: its functions are weak symbols of ELF."""
KERNEL = (*SHARED, *(name for names in PARTS.values() for name in names))
BINDING = ("module",)
"""Sources of the Python module that every library has."""
BINDINGS = {"quantized": ("caches",), "streams": ("caches",)}
"""Those of what only some parts need."""
ROOM_BYTES = 16 << 20
"""Maximum bytes written by a compilation: assembly of two sources at a time, objects and the library."""
VARIANTS = ("amx", "avx512_bf16", "avx512", "avx2", "neon", "plain")
"""Instruction sets that the sources have text of their own for, as named in variant.cpp."""
PREPROCESSOR_LIMIT_S = 10.0
_WHOLE = "-DFATUI_WHOLE_HEADERS"
"""With it sources include the compiler's and MLX's headers as these are (`short_headers`, intrinsics.hpp)."""
_HASH_LENGTH = 24
"""Hexadecimal digits of an object's hash."""

_KERNEL_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized", "-Wno-psabi")
_BINDING_FLAGS = ("-O1", "-DNB_DOMAIN=mlx")
_BACKEND_FLAGS = ("-DNB_BACKEND_MODULE=nanobind_backend", "-DPy_LIMITED_API=0x030A0000")
_SHARED_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden")


def extra_flags() -> tuple[str, ...]:
    """Return `$FATUI_KERNEL_CXXFLAGS`, added to every compilation and the link (used by the sanitizer build)."""
    return tuple(_split(os.environ.get("FATUI_KERNEL_CXXFLAGS", ""), "FATUI_KERNEL_CXXFLAGS"))


def _split(text: str, variable: str) -> list[str]:
    """Split the value of a variable as a shell does.

    Raises:
        KernelUnavailable: a quotation is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise KernelUnavailable(f"${variable} is no list of words: {error}") from error


def kernel_flags() -> tuple[str, ...]:
    """Return the compiler flags of the kernel's sources, independent of the processor."""
    return _KERNEL_FLAGS


def _machine_flags() -> tuple[str, ...]:
    features = cpu_features()
    if "neon" in features:
        return ("-mcpu=native",)
    return ("-march=native", "-mprefer-vector-width=512") if "avx512f" in features else ("-march=native",)


def _kernel_command(tools: Toolchain) -> tuple[str, ...]:
    return (*tools.compiler, *_SHARED_FLAGS, *_KERNEL_FLAGS, *_machine_flags(), *extra_flags())


def compiled_for(tools: Toolchain) -> str:
    """Return the instruction set that a library made now is compiled for, one of `VARIANTS`.

    Raises:
        KernelUnavailable: the compiler does not run, or refuses its flags.
    """
    name, problem = _compiled_for(_kernel_command(tools), _common_dependencies(tools))
    if problem:
        raise KernelUnavailable(problem)
    return name


def granted(name: str) -> str:
    """Return the instruction set that runs of those that a library is compiled for: $FATUI_AMX=0 refuses AMX."""
    refused = name == "amx" and os.environ.get("FATUI_AMX", "").startswith("0")
    return "avx512_bf16" if refused else name


@functools.lru_cache(maxsize=8)
def _compiled_for(command: tuple[str, ...], _dependencies: bytes) -> tuple[str, str]:
    """Return the name that the compiler's macros select, and what is wrong; starting the compiler takes some ms.

    Raises:
        KernelUnavailable: the compiler did not answer, which is not remembered.
    """
    words = (*command, "-DFATUI_NAME_ONLY", "-E", "-P", str(SOURCES / "variant.cpp"))
    try:
        text = subprocess.run(words, check=True, capture_output=True, text=True, timeout=PREPROCESSOR_LIMIT_S).stdout
    except subprocess.CalledProcessError as error:
        return "", f"compiling failed: {_first_error(error)}"
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(f"the compiler could not be started: {error}") from error
    found = re.search(r'"(\w+)"', text)
    if found is None or found[1] not in VARIANTS:
        return "", f"{command[0]} is no C++ compiler"
    return found[1], ""


def include_flags(tools: Toolchain) -> list[str]:
    """Return the compiler flags for the headers of nanobind, MLX and Python."""
    folders = (
        tools.nanobind / "include",
        tools.nanobind / "ext" / "robin_map" / "include",
        tools.mlx / "include",
        tools.python_include,
    )
    return [word for folder in folders for word in ("-isystem", str(folder))]


def _binding_command(tools: Toolchain) -> tuple[str, ...]:
    backend = _BACKEND_FLAGS if tools.backend else ()
    return (*tools.compiler, *_SHARED_FLAGS, *_BINDING_FLAGS, *backend, *include_flags(tools), *extra_flags())


def _link_command(tools: Toolchain) -> tuple[str, ...]:
    library = tools.mlx / "lib"
    loose = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    return (*tools.compiler, "-shared", *loose, *extra_flags(), f"-L{library}", f"-Wl,-rpath,{library}")


def _texts() -> list[Path]:
    return sorted([*SOURCES.glob("*.hpp"), *SOURCES.glob("*.cpp")])


def file_state(path: Path) -> str:
    """Return a file's path, size and time, which change with the file."""
    state = path.stat()
    return f"{path}:{state.st_size}:{state.st_mtime_ns}"


def _common_dependencies(tools: Toolchain) -> bytes:
    """Return what all objects depend on besides source and command: compiler, MLX, nanobind, Python, processor."""
    files = [Path(tools.compiler[0]).resolve(), tools.mlx_module, tools.nanobind / "src" / "nb_internals.h"]
    files += [tools.backend] if tools.backend else []
    marks = [*map(file_state, files), str(sys.implementation.cache_tag), cpu_fingerprint()]
    return "\0".join(marks).encode()


def key(tools: Toolchain) -> str:
    """Return the key of the whole library: a digest of source, compiler, flags, MLX, nanobind, Python and processor."""
    sha = hashlib.sha256()
    for path in _texts():
        sha.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for command in (_kernel_command(tools), _binding_command(tools), _link_command(tools)):
        sha.update("\0".join(command).encode())
    sha.update(_common_dependencies(tools))
    return sha.hexdigest()[:32]


def key_with(key: str, parts: frozenset[str]) -> str:
    """Return the key of the library with some parts, made of the whole library's."""
    return key if parts == ALL else hashlib.sha256(" ".join((key, *sorted(parts))).encode()).hexdigest()[:32]


def run(command: tuple[str, ...]) -> None:
    """Run a compiler.

    Raises:
        KernelUnavailable: the compilation failed; the message is its first error.
    """
    environment = {**os.environ, "TMPDIR": str(cache.folder())}
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise KernelUnavailable(f"the compiler could not be started: {error}") from error
    except subprocess.CalledProcessError as error:
        raise KernelUnavailable(f"compiling failed: {_first_error(error)}") from error


def _first_error(error: subprocess.CalledProcessError) -> str:
    """Return the first line of a compiler's output that names an error."""
    lines = [line for line in (error.stderr or "").splitlines() if "error" in line.lower()]
    return lines[0].strip() if lines else f"exit status {error.returncode}"


def _included(text: Path) -> list[Path]:
    """Return the sources that a source includes besides headers."""
    return [SOURCES / name for name in re.findall(r'^#include "(\w+\.cpp)"', text.read_text(), re.MULTILINE)]


def _object_name(command: tuple[str, ...], text: Path, tools: Toolchain) -> str:
    """Return an object's cache name, made of its dependencies: a changed kernel does not recompile the binding."""
    own = text.parent == SOURCES
    sha = hashlib.sha256("\0".join((*command, text.name if own else str(text))).encode())  # the same in any checkout
    sha.update(_common_dependencies(tools))
    for path in [*sorted(SOURCES.glob("*.hpp")), *_included(text), text] if own else [text]:
        sha.update(path.read_bytes())
    return f"{text.stem}-{sha.hexdigest()[:24]}"


def _cached_object(name: str) -> Path | None:
    """Return the cached object of that name if it is intact: the end of the file name is the hash of its contents."""
    for path in cache.folder().glob(f"{name}-*.o"):
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{cache.digest(path)[:_HASH_LENGTH]}":
                return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


_READERS = "#pragma once\n#include <memory>\nnamespace mlx::core::io { class Reader; class Writer; }\n"
_GPU = "#pragma once\n#include <condition_variable>\n#include <memory>\n#include <mutex>\n"


def short_headers(mlx_headers: Path) -> dict[str, str]:
    """Return shorter texts of headers of MLX by their paths, in which the binding finds all that it uses.

    Of primitives.h that is the base class, as MLX has it, without the operations. Files and the GPU are not used.
    """
    text = (mlx_headers / "mlx" / "primitives.h").read_text()
    first = re.search(r"^class (?:\w+ )?UnaryPrimitive\b", text, re.MULTILINE)
    shorter = {"mlx/primitives.h": text[: first.start()] + "}\n"} if first else {}
    return {"mlx/io/load.h": _READERS, "mlx/backend/gpu/eval.h": _GPU, **shorter}


def _run_shortened(command: tuple[str, ...], of_module: bool, tools: Toolchain, folder: Path) -> None:
    """Run a compiler on shorter headers, which takes half the time; with whole ones if it refuses them."""
    shorter = short_headers(tools.mlx / "include") if of_module else {}
    for name, text in shorter.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    try:
        run((*command, *(("-I", str(folder)) if shorter else ())))
    except KernelUnavailable:  # another version of the compiler or of MLX, or a mistake that the message will name
        run((*command, _WHOLE))


def _compile(command: tuple[str, ...], text: Path, tools: Toolchain) -> Path:
    name = _object_name(command, text, tools)
    finished = _cached_object(name)
    if finished is None:
        with tempfile.TemporaryDirectory(dir=cache.folder(), prefix=".building-") as folder:
            fresh = Path(folder) / "out.o"
            of_module = text.parent == SOURCES and any(text.stem in names for names in (BINDING, *BINDINGS.values()))
            _run_shortened((*command, "-c", str(text), "-o", str(fresh)), of_module, tools, Path(folder))
            fresh.chmod(0o600)
            finished = fresh.replace(cache.folder() / f"{name}-{cache.digest(fresh)[:_HASH_LENGTH]}.o")
    cache.mark_used(finished)
    return finished


def _jobs(tools: Toolchain, parts: frozenset[str] = ALL) -> list[tuple[tuple[str, ...], Path]]:
    binding, kernel = _binding_command(tools), _kernel_command(tools)
    of_parts = sorted({name for part, some in BINDINGS.items() if part in parts for name in some})
    jobs = [(binding, SOURCES / f"{name}.cpp") for name in (*BINDING, *of_parts)]
    if tools.backend is None:
        jobs.append(((*binding, "-w"), tools.nanobind / "src" / "nb_combined.cpp"))
    names = [name for part, some in PARTS.items() if part in parts for name in some]
    return jobs + [(kernel, SOURCES / f"{name}.cpp") for name in (*SHARED, *names)]


def compile_library(tools: Toolchain, key: str, parts: frozenset[str] = ALL) -> Path:
    """Compile and link into the cache folder; return the path of the library of that key.

    Raises:
        KernelUnavailable: the compilation failed; the message is the compiler's first error.
        OSError: there is not enough disk space, checked before anything is compiled.
    """
    check_abi(tools)
    cache.require_room(ROOM_BYTES)
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as threads:
        objects = list(threads.map(lambda job: _compile(job[0], job[1], tools), _jobs(tools, parts)))
    return link((*_link_command(tools), *map(str, objects), "-lmlx"), key, functools.partial(check_abi, tools))


def link(command: tuple[str, ...], key: str, check: Callable[[Path], None] | None = None) -> Path:
    """Link into the cache folder; return the path of the library of that key.

    Args:
        command: the linker's, without the name of its output.
        key: of the library.
        check: called with the library before it is placed there; raises if it cannot be used.

    Raises:
        KernelUnavailable: linking failed; the message is its first error.
    """
    with tempfile.TemporaryDirectory(dir=cache.folder(), prefix=".linking-") as folder:
        fresh = Path(folder) / "out.so"
        run((*command, "-o", str(fresh)))
        if check is not None:
            check(fresh)
        fresh.chmod(0o600)
        return fresh.replace(cache.library_path(key))
