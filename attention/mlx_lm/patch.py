"""The patch that replaces MLX's attention in every model of mlx-lm by an implementation."""

import inspect
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from functools import lru_cache, wraps
from types import TracebackType
from typing import Any, Final, NamedTuple, ParamSpec, Self, TypeVar, cast

import mlx.core as mx
from msgspec import Struct, structs

from attention.arguments import checked_mask, checked_shapes, find
from attention.core.errors import UnsupportedError, UsageError
from attention.implementations import call_hooks
from attention.implementations.call_signature import asked_for
from attention.implementations.protocol import Implementation
from attention.implementations.quantized_kv import Packed
from attention.masks import Mask
from attention.measure.device import probe
from attention.monitoring import patch_points

KNOWN_SHAPES = 4096
"""Maximum number of kinds of call whose path is cached; a decoding loop makes a new one at each length."""
device = lru_cache(maxsize=1)(probe)


class ModelCall(NamedTuple):
    """The arguments of a model's attention call."""

    q: mx.array
    k: Any
    """(B, Hkv, Lk, D), or the three arrays of `mx.quantize`."""
    v: Any
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None = None
    packing: tuple[int, int] | None = None
    """Group size and bits of quantized keys and values."""


class Offer(NamedTuple):
    """The arguments passed to the implementation."""

    k: Any
    v: Any
    mask: Mask
    path: str


class Verdict(Struct, frozen=True):
    """Whether calls of a kind are supported: by which path, or why not."""

    path: str | None
    reason: str = ""


class Offers:
    """Decide which calls of models an implementation supports, and translate their arguments."""

    def __init__(self, implementation: Implementation) -> None:
        """Create it for an implementation."""
        self._implementation = implementation
        self._takes_sinks = bool(getattr(implementation, "takes_sinks", False))
        self._takes_packed = bool(getattr(implementation, "takes_packed", False))
        self._verdicts: dict[tuple[object, ...], Verdict] = {}

    def of(self, call: ModelCall) -> Offer:
        """Return the arguments for the implementation.

        Raises:
            UnsupportedError: it does not support the call; the reason contains no values particular to this call.
        """
        if call.sinks is not None and not self._takes_sinks:
            raise UnsupportedError("attention sinks")
        k, v = (call.k, call.v) if call.packing is None else self._unpacked(call)
        verdict = self._verdict(call, k, v)
        if verdict.path is None:
            raise UnsupportedError(verdict.reason)
        array = None if isinstance(call.mask, str) else call.mask
        mask = Mask(causal=isinstance(call.mask, str), array=array)
        return Offer(k, v, mask, verdict.path)

    def _unpacked(self, call: ModelCall) -> tuple[Any, Any]:
        """Return quantized keys and values unchanged, or dequantized to the query's dtype."""
        assert call.packing is not None
        group_size, bits = call.packing
        (k, k_scales, k_biases), (v, v_scales, v_biases) = call.k, call.v
        key = Packed(k, k_scales, k_biases, group_size, bits)
        value = Packed(v, v_scales, v_biases, group_size, bits)
        if self._takes_packed:
            return key, value
        return key.unpacked().astype(call.q.dtype), value.unpacked().astype(call.q.dtype)

    def _verdict(self, call: ModelCall, k: Any, v: Any) -> Verdict:
        """Return the verdict, cached per kind of call: in decoding every layer makes the same call."""
        mask = call.mask
        array = (mask.shape, mask.dtype) if isinstance(mask, mx.array) else mask
        types = call.q.dtype, k.dtype, v.dtype
        key = (call.q.shape, k.shape, v.shape, types, array, isinstance(k, Packed), call.sinks is None)
        verdict = self._verdicts.get(key)
        if verdict is None:
            if len(self._verdicts) >= KNOWN_SHAPES:
                self._verdicts.clear()
            verdict = self._verdicts[key] = self._judged(call, k, v)
        return verdict

    def _judged(self, call: ModelCall, k: Any, v: Any) -> Verdict:
        packed = isinstance(k, Packed)
        try:
            if not packed:
                checked_shapes(call.q, k, v)
            mask = checked_mask(call.mask, None, call.q, k)
            route = self._implementation.route(*_asked(call, k, v, mask))
        except UsageError as error:
            return Verdict(None, _kind(error))
        except UnsupportedError as error:
            return Verdict(None, str(error))
        if not route.supported:
            return Verdict(None, route.reason)
        return Verdict("packed keys and values" if packed else route.path)


