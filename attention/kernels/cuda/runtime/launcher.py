"""The extension module of launcher.cpp: compiled on first use by the C++ compiler, stored in the cache folder."""

import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache
from attention.kernels.cpu import build
from attention.kernels.cpu.build import Toolchain

if TYPE_CHECKING:
    import mlx.core as mx

MODULE = "fatui_cuda_launcher"
SOURCES = Path(__file__).parent
TEXTS = (
    "launcher.hpp",
    "launcher_maps.hpp",
    "launcher_scratch.hpp",
    "launcher_plan.hpp",
    "launcher_run.hpp",
    "launcher_steps.hpp",
    "launcher_known.hpp",
    "launcher_layout.hpp",
    "launcher_waiting.hpp",
    "launcher_memory.hpp",
    "launcher_peers.hpp",
    "launcher.cpp",
)


_loading = threading.Lock()


@functools.cache
def unavailable_reason() -> str | None:
    """Return why the launcher is unavailable, in one line, or None; compiles on first use.

    Without the launcher, kernels are launched one by one through MLX's own operation.
    """
    try:
        module()
    except KernelUnavailable as unavailable:
        return str(unavailable)
    return None


def known_obstacle() -> str | None:
    """Return why the launcher is known to be unavailable, in one line, or None; compiles nothing."""
    if _module.cache_info().currsize:
        return None  # finding the tools takes a millisecond, and decoding calls this at each length
    try:
        tools = build.find()
    except KernelUnavailable as unavailable:
        return str(unavailable)
    return cache.failure(_key(tools))


def is_settled() -> bool:
    """Return whether the launcher is compiled, or known to be unavailable."""
    return known_obstacle() is not None or cache.library_path(_key(build.find())).exists()


@functools.cache
def module() -> ModuleType:
    """Return the extension module; compiles it on first use.

    Raises:
        KernelUnavailable: it cannot be compiled or loaded here; `unavailable_reason` returns the reason instead.
    """
    with _loading:  # a second import by another thread would register its types again, and make objects of neither
        return _module()


@functools.cache
def _module() -> ModuleType:
    import mlx.core  # noqa: F401  the module shares its types

    tools = build.find()
    cache.ensure_folder()
    key = _key(tools)
    try:
        with cache.lock(key):
            return _loaded(tools, key)
    except OSError as error:  # the disk of the cache folder is full
        raise KernelUnavailable(f"making the launcher failed: {error}") from error


def _loaded(tools: Toolchain, key: str) -> ModuleType:
    path = _trusted(key) or _compile(tools, key)
    try:
        return _import(path)
    except ImportError as error:
        reason = f"the compiled launcher does not load: {error}"
        cache.write_failure(key, reason)
        raise KernelUnavailable(reason) from error


def laid_out(*arrays: "mx.array") -> "Sequence[mx.array]":
    """Return the arrays, copied if MLX's SDPA on CUDA would fail on their layout.

    Strided columns and reversed axes raise an error in cuDNN; keys that are broadcast over their length crash the
    process in decoding, by a division by zero. Strides are known only once an array is computed, so the launcher checks
    them. Without the launcher, every array that is not contiguous is copied.
    """
    return _laid_out(arrays, given=True)


def of_sdpa(output: "mx.array") -> "mx.array":
    """Return the output of MLX's SDPA; its cotangent is copied like the arrays of `laid_out`."""
    return _laid_out([output], given=False)[0]


def _laid_out(arrays: "Sequence[mx.array]", given: bool) -> "Sequence[mx.array]":
    import mlx.core as mx

    if unavailable_reason() is None:
        made: Sequence[mx.array] = module().laid_out(arrays, given)
        return made
    return [mx.contiguous(x) for x in arrays] if given else arrays


def is_plan(made: object) -> bool:
    """Return whether an object is a plan of the module, which can be added to its table of repeated calls."""
    return type(made).__module__ == MODULE


def _import(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no Python module")
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


def _commands(tools: Toolchain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the commands that compile a source file and link the library, without file names."""
    flags = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-O1", "-DNB_DOMAIN=mlx", "-w")
    library = tools.mlx / "lib"
    link = (*tools.compiler, "-shared", f"-L{library}", f"-Wl,-rpath,{library}")
    return (*tools.compiler, *flags, *build.include_flags(tools)), link


@functools.cache
def _key(tools: Toolchain) -> str:
    """Return the library's cache key: a hash of sources, commands, compiler, MLX and Python."""
    sha = hashlib.sha256()
    for name in TEXTS:
        sha.update((SOURCES / name).read_bytes())
    marks = (Path(tools.compiler[0]).resolve(), tools.mlx_module, tools.nanobind / "src" / "nb_internals.h")
    sha.update(repr((_commands(tools), [build.file_state(path) for path in marks])).encode())
    sha.update(str(sys.implementation.cache_tag).encode())
    return f"cuda-launcher-{sha.hexdigest()[:24]}"


def _trusted(key: str) -> Path | None:
    """Return the cached library if it is unchanged, or None; raises KernelUnavailable after a recorded failure."""
    failure = cache.failure(key)
    if failure is not None:
        raise KernelUnavailable(failure)
    return cache.library(key)


def _compile(tools: Toolchain, key: str) -> Path:
    finished = cache.library_path(key)
    try:
        build.check_abi(tools)
        with tempfile.TemporaryDirectory(dir=cache.folder(), prefix=".building-") as room:
            _build(tools, Path(room))
            build.check_abi(tools, Path(room) / "out.so")
            (Path(room) / "out.so").chmod(0o600)
            (Path(room) / "out.so").replace(finished)
    except KernelUnavailable as unavailable:
        cache.write_failure(key, str(unavailable))
        raise
    cache.write_record(key, {"sha256": cache.digest(finished)})
    return finished


def _build(tools: Toolchain, room: Path) -> None:
    compiling, link = _commands(tools)
    texts: Sequence[Path] = (SOURCES / "launcher.cpp", tools.nanobind / "src" / "nb_combined.cpp")
    objects = [room / f"{text.stem}.o" for text in texts]
    for text, made in zip(texts, objects, strict=True):
        build.run((*compiling, "-c", str(text), "-o", str(made)))
    build.run((*link, *map(str, objects), "-lmlx", "-o", str(room / "out.so")))
