"""Loading of the compiled kernel: look up or compile, verify, import, self-check."""

import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache
from attention.kernels.cpu import build
from attention.kernels.cpu.mask_lists import Builder
from attention.masks import block_list as lists
from attention.measure.device import cpu_quota

_loaded: ModuleType | None = None
_parts: frozenset[str] = frozenset()
"""Parts of the loaded library."""
_loading = threading.Lock()


def availability(parts: Iterable[str] | None = None) -> tuple[bool, str]:
    """Return whether the kernel can be used, and the reason in one line; compiles nothing, imports nothing heavy.

    Args:
        parts: those that a call would need (`build.PARTS`); by default those that calls have needed so far, or all.
    """
    if _loaded is not None and _parts.issuperset(parts or ()):
        return True, f"loaded ({variant()})"
    try:
        tools = build.find()
        whole = build.key(tools)
        used = _used(whole)
        key = build.key_with(whole, _wanted(used, (used or build.ALL) if parts is None else parts))
        cache.ensure_folder()
        if (failure := cache.failure(key)) is not None:
            return False, failure
        name = _variant(tools, whole)
    except KernelUnavailable as unavailable:
        return False, str(unavailable)
    return True, f"{'compiled' if _is_cached(key) else 'compiles at first use'} ({name})"


def variant() -> str:
    """Return the instruction set of the loaded library; before it is loaded, what it is or will be compiled for.

    Raises:
        KernelUnavailable: nothing is loaded, and nothing can be compiled.
    """
    if _loaded is not None:
        return str(_loaded.variant())
    tools = build.find()
    return _variant(tools, build.key(tools))


def _variant(tools: build.Toolchain, whole: str) -> str:
    """Return what the latest library's record names; the compiler is started only if there is none."""
    recorded = cache.read_record(build.key_with(whole, _used(whole) or build.ALL)).get("variant")
    return build.granted(recorded if recorded in build.VARIANTS else build.compiled_for(tools))


def has(parts: Iterable[str]) -> bool:
    """Return whether the loaded library has these parts."""
    return _parts.issuperset(parts)


def is_compiled(parts: Iterable[str]) -> bool:
    """Return whether the cache folder has a library with these parts for this machine and MLX."""
    if _loaded is not None and _parts.issuperset(parts):
        return True
    try:
        whole = build.key(build.find())
        return _is_cached(build.key_with(whole, _wanted(_used(whole), parts)))
    except KernelUnavailable:
        return False


def _is_cached(key: str) -> bool:
    return "sha256" in cache.read_record(key) and cache.library_path(key).exists()


def _used(whole: str) -> frozenset[str]:
    """Return the parts that calls on this machine have needed so far, given the whole library's key."""
    if _is_cached(whole):
        return build.ALL
    return build.ALL.intersection(cache.read_record(_latest(whole)).get("parts", ()))


def _latest(whole: str) -> str:
    """Return the key of the record that names the parts of the latest library."""
    return f"{whole}-parts"


def _wanted(used: frozenset[str], parts: Iterable[str]) -> frozenset[str]:
    """Return the parts of the library that has some parts: whatever was needed before stays."""
    return used | _parts | frozenset(parts) if build.SEPARABLE else build.ALL


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


def _compile_and_try(
    tools: build.Toolchain, whole: str, parts: frozenset[str], on_message: Callable[[str], None]
) -> ModuleType:
    from attention.kernels.cpu import selfcheck

    key = build.key_with(whole, parts)
    try:
        path = build.compile_library(tools, key, parts)
        module = _import(path)
        selfcheck.run(module, parts)
    except (KernelUnavailable, OSError) as error:
        reason = str(error) if isinstance(error, KernelUnavailable) else f"making the kernel failed: {error}"
        cache.write_failure(key, reason)
        on_message(f"The CPU attention kernel is not used: {reason}")
        raise KernelUnavailable(reason) from error
    ready = "The CPU attention kernel is ready"
    try:
        cache.write_record(key, {"sha256": cache.digest(path), "variant": build.compiled_for(tools)})
        if parts != build.ALL:
            cache.write_record(_latest(whole), {"parts": sorted(parts)})
    except (KernelUnavailable, OSError) as error:
        on_message(f"{ready}, and not kept for the next time: {error}")
    else:
        on_message(f"{ready}, and kept for the next time.")
    return module


def _load(parts: frozenset[str], on_message: Callable[[str], None]) -> tuple[ModuleType, frozenset[str]]:
    """Return the library with these parts, and all parts that it has."""
    tools = build.find()
    cache.ensure_folder()
    whole = build.key(tools)
    used = _used(whole)
    wanted = _wanted(used, parts)
    key = build.key_with(whole, wanted)
    module = _load_cached(key)
    if module is not None:
        return module, wanted
    if (failure := cache.failure(key)) is not None:
        raise KernelUnavailable(failure)
    what = "more of the CPU attention kernel" if used else "the CPU attention kernel for this machine"
    on_message(f"Compiling {what} (once, up to half a minute) ...")
    with cache.lock(whole):
        wanted = _wanted(_used(whole), parts)  # another process may have added some
        key = build.key_with(whole, wanted)
        if (failure := cache.failure(key)) is not None:
            raise KernelUnavailable(failure)
        return _load_cached(key) or _compile_and_try(tools, whole, wanted, on_message), wanted


def load(on_message: Callable[[str], None] | None = None, parts: Iterable[str] = build.ALL) -> ModuleType:
    """Return the kernel's module with some of its parts, compiling what there is not for this machine.

    A module that lacks parts stays usable beside one that is loaded later and has them.

    Args:
        on_message: called with a line before a compilation and one after it: whether the library was cached.
        parts: as in `build.PARTS`.

    Raises:
        KernelUnavailable: the message is the reason; a failed compilation or self-check is remembered for a day.
    """
    if _loaded is None or not _parts.issuperset(parts):
        with _loading:
            if _loaded is None or not _parts.issuperset(parts):
                try:
                    _keep(*_load(frozenset(parts), on_message or (lambda _: None)))
                except OSError as error:
                    raise KernelUnavailable(f"making the kernel failed: {error}") from error
    assert _loaded is not None
    return _loaded


def load_compiled(parts: Iterable[str]) -> bool:
    """Load the cached library with these parts if there is a sound one, and return whether they are loaded."""
    with _loading:
        if _loaded is not None and _parts.issuperset(parts):
            return True
        try:
            whole = build.key(build.find())
            wanted = _wanted(_used(whole), parts)
            module = _load_cached(build.key_with(whole, wanted))
        except (KernelUnavailable, OSError):
            return False
        if module is not None:
            _keep(module, wanted)
        return module is not None


def _keep(module: ModuleType, parts: frozenset[str]) -> None:
    """Make a library with these parts the one that calls use."""
    global _loaded, _parts
    module.limit_threads(cpu_quota() or 0)
    _loaded, _parts = module, parts
    if "lists" in parts:
        lists.use_builder(Builder(module))
