"""The compiled kernel in this process: found or compiled, checked, loaded, tried once."""

import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from attention.errors import KernelUnavailable
from attention.kernels import cache
from attention.kernels.cpu import build, toolchain

_loaded: ModuleType | None = None
_loading = threading.Lock()


def availability() -> tuple[bool, str]:
    """Whether the kernel can be used here, and in one line why (not); compiles nothing, imports nothing heavy."""
    if _loaded is not None:
        return True, f"loaded ({toolchain.variant()})"
    try:
        tools = toolchain.find()
        cache.ready_folder()
        record = cache.read_record(build.key(tools))
    except KernelUnavailable as unavailable:
        return False, str(unavailable)
    failure = cache.failure(record)
    if failure is not None:
        return False, failure
    state = "compiled" if _lies_ready(record) else "compiles at first use"
    return True, f"{state} ({toolchain.variant()})"


def is_compiled() -> bool:
    """Whether a library for this machine, and this MLX, lies ready in the cache folder."""
    if _loaded is not None:
        return True
    try:
        record = cache.read_record(build.key(toolchain.find()))
    except KernelUnavailable:
        return False
    return _lies_ready(record)


def _lies_ready(record: dict[str, Any]) -> bool:
    return "library" in record and (cache.folder() / str(record["library"])).exists()


def _import(path: Path) -> ModuleType:
    import mlx.core  # noqa: F401  the module shares its types

    loader = importlib.machinery.ExtensionFileLoader(build.MODULE, str(path))
    spec = importlib.util.spec_from_file_location(build.MODULE, path, loader=loader)
    if spec is None:
        raise KernelUnavailable(f"{path} is no Python module")
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise KernelUnavailable(f"the compiled kernel does not load: {error}") from error
    return module


def _trusted(record: dict[str, Any]) -> Path | None:
    """The recorded library, if it is still the one that was recorded."""
    if "library" not in record:
        return None
    path = cache.folder() / str(record["library"])
    cache.mark_used(path)
    try:
        return path if cache.digest(path) == record.get("sha256") else None
    except OSError:
        return None


def _compile_and_try(tools: toolchain.Toolchain, key: str) -> ModuleType:
    from attention.kernels.cpu import selfcheck

    try:
        path = build.compile_library(tools, key)
        module = _import(path)
        selfcheck.run(module)
    except KernelUnavailable as unavailable:
        cache.write_failure(key, str(unavailable))
        raise
    cache.write_record(key, {"library": path.name, "sha256": cache.digest(path)})
    return module


def _load(on_message: Callable[[str], None] | None) -> ModuleType:
    tools = toolchain.find()
    cache.ready_folder()
    key = build.key(tools)
    path = _trusted(cache.read_record(key))
    if path is not None:
        return _import(path)
    if on_message is not None:
        on_message("Compiling the CPU attention kernel for this machine (once, under half a minute) ...")
    with cache.lock(key):
        record = cache.read_record(key)
        failure = cache.failure(record)
        if failure is not None:
            raise KernelUnavailable(failure)
        path = _trusted(record)
        return _import(path) if path is not None else _compile_and_try(tools, key)


def load(on_message: Callable[[str], None] | None = None) -> ModuleType:
    """The kernel's module, compiled if this machine has none yet.

    Args:
        on_message: told, before it begins, that a compilation will take a while.

    Raises:
        KernelUnavailable: with the reason; a failure to compile or to agree with the reference is remembered
            for a day.
    """
    global _loaded  # noqa: PLW0603  one library a process
    if _loaded is None:
        with _loading:
            if _loaded is None:
                try:
                    _loaded = _load(on_message)
                except OSError as error:
                    raise KernelUnavailable(f"making the kernel failed: {error}") from error
    return _loaded
