"""The patch that replaces MLX's attention in every model of mlx-lm by an implementation."""

import inspect
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from functools import wraps
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar, cast

import mlx.core as mx

from attention import watching
from attention.arguments import find
from attention.errors import UnsupportedError
from attention.implementations.protocol import Implementation
from attention.patch import seams
from attention.patch.arguments import ModelCall, Offers
from attention.patch.counts import Counts

P = ParamSpec("P")
R = TypeVar("R")
OWN_MODULES: Final = "attention.patch."


class _Inside(threading.local):
    """What this thread is executing: MLX functions called there are not calls of a model."""

    taken = False
    """Inside the implementation or its route: nested calls are part of it."""
    handed = False
    """Inside mlx-lm's own function, which calls MLX's."""


_inside = _Inside()


class ModelPatch(Counts):
    """Context manager and decorator that replaces attention in mlx-lm's models.

    It applies to the whole process, whichever thread enters it. If several patches are open, the one entered last
    gets the calls; a patch may be entered more than once. Unsupported calls are passed on to MLX's own function.

    Attributes:
        implementation: the implementation that computes the calls.
    """

    def __init__(self, implementation: str | Implementation) -> None:
        """Look up the implementation; nothing is replaced yet.

        Raises:
            UsageError: there is no such implementation.
            NoBackendError: MLX cannot be imported.
        """
        super().__init__()
        self.implementation = find(implementation)
        self._offers = Offers(self.implementation)
        self._entered = 0

    def __enter__(self) -> Self:
        """Replace the functions; raises UsageError if mlx-lm is missing."""
        models, fast = seams.of_models(), seams.fast()
        models.add(taker=self._attend)
        fast.add(taker=self._attend_directly)
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo the latest enter."""
        self._entered -= 1
        seams.fast().remove(taker=self._attend_directly)
        seams.of_models().remove(taker=self._attend)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, generator or coroutine: the patch is open while it runs."""
        if inspect.isasyncgenfunction(function):
            return cast("Callable[P, R]", self._around_async_generator(function))
        if inspect.iscoroutinefunction(function):
            return cast("Callable[P, R]", self._around_coroutine(function))
        if inspect.isgeneratorfunction(function):
            return cast("Callable[P, R]", self._around_generator(function))

        @wraps(function)
        def patched(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return patched

    @property
    def is_open(self) -> bool:
        """Whether the patch is in effect."""
        return self._entered > 0

    def summary(self) -> str:
        """Return lines of text: calls computed, and calls passed on with the reasons."""
        return "\n".join(self.lines(self.implementation.name))

    def _attend(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Replacement of mlx-lm's function, with the same arguments."""
        packing = (cache.group_size, cache.bits) if hasattr(cache, "bits") else None
        call = ModelCall(queries, keys, values, scale, mask, sinks, packing)
        taken = self._taken(call)
        if taken is not None:
            return taken
        return _as_it_is(seams.of_models().original, queries, keys, values, cache, scale, mask, sinks)

    def _attend_directly(self, q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        """Replacement of `mx.fast.scaled_dot_product_attention`: only calls from mlx-lm's modules are intercepted."""
        if _inside.taken:
            return cast("mx.array", seams.fast().original(q, k, v, **kwargs))
        if not _inside.handed and _caller().partition(".")[0] == seams.PACKAGE:
            known = {name: value for name, value in kwargs.items() if name in ("scale", "mask", "sinks")}
            if len(known) < len(kwargs) or "scale" not in known:
                self.hand("a stream or force_fused")
            else:
                taken = self._taken(ModelCall(q, k, v, **{"mask": None, **known}))
                if taken is not None:
                    return taken
        return cast("mx.array", seams.fast().watched(q, k, v, **kwargs))

    def _taken(self, call: ModelCall) -> mx.array | None:
        """Return the implementation's output, or None if it does not support the call."""
        before, _inside.taken = _inside.taken, True
        try:
            offer = self._offers.of(call)
            more: dict[str, Any] = {} if call.sinks is None else {"sinks": call.sinks}
            watching.take_path()  # clear what an earlier call left
            out = watching.call(
                self.implementation, call.q, offer.k, offer.v, scale=call.scale, mask=offer.mask, **more
            )
        except UnsupportedError as error:
            self.hand(str(error))
            return None
        finally:
            _inside.taken = before
        # An implementation with a single path records none: its route names what ran.
        self.take(watching.take_path() or offer.path)
        return out

    def _around_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def patched(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            with self:
                return (yield from function(*args, **kwargs))

        return patched

    def _around_coroutine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def patched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return patched

    def _around_async_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def patched(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            with self:
                async for item in function(*args, **kwargs):
                    yield item

        return patched


def _as_it_is(function: Callable[..., mx.array], *args: Any) -> mx.array:
    """Call mlx-lm's own function without intercepting its call of MLX's function."""
    before, _inside.handed = _inside.handed, True
    try:
        return function(*args)
    finally:
        _inside.handed = before


def _caller() -> str:
    """Return the name of the calling module, skipping frames of this package."""
    frame = sys._getframe(1)
    name = ""
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(OWN_MODULES):
            break
    return name
