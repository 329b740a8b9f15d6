"""Patch points: the attention functions of MLX and mlx-lm, replaced while an interceptor or observer is registered.

A function is replaced wherever a loaded module binds it, so `from .base import scaled_dot_product_attention` is too.
A module loaded later binds the replacement. When the last registration is removed, every name bound to the
replacement gets the function back, also in modules loaded meanwhile. References to the replacement held elsewhere, in
a closure for example, keep working: without registrations it calls the original function.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any, Final

from attention.core.errors import UsageError

CALIBRATION_CALLS: Final = 100
"""Calls timed together to measure the cost of one."""


def call_cost_s(attend: Callable[..., object], array: object) -> float:
    """Return the seconds of overhead of a call with the arguments of MLX's SDPA: the minimum of five rounds."""
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(CALIBRATION_CALLS):
            attend(array, array, array, scale=1.0, mask=None)
        best = min(best, time.perf_counter() - started)
    return best / CALIBRATION_CALLS


Function = Callable[..., Any]
Interceptor = Callable[..., Any]
"""An interceptor: called instead of the function, with its arguments."""
Observer = Callable[..., Any]
"""An observer: called with the function and its arguments; it must call it exactly once and return the result. It sees
the calls that no interceptor keeps."""

PACKAGE: Final = "mlx_lm"
MLX_LM_MISSING: Final = "mlx-lm is not installed: pip install 'mlx-lm>=0.32'"
_lock = threading.RLock()


class PatchPoint:
    """One function with its interceptors and observers; the latest registration is called first.

    Attributes:
        original: the original function.
        replacement: bound in its place while anything is registered.
        observed: the original wrapped by the observers; interceptors pass calls on to it.
    """

    def __init__(self, home: Any, name: str) -> None:
        """Look up the function of a module; nothing is replaced yet."""
        self.original: Function = getattr(home, name)
        self._call = self.observed = self.original
        self._skipped = 0
        self.replacement = self._make_replacement()
        self._home, self._name = home, name
        self._interceptors: tuple[Interceptor, ...] = ()
        self._observers: tuple[Observer, ...] = ()
        self._holds = 0
        self._bound: list[tuple[dict[str, Any], str]] = []

    def add(self, *, interceptor: Interceptor | None = None, observer: Observer | None = None) -> None:
        """Register an interceptor or an observer; the first registration replaces the function."""
        with _lock:
            if not self._in_use:
                self._replace()
            self._interceptors += (interceptor,) if interceptor else ()
            self._observers += (observer,) if observer else ()
            self._compose()

    def remove(self, *, interceptor: Interceptor | None = None, observer: Observer | None = None) -> None:
        """Remove a registration, in any order; removing the last one restores the function."""
        with _lock:
            self._interceptors = _remove_latest(self._interceptors, interceptor)
            self._observers = _remove_latest(self._observers, observer)
            self._compose()
            if not self._in_use:
                self._restore()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the function replaced: registrations meanwhile do not search the loaded modules, which takes 1 ms."""
        with _lock:
            if not self._in_use:
                self._replace()
            self._holds += 1
        try:
            yield
        finally:
            with _lock:
                self._holds -= 1
                if not self._in_use:
                    self._restore()

    @property
    def _in_use(self) -> bool:
        return bool(self._interceptors or self._observers or self._holds)

    def _replace(self) -> None:
        """Bind the replacement wherever the function is bound."""
        self._bound = [*_bindings(self.original, self._home, self._name)]
        _bind(self._bound, self.replacement)

    def _restore(self) -> None:
        """Bind the function wherever the replacement is bound."""
        home = [(vars(self._home), self._name)]
        here = [*home, *self._bound, *_bindings(self.replacement, self._home, self._name)]
        _bind([(names, name) for names, name in here if names.get(name) is self.replacement], self.original)
        self._bound = []

    def skip_calls(self, calls: int) -> int:
        """Skip the observer for the next `calls` calls, at almost no cost; returns 0 if it is not the only one."""
        self._skipped = calls if len(self._observers) == 1 and not self._interceptors else 0
        return self._skipped

    @classmethod
    def skip_cost_s(cls) -> float:
        """Measure the seconds of overhead of a skipped call."""
        home = ModuleType("scratch")
        vars(home)["call"] = lambda q, k, v, **more: q
        scratch = cls(home, "call")
        scratch._skipped = 1 << 60  # never reached
        return max(0.0, call_cost_s(scratch.replacement, 0) - call_cost_s(scratch.original, 0))

    def _make_replacement(self) -> Function:
        @wraps(self.original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if self._skipped > 0:
                self._skipped -= 1
                return self.original(*args, **kwargs)
            return self._call(*args, **kwargs)

        return replacement

    def _compose(self) -> None:
        self._skipped = 0
        observed = self.original
        for observer in self._observers:
            observed = partial(observer, observed)
        self.observed = observed
        self._call = self._interceptors[-1] if self._interceptors else observed


class MethodPatchPoint(PatchPoint):
    """A method of a class, which all instances call there, with the instance as first argument."""

    def _replace(self) -> None:
        setattr(self._home, self._name, self.replacement)

    def _restore(self) -> None:
        if getattr(self._home, self._name) is self.replacement:
            setattr(self._home, self._name, self.original)


def _remove_latest(all_of_them: tuple[Function, ...], one: Function | None) -> tuple[Function, ...]:
    """Remove the latest occurrence of one; it may occur several times."""
    for index in reversed(range(len(all_of_them))):
        if all_of_them[index] == one:
            return all_of_them[:index] + all_of_them[index + 1 :]
    return all_of_them


def _bindings(function: Function, home: ModuleType, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield a function's bindings in loaded modules: under its own name, and in mlx-lm's modules under any name."""
    loaded: list[tuple[str, object]] = [(home.__name__, home), *sys.modules.items()]
    for key, module in loaded:
        if not isinstance(module, ModuleType):
            continue  # programs put arbitrary objects into sys.modules
        names = module.__dict__
        if names.get(name) is function:
            yield names, name
        if key.partition(".")[0] == PACKAGE:
            yield from ((names, other) for other, value in [*names.items()] if value is function and other != name)