def _asked(call: ModelCall, k: Any, v: Any, mask: Mask) -> tuple[Any, Any, Any]:
    workload, needs = asked_for(call.q, k, v, mask, None)
    return workload, device(), structs.replace(needs, sinks=call.sinks is not None)


def _kind(error: UsageError) -> str:
    """Return the first problem without the values particular to this call."""
    name, _, rest = error.problems[0].partition(": got ")
    return f"{name}: {rest.partition('; ')[2] or rest}"


class Counts:
    """Counters of calls computed by an implementation, by path, and of calls passed on to MLX, by reason.

    Only calls in Python count: a function compiled by `mx.compile` runs again without one.

    Attributes:
        taken: calls computed by the implementation, by path.
        handed: calls passed on to MLX's own function, by reason.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, path: str) -> None:
        """Count a call computed by the implementation."""
        with self._lock:
            self.taken[path] += 1

    def hand(self, reason: str) -> None:
        """Count a call passed on to MLX's own function."""
        with self._lock:
            self.handed[reason] += 1

    @property
    def calls_taken(self) -> int:
        """Number of calls computed by the implementation."""
        return self.taken.total()

    @property
    def calls_handed(self) -> int:
        """Number of calls passed on to MLX's own function."""
        return self.handed.total()

    def lines(self, name: str) -> list[str]:
        """Return the counts as lines of text, the most frequent first."""
        if not (self.taken or self.handed):
            return [f"{name}: no call of mlx-lm's attention was seen"]
        taken = [f"{name} took {count:,} as {path}" for path, count in self.taken.most_common()]
        handed = [f"MLX's own got {count:,}: {reason}" for reason, count in self.handed.most_common()]
        total = f"{name} took {self.calls_taken:,} of {self.calls_taken + self.calls_handed:,} calls of attention"
        return [total, *taken, *handed]


P = ParamSpec("P")
R = TypeVar("R")
OWN_MODULES: Final = ("attention.mlx_lm.patch", "attention.mlx_lm.program", "attention.monitoring.patch_points")


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
        models, fast = patch_points.of_models(), patch_points.fast()
        models.add(taker=self._attend)
        fast.add(taker=self._attend_directly)
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo the latest enter."""
        self._entered -= 1
        patch_points.fast().remove(taker=self._attend_directly)
        patch_points.of_models().remove(taker=self._attend)

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
        return _as_it_is(patch_points.of_models().original, queries, keys, values, cache, scale, mask, sinks)

    def _attend_directly(self, q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        """Replacement of `mx.fast.scaled_dot_product_attention`: only calls from mlx-lm's modules are intercepted."""
        if _inside.taken:
            return cast("mx.array", patch_points.fast().original(q, k, v, **kwargs))
        if not _inside.handed and _caller().partition(".")[0] == patch_points.PACKAGE:
            known = {name: value for name, value in kwargs.items() if name in ("scale", "mask", "sinks")}
            if len(known) < len(kwargs) or "scale" not in known:
                self.hand("a stream or force_fused")
            else:
                taken = self._taken(ModelCall(q, k, v, **{"mask": None, **known}))
                if taken is not None:
                    return taken
        return cast("mx.array", patch_points.fast().watched(q, k, v, **kwargs))

    def _taken(self, call: ModelCall) -> mx.array | None:
        """Return the implementation's output, or None if it does not support the call."""
        before, _inside.taken = _inside.taken, True
        try:
            offer = self._offers.of(call)
            more: dict[str, Any] = {} if call.sinks is None else {"sinks": call.sinks}
            call_hooks.take_path()  # clear what an earlier call left
            out = call_hooks.call(
                self.implementation, call.q, offer.k, offer.v, scale=call.scale, mask=offer.mask, **more
            )
        except UnsupportedError as error:
            self.hand(str(error))
            return None
        finally:
            _inside.taken = before
        # An implementation with a single path records none: its route names what ran.
        self.take(call_hooks.take_path() or offer.path)
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
