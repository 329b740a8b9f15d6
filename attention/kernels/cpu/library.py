"""Loading of the compiled kernel: look up or compile, verify, import, self-check."""

import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache
from attention.kernels.cpu import build
from attention.measure.device import cpu_quota

_loaded: ModuleType | None = None
_loading = threading.Lock()


def availability() -> tuple[bool, str]:
    """Return whether the kernel can be used, and the reason in one line; compiles nothing, imports nothing heavy."""
    if _loaded is not None:
        return True, f"loaded ({build.variant()})"
    try:
        key = build.key(build.find())
        cache.ensure_folder()
    except KernelUnavailable as unavailable:
        return False, str(unavailable)
    failure = cache.failure(key)
    if failure is not None:
        return False, failure
    state = "compiled" if _is_cached(key) else "compiles at first use"
    return True, f"{state} ({build.variant()})"


def is_compiled() -> bool:
    """Return whether the cache folder has a library for this machine and MLX."""
    if _loaded is not None:
        return True
    try:
        return _is_cached(build.key(build.find()))
    except KernelUnavailable:
        return False


def _is_cached(key: str) -> bool:
    return "sha256" in cache.read_record(key) and cache.library_path(key).exists()


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


def _load_cached(key: str) -> ModuleType | None:
    """Return the cached library if it is intact and loads."""
    path = cache.library(key)
    if path is None:
        return None
    try:
        return _import(path)
    except KernelUnavailable:  # perhaps a system library has changed: link again
        return None


def _compile_and_try(tools: build.Toolchain, key: str, on_message: Callable[[str], None]) -> ModuleType:
    from attention.kernels.cpu import selfcheck

    try:
        path = build.compile_library(tools, key)
        module = _import(path)
        selfcheck.run(module)
    except (KernelUnavailable, OSError) as error:
        reason = str(error) if isinstance(error, KernelUnavailable) else f"making the kernel failed: {error}"
        cache.write_failure(key, reason)
        on_message(f"The CPU attention kernel is not used: {reason}")
        raise KernelUnavailable(reason) from error
    ready = "The CPU attention kernel is ready"
    try:
        cache.write_record(key, {"sha256": cache.digest(path)})
    except (KernelUnavailable, OSError) as error:
        on_message(f"{ready}, and not kept for the next time: {error}")
    else:
        on_message(f"{ready}, and kept for the next time.")
    return module


def _load(on_message: Callable[[str], None]) -> ModuleType:
    tools = build.find()
    cache.ensure_folder()
    key = build.key(tools)
    module = _load_cached(key)
    if module is not None:
        return module
    failure = cache.failure(key)
    if failure is not None:
        raise KernelUnavailable(failure)
    on_message("Compiling the CPU attention kernel for this machine (once, up to a minute) ...")
    with cache.lock(key):
        failure = cache.failure(key)
        if failure is not None:
            raise KernelUnavailable(failure)
        return _load_cached(key) or _compile_and_try(tools, key, on_message)


def load(on_message: Callable[[str], None] | None = None) -> ModuleType:
    """Return the kernel's module, compiling it if there is none for this machine.

    Args:
        on_message: called with a line before a compilation and one after it: how long it took, and whether the
            library was cached.

    Raises:
        KernelUnavailable: the message is the reason; a failed compilation or self-check is remembered for a day.
    """
    global _loaded  # noqa: PLW0603  one library a process
    if _loaded is None:
        with _loading:
            if _loaded is None:
                try:
                    module = _load(on_message or (lambda _: None))
                    module.limit_threads(cpu_quota() or 0)
                    _loaded = module
                except OSError as error:
                    raise KernelUnavailable(f"making the kernel failed: {error}") from error
    return _loaded