def _bind(bindings: list[tuple[dict[str, Any], str]], function: Function) -> None:
    for names, name in bindings:
        names[name] = function


@cache
def fast_sdpa() -> PatchPoint:
    """`mx.fast.scaled_dot_product_attention`, which some models call directly."""
    import mlx.core as mx

    return PatchPoint(mx.fast, "scaled_dot_product_attention")


@cache
def fast_rope() -> PatchPoint:
    """`mx.fast.rope`, by which models rotate queries and keys."""
    import mlx.core as mx

    return PatchPoint(mx.fast, "rope")


@cache
def models_sdpa() -> PatchPoint:
    """`mlx_lm.models.base.scaled_dot_product_attention`, through which most models attend.

    Raises:
        UsageError: mlx-lm cannot be imported.
    """
    return PatchPoint(_models_base(), "scaled_dot_product_attention")


@cache
def models_causal_mask() -> PatchPoint:
    """`mlx_lm.models.base.create_causal_mask`, which makes the models' masks that are arrays.

    Raises:
        UsageError: mlx-lm cannot be imported.
    """
    return PatchPoint(_models_base(), "create_causal_mask")


@cache
def gemma2_attention() -> PatchPoint:
    """The call of `mlx_lm.models.gemma2.Attention`, which attends by itself because of its softcap.

    Raises:
        UsageError: mlx-lm cannot be imported.
    """
    _models_base()
    from mlx_lm.models import gemma2

    return MethodPatchPoint(gemma2.Attention, "__call__")


@cache
def rotating_to_quantized() -> PatchPoint:
    """`RotatingKVCache.to_quantized` of mlx-lm, which raises NotImplementedError.

    Raises:
        UsageError: mlx-lm cannot be imported.
    """
    _models_base()
    from mlx_lm.models.cache import RotatingKVCache

    return MethodPatchPoint(RotatingKVCache, "to_quantized")


@cache
def rotating_batch_mask() -> PatchPoint:
    """`make_mask` of mlx-lm's BatchRotatingKVCache, which makes the masks of padded batches with windows.

    Raises:
        UsageError: mlx-lm cannot be imported.
    """
    _models_base()
    from mlx_lm.models.cache import BatchRotatingKVCache

    return MethodPatchPoint(BatchRotatingKVCache, "make_mask")


def _models_base() -> ModuleType:
    try:
        from mlx_lm.models import base
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(PACKAGE)
        raise UsageError(MLX_LM_MISSING if missing else f"mlx-lm cannot be imported: {error}") from error
    return base
