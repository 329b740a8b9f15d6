"""The patch of mlx-lm: an implementation, or none, instead of MLX's attention in every model; counts of its calls."""

import inspect
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property, lru_cache, reduce, wraps
from operator import and_
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, ParamSpec, Self, TypeVar, cast

import mlx.core as mx
from msgspec import Struct, structs

from attention import implementations, masks
from attention.arguments import check_mask, check_shapes, find_implementation
from attention.core.bounded_dict import BoundedDict
from attention.core.errors import UnsupportedError, UsageError
from attention.core.events import WITHOUT_ATTENTION, CallsCounted
from attention.core.kv_format import Format, KVFormat
from attention.implementations.calls import call_signature, call_through_hooks, take_path
from attention.implementations.protocol import Implementation, ReturnsLogsumexp, SupportsTraining
from attention.masks import Mask, Pattern
from attention.measure.device import probe
from attention.mlx_lm import gemma2
from attention.monitoring import patch_points
from attention.quantized_kv import PackedParts, QuantizedArray, quantized
from attention.streaming import StreamingKV

device = lru_cache(maxsize=1)(probe)


DEQUANTIZED: Final = "dequantized K and V"
"""Ends the path, or the reason, of a call for which quantized keys and values were copied to dense ones."""
STREAMING: Final = "first and latest tokens"
"""Ends the path of a call over the tokens that a streaming cache keeps."""
TO_PRACTICAL: Final = "mlx-lm does not take these quantized K and V either"
"""Ends the reason of a call that practical got."""


class ModelCall(NamedTuple):
    """The arguments of a model's attention call."""

    q: mx.array
    k: Any
    """(B, Hkv, Lk, D), or the arrays of `mx.quantize`."""
    v: Any
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None = None
    kv_format: KVFormat | None = None
    """Formats of quantized keys and values."""
    window: int | None = None
    """Keys that a query attends to; the mask is then "causal"."""
    pattern: Pattern | None = None
    """The mask as a value, instead of `mask`."""
    softcap: float | None = None

    @property
    def kv_seq(self) -> int:
        """Number of keys."""
        shape = self.k.shape if self.kv_format is None else self.k[0].shape
        return int(shape[2])

    def quantized_arrays(self) -> tuple[QuantizedArray, QuantizedArray]:
        """Return quantized keys and values, without checking that their arrays fit together."""
        assert self.kv_format is not None
        return (
            _with_format(self.k, self.kv_format.key, self.q.dtype),
            _with_format(self.v, self.kv_format.value, self.q.dtype),
        )

    def dequantized(self) -> "ModelCall":
        """Return the call with dense keys and values, of the query's dtype."""
        if self.kv_format is None:
            return self
        k, v = (array.dequantized(self.q.dtype) for array in self.quantized_arrays())
        return self._replace(k=k, v=v, kv_format=None)

    @property
    def is_readable_by_mlx_lm(self) -> bool:
        """Whether mlx-lm's own function computes it."""
        return self.kv_format is None or (
            self.kv_format.shared_affine is not None and self.sinks is None and self.softcap is None
        )


def _with_format(arrays: Sequence[mx.array], form: Format, dtype: mx.Dtype) -> QuantizedArray:
    numbers, scales, *biases = arrays
    return QuantizedArray(numbers, scales, biases[0] if biases else None, form, scales.dtype if biases else dtype)


IN_PLACE: Final = [
    "add",
    "and",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
]
"""Operators of which MLX's arrays have one that changes its left side."""
MIN_PATTERN_ROWS: Final = 64
"""Query rows from which a mask of padding becomes a pattern; with fewer its array is not much larger than the keys."""


class MadeMask(mx.array):
    """An array made as a mask, which notes that it was changed in place: `mask[:, :3] = False`, `mask &= other`.

    Attributes:
        is_as_made: whether it was not.
    """

    is_as_made = True


def _noting(name: str) -> Callable[..., Any]:
    change = getattr(mx.array, name)

    def noting(self: MadeMask, *args: Any) -> Any:
        self.is_as_made = False
        return change(self, *args)

    return noting


for _name in ("__setitem__", *(f"__i{name}__" for name in IN_PLACE)):
    setattr(MadeMask, _name, _noting(_name))


class KnownMask:
    """What an array made by mlx-lm as a mask means.

    Attributes:
        rows: number of rows.
        keys: number of keys.
        window: keys that a row sees, or None for all up to its own.
    """

    def __init__(
        self,
        array: "weakref.ref[MadeMask]",
        rows: int,
        offset: int,
        window: int | None,
        right_padding: mx.array | None = None,
        left_padding: mx.array | None = None,
    ) -> None:
        self.array = array
        self.rows, self.keys, self.window = rows, rows + offset, window
        # copies, as mlx-lm's caches change their padding in place
        self._paddings = tuple(None if each is None else mx.array(each) for each in (right_padding, left_padding))

    @property
    def may_be_padded(self) -> bool:
        """Whether the sequences of the batch have padding, possibly of length 0."""
        return any(one is not None for one in self._paddings)

    @cached_property
    def padding(self) -> list[Pattern] | None:
        """The padding as masks, none where its length is 0; None if it is traced by a transformation of MLX."""
        made = []
        sides: tuple[Literal["right", "left"], ...] = ("right", "left")
        for side, padding in zip(sides, self._paddings, strict=True):
            if padding is None:
                continue
            try:
                lengths = [self.keys - one for one in cast("list[int]", padding.tolist())]
            except ValueError:
                return None
            if any(length < self.keys for length in lengths):
                made.append(masks.padding([max(0, min(length, self.keys)) for length in lengths], side))
        return made

    def in_call(self, call: "ModelCall", padding: Sequence[Pattern]) -> "ModelCall":
        """Return a call with the mask as bounds, or as a pattern if there is padding."""
        if not padding:
            return call._replace(mask="causal", window=self.window)
        bounds = masks.causal() if self.window is None else masks.window(self.window)
        return call._replace(mask=None, pattern=reduce(and_, padding, bounds))


class KnownMasks:
    """Masks made by mlx-lm as arrays: bounds, and padding of the sequences of a batch.

    MLX is lazy: an array that no implementation reads is never computed, however large its shape.

    Attributes:
        by_value: whether the implementation takes padding as a pattern.
    """

    def __init__(self, *, by_value: bool) -> None:
        self.by_value = by_value
        self._known: dict[int, KnownMask] = {}

    def create(
        self,
        N: int,  # noqa: N803
        offset: int = 0,
        window_size: int | None = None,
        right_padding: mx.array | None = None,
        left_padding: mx.array | None = None,
        **more: Any,
    ) -> mx.array:
        """Replacement of mlx-lm's `create_causal_mask`, with the same arguments."""
        made = MadeMask(
            patch_points.models_causal_mask().observed(N, offset, window_size, right_padding, left_padding, **more)
        )
        plain = not more and all(one is None or one.ndim == 1 for one in (right_padding, left_padding))
        if plain and isinstance(offset, int) and (window_size is None or isinstance(window_size, int)):
            self._keep(made, N, offset, window_size, right_padding, left_padding)
        return made

    def create_rotating(
        self,
        cache: Any,
        N: int,  # noqa: N803
        window_size: int | None = None,
        return_array: bool = False,
    ) -> mx.array:
        """Replacement of `make_mask` of mlx-lm's BatchRotatingKVCache, with the same arguments."""
        made = MadeMask(patch_points.rotating_batch_mask().observed(cache, N, window_size, return_array))
        if N >= MIN_PATTERN_ROWS:  # as mlx-lm has it for more than one row, which are in the order of time
            offset, trimmed = min(cache.max_size - 1, cache._offset), max(0, cache._idx - cache.max_size + 1)
            self._keep(made, N, offset, window_size or cache.max_size, None, cache.left_padding - trimmed)
        return made

    def _keep(self, made: MadeMask, *said: Any) -> None:
        place = id(made)
        forget = weakref.ref(made, lambda _: self._known.pop(place, None))
        self._known[place] = KnownMask(forget, *said)

    def by_position(self, call: ModelCall) -> ModelCall:
        """Return the call with bounds or a pattern instead of a known array that fits its lengths."""
        known = self._known.get(id(call.mask)) if isinstance(call.mask, MadeMask) and call.mask.is_as_made else None
        if known is None or known.array() is not call.mask:
            return call
        if (known.rows, known.keys) != (call.q.shape[2], call.kv_seq):
            return call
        if not known.may_be_padded:
            return known.in_call(call, [])
        if not self.by_value or known.rows < MIN_PATTERN_ROWS or known.padding is None:
            return call
        return known.in_call(call, known.padding)


class CallArguments(NamedTuple):
    """The arguments passed to the implementation."""

    k: Any
    v: Any
    mask: Mask
    path: str
    dequantized: bool
    """Whether keys and values are dense copies of quantized ones."""


class Acceptance(Struct, frozen=True):
    """Whether calls of a kind are supported: by which path, or why not."""

    path: str | None
    reason: str = ""
    mask: Mask | None = None
    """The mask of every call of the kind; None if it has an array or a pattern of its own."""


class ArgumentAdapter:
    """Decide which calls of models an implementation supports, and translate their arguments."""

    def __init__(self, implementation: Implementation) -> None:
        """Create it for an implementation."""
        self._implementation = implementation
        self._takes_sinks = bool(getattr(implementation, "takes_sinks", False))
        self._takes_quantized = bool(getattr(implementation, "takes_quantized", False))
        self._acceptances = BoundedDict[tuple[object, ...], Acceptance]()

    def adapt(self, call: ModelCall) -> CallArguments:
        """Return the arguments for the implementation.

        Raises:
            UnsupportedError: it does not support the call; the reason contains no values particular to this call.
        """
        if call.sinks is not None and not self._takes_sinks:
            raise UnsupportedError("attention sinks")
        verdict = self._acceptance(call)
        if verdict.path is None:
            raise UnsupportedError(verdict.reason)
        mask = verdict.mask or _own_mask(call)
        if call.kv_format is None:
            return CallArguments(call.k, call.v, mask, verdict.path, False)
        return CallArguments(*self._keys_and_values(call), mask, verdict.path, self._must_dequantize(call))

    def _must_dequantize(self, call: ModelCall) -> bool:
        return call.kv_format is not None and not self._takes_quantized

    def _keys_and_values(self, call: ModelCall) -> tuple[Any, Any]:
        """Return keys and values; quantized ones unchanged, or dequantized if the implementation does not take them."""
        if self._must_dequantize(call):
            call = call.dequantized()
        return (call.k, call.v) if call.kv_format is None else call.quantized_arrays()

    def _acceptance(self, call: ModelCall) -> Acceptance:
        """Return the verdict, cached per kind of call: in decoding every layer makes the same call."""
        q, k, v, _, mask, sinks, kv_format, window, pattern, softcap = call
        array = (mask.shape, mask.dtype) if isinstance(mask, mx.array) else (mask, window)
        if kv_format is None:
            kinds: tuple[object, ...] = q.shape, q.dtype, k.shape, k.dtype, v.shape, v.dtype
        else:
            kinds = q.shape, q.dtype, _kinds(k), _kinds(v), kv_format
        key = (kinds, array, sinks is None, softcap is None, pattern is None)
        verdict = self._acceptances.get(key)
        if verdict is None:
            verdict = self._acceptances[key] = self._check(call)
        return verdict

    def _check(self, call: ModelCall) -> Acceptance:
        try:
            if call.kv_format is not None:
                quantized(call.k, call.kv_format.key)
                quantized(call.v, call.kv_format.value)
            k, v = self._keys_and_values(call)
            check_shapes(call.q, k, v)
            mask = check_mask(call.mask if call.pattern is None else call.pattern, call.window, call.q, k)
            route = self._implementation.route(*_route_arguments(call, k, v, mask))
        except UsageError as error:
            return Acceptance(None, _problem(error))
        except UnsupportedError as error:
            return Acceptance(None, str(error))
        if not route.supported:
            return Acceptance(None, route.reason)
        alike = call.pattern is None and not isinstance(call.mask, mx.array)
        return Acceptance(route.path, mask=_own_mask(call) if alike else None)


def _own_mask(call: ModelCall) -> Mask:
    """Return the mask of a call as an implementation takes it."""
    if call.pattern is not None:
        return masks.of_pattern(call.pattern)
    if isinstance(call.mask, str):
        return Mask(causal=True, window=call.window)
    return Mask(window=call.window, array=call.mask)


def _kinds(arrays: Sequence[mx.array]) -> tuple[object, ...]:
    """Return shapes and dtypes of the arrays of quantized keys or values."""
    return tuple((array.shape, array.dtype) for array in arrays)


def _route_arguments(call: ModelCall, k: Any, v: Any, mask: Mask) -> tuple[Any, Any, Any]:
    workload, needs = call_signature(call.q, k, v, mask, call.softcap)
    return workload, device(), structs.replace(needs, sinks=call.sinks is not None)


def _problem(error: UsageError) -> str:
    """Return the first problem without the values particular to this call."""
    name, _, rest = error.problems[0].partition(": got ")
    return f"{name}: {rest.partition('; ')[2] or rest}"


class CallCounts:
    """Counters of calls computed by an implementation, by path, and of calls passed on, by reason.

    Only calls in Python count: a function compiled by `mx.compile` runs again without one.

    Attributes:
        taken: calls computed by the implementation, by path.
        handed: calls passed on, by reason: to practical if it ends in `TO_PRACTICAL`, otherwise to MLX's own function.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count_taken(self, path: str) -> None:
        """Count a call computed by the implementation."""
        with self._lock:
            self.taken[path] += 1

    def count_passed_on(self, reason: str) -> None:
        """Count a call passed on."""
        with self._lock:
            self.handed[reason] += 1

    @property
    def calls_taken(self) -> int:
        """Number of calls computed by the implementation."""
        return self.taken.total()

    @property
    def calls_handed(self) -> int:
        """Number of calls passed on."""
        return self.handed.total()

    def lines(self, name: str) -> list[str]:
        """Return the counts as lines of text, the most frequent first."""
        if not (self.taken or self.handed):
            return [f"{name}: no call of mlx-lm's attention was seen"]
        taken = [f"{name} took {count:,} as {path}" for path, count in self.taken.most_common()]
        handed = [f"{_recipient(reason)} got {count:,}: {reason}" for reason, count in self.handed.most_common()]
        total = f"{name} took {self.calls_taken:,} of {self.calls_taken + self.calls_handed:,} calls of attention"
        return [total, *taken, *handed]


def _recipient(reason: str) -> str:
    return "practical" if reason.endswith(TO_PRACTICAL) else "MLX's own"


P = ParamSpec("P")
R = TypeVar("R")
OWN_MODULES: Final = ("attention.mlx_lm.patch", "attention.monitoring.patch_points")


class _ThreadState(threading.local):
    """What this thread is executing: MLX functions called there are not calls of a model."""

    in_implementation = False
    """Inside the implementation or its route: nested calls are part of it."""
    in_original = False
    """Inside mlx-lm's own function, which calls MLX's."""


_thread = _ThreadState()


class in_implementation:  # noqa: N801  a context manager; made of a generator it would take a microsecond of each call
    """Make this thread's calls of MLX's functions parts of an implementation, which are not intercepted."""

    def __enter__(self) -> None:
        """Note that this thread is inside."""
        self._before, _thread.in_implementation = _thread.in_implementation, True

    def __exit__(self, *_: object) -> None:
        """Return to what it was in before."""
        _thread.in_implementation = self._before


def _attend_by(implementation: Implementation, adapter: ArgumentAdapter, call: ModelCall) -> tuple[mx.array, str]:
    """Return an implementation's output, and the path that ran.

    Raises:
        UnsupportedError: it does not support the call.
    """
    arguments = adapter.adapt(call)
    more: dict[str, Any] = {} if call.sinks is None else {"sinks": call.sinks}
    if call.softcap is not None:
        more["softcap"] = call.softcap
    take_path()  # clear what an earlier call left
    out: mx.array = call_through_hooks(
        implementation, call.q, arguments.k, arguments.v, scale=call.scale, mask=arguments.mask, **more
    )
    # An implementation with a single path records none: its route names what ran.
    path = take_path() or arguments.path
    return out, f"{path}, {DEQUANTIZED}" if arguments.dequantized else path


@cache
def _practical() -> tuple[Implementation, ArgumentAdapter]:
    implementation = implementations.load_implementation("practical")
    return implementation, ArgumentAdapter(implementation)


class ModelPatch(CallCounts):
    """Context manager and decorator that replaces attention in mlx-lm's models.

    It applies to the whole process, whichever thread enters it. If several patches are open, the one entered last
    gets the calls; a patch may be entered more than once. Unsupported calls are passed on to MLX's own function, or to
    `practical` if keys and values are quantized and mlx-lm does not support them either.

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
        self.implementation = find_implementation(implementation)
        self._adapter = ArgumentAdapter(self.implementation)
        self._masks = KnownMasks(by_value=bool(getattr(self.implementation, "takes_patterns", False)))
        self._entered = 0

    def __enter__(self) -> Self:
        """Replace the functions; raises UsageError if mlx-lm is missing."""
        for place, interceptor in self._places():
            place.add(interceptor=interceptor)
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo the latest enter."""
        self._entered -= 1
        for place, interceptor in reversed(self._places()):
            place.remove(interceptor=interceptor)

    def _places(self) -> Sequence[tuple[patch_points.PatchPoint, Callable[..., Any]]]:
        """Return what is replaced, and by what; raises UsageError if mlx-lm is missing."""
        places: list[tuple[patch_points.PatchPoint, Callable[..., Any]]] = [
            (patch_points.models_causal_mask(), self._masks.create),
            (patch_points.rotating_batch_mask(), self._masks.create_rotating),
            (patch_points.models_sdpa(), self._attend),
            (patch_points.fast_sdpa(), self._attend_directly),
            (patch_points.gemma2_attention(), self._attend_in_gemma2),
        ]
        from attention.mlx_lm.caches import quantize_rotating  # which imports mlx-lm

        return [*places, (patch_points.rotating_to_quantized(), quantize_rotating)]

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, generator or coroutine: the patch is open while it runs."""
        if inspect.isasyncgenfunction(function):
            return cast("Callable[P, R]", self._decorate_async_generator(function))
        if inspect.iscoroutinefunction(function):
            return cast("Callable[P, R]", self._decorate_coroutine(function))
        if inspect.isgeneratorfunction(function):
            return cast("Callable[P, R]", self._decorate_generator(function))

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
        if isinstance(keys, StreamingKV):
            return self._attend_streaming(keys, queries, scale, sinks)
        call = ModelCall(queries, keys, values, scale, mask, sinks, _kv_format(cache, keys, values, queries.shape[3]))
        taken = self._try_attend(call)
        if taken is not None:
            return taken
        original = patch_points.models_sdpa().original
        if call.is_readable_by_mlx_lm:
            form = call.kv_format and call.kv_format.shared_affine
            read = ReadAs(form.bits, form.group_size) if form else cache
            return _call_original(original, queries, keys, values, read, scale, mask, sinks)
        call = call.dequantized()
        return _call_original(original, queries, call.k, call.v, None, scale, mask, sinks)

    def _attend_in_gemma2(self, layer: Any, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """Replacement of the call of mlx-lm's Gemma 2 attention, with the same arguments."""
        queries, keys, values, offset = gemma2.projected(layer, x, cache)
        softcap = float(layer.attn_logit_softcapping)
        if isinstance(keys, StreamingKV):
            return gemma2.joined(layer, self._attend_streaming(keys, queries, layer.scale, softcap=softcap))
        formats = _kv_format(cache, keys, values, queries.shape[3])
        call = ModelCall(queries, keys, values, layer.scale, mask, None, formats, softcap=softcap)
        taken = self._try_attend(call)
        if taken is not None:
            return gemma2.joined(layer, taken)
        call = call.dequantized()
        fetched = gemma2.FetchedCache(offset, call.k, call.v)
        return cast("mx.array", patch_points.gemma2_attention().observed(layer, x, mask, fetched))

    def _attend_streaming(
        self,
        state: StreamingKV,
        queries: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        softcap: float | None = None,
    ) -> mx.array:
        """Attend over what a streaming cache keeps; what is seen of it is the state's own business."""
        chosen = self.implementation
        if not isinstance(chosen, ReturnsLogsumexp):
            self.count_passed_on(f"it does not return the logsumexp; {TO_PRACTICAL}")
            chosen = _practical()[0]
        with in_implementation():
            take_path()
            same = queries.astype(state.dtype or queries.dtype)  # some models widen the query alone
            out = state.attend_pending(same, chosen, scale, softcap, sinks).astype(queries.dtype)
        if chosen is self.implementation:
            self.count_taken(f"{take_path() or chosen.name}, {STREAMING}")
        return out

    def _attend_directly(self, q: mx.array, k: Any, v: Any, **kwargs: Any) -> mx.array:
        """Replacement of `mx.fast.scaled_dot_product_attention`: only calls from mlx-lm's modules are intercepted."""
        if _thread.in_implementation:
            return cast("mx.array", patch_points.fast_sdpa().original(q, k, v, **kwargs))
        if not _thread.in_original and _calling_module().partition(".")[0] == patch_points.PACKAGE:
            known = {name: value for name, value in kwargs.items() if name in ("scale", "mask", "sinks")}
            if isinstance(k, StreamingKV):
                return self._attend_streaming(k, q, known["scale"], known.get("sinks"))
            if isinstance(k, mx.array) and (len(known) < len(kwargs) or "scale" not in known):
                self.count_passed_on("a stream or force_fused")
            else:
                call = ModelCall(q, k, v, **{"mask": None, "kv_format": _kv_format(None, k, v, q.shape[3]), **known})
                taken = self._try_attend(call)
                if taken is not None:
                    return taken
                call = call.dequantized()
                k, v = call.k, call.v
        return cast("mx.array", patch_points.fast_sdpa().observed(q, k, v, **kwargs))

    def _try_attend(self, call: ModelCall) -> mx.array | None:
        """Return the implementation's output, or practical's if mlx-lm has none; None if there is no support for it."""
        call = self._masks.by_position(call)
        with in_implementation():
            try:
                out, path = _attend_by(self.implementation, self._adapter, call)
            except UnsupportedError as error:
                if call.is_readable_by_mlx_lm:
                    self.count_passed_on(str(error))
                    return None
                return self._attend_by_practical(call, str(error))
        self.count_taken(path)
        return out

    def _attend_by_practical(self, call: ModelCall, reason: str) -> mx.array | None:
        """Compute what neither the implementation nor mlx-lm does; None if it must be dequantized for MLX."""
        try:
            out, _ = _attend_by(*_practical(), call)
        except UnsupportedError:
            self.count_passed_on(f"{reason}; {DEQUANTIZED}")
            return None
        self.count_passed_on(f"{reason}; {TO_PRACTICAL}")
        return out

    def _decorate_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def patched(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            with self:
                return (yield from function(*args, **kwargs))

        return patched

    def _decorate_coroutine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def patched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return patched

    def _decorate_async_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def patched(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            with self:
                async for item in function(*args, **kwargs):
                    yield item

        return patched


def _kv_format(cache: Any, k: Any, v: Any, width: int) -> KVFormat | None:
    """Return the formats of keys `width` wide and of values, as `mx.quantize` returns them; None if they are dense.

    Those of a cache of `attention.mlx_lm.caches`, or of mlx-lm's own quantized one. Models whose layers share keys and
    values also attend without the cache that they are from: then the parts tell.
    """
    if isinstance(k, mx.array):
        return None
    own = getattr(cache, "kv_format", None)
    if isinstance(own, KVFormat):
        return own
    if isinstance(k, PackedParts):
        return KVFormat(k.format, v.format)
    bits, group = k[0].shape[3] * 32 // width, width // k[1].shape[3]  # mlx-lm's keys and values have one format
    form = Format("affine", bits, group)
    return KVFormat(form, form)


class ReadAs(NamedTuple):
    """What mlx-lm's own attention reads of a quantized cache."""

    bits: int
    group_size: int


def _call_original(function: Callable[..., mx.array], *args: Any) -> mx.array:
    """Call mlx-lm's own function without intercepting its call of MLX's function."""
    before, _thread.in_original = _thread.in_original, True
    try:
        return function(*args)
    finally:
        _thread.in_original = before


def _calling_module() -> str:
    """Return the name of the calling module, skipping frames of this package."""
    frame = sys._getframe(1)
    name = ""
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(OWN_MODULES):
            break
    return name


ORIGINAL: Final = "mlx"
"""The implementation for which mlx-lm runs unpatched, without any overhead of a patch."""


def replace_attention(name: str, *, training: bool = False) -> AbstractContextManager[object]:
    """Return a context in which models use an implementation; `training` selects its training variant."""
    if name == ORIGINAL:
        return nullcontext()
    return _without_attention() if name == WITHOUT_ATTENTION else _patch(name, training)


@cache
def _patch(name: str, training: bool) -> ModelPatch:
    """Return the cached patch, which caches routes."""
    implementation = implementations.load_implementation(name)
    return ModelPatch(
        implementation.for_training() if training and isinstance(implementation, SupportsTraining) else implementation
    )


@contextmanager
def _without_attention() -> Iterator[None]:
    """Make attention return its query unchanged; key and value are still computed."""
    places = (
        (patch_points.models_sdpa(), _query_only),
        (patch_points.fast_sdpa(), _query_only),
        (patch_points.gemma2_attention(), _gemma2_query_only),
    )
    for place, interceptor in places:
        place.add(interceptor=interceptor)
    try:
        yield
    finally:
        for place, interceptor in places:
            place.remove(interceptor=interceptor)


def _query_only(q: mx.array, k: Any, v: Any, cache: Any = None, *rest: Any, **named: Any) -> mx.array:
    """Return the query (B, H, Lq, D) in the output's shape (B, H, Lq, Dv), depending on key and value.

    Quantized ones are the arrays of `mx.quantize`.
    """
    formats = _kv_format(cache, k, v, q.shape[3])
    width = v.shape[3] if formats is None else v[1].shape[3] * formats.value.group_size
    shaped = q if width == q.shape[3] else mx.broadcast_to(q[..., :1], (*q.shape[:3], width))
    parts = [part for each in (k, v) for part in ([each] if isinstance(each, mx.array) else each)]
    kept: mx.array = mx.depends(shaped, parts)
    return kept


def _gemma2_query_only(layer: Any, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
    queries, keys, values, _ = gemma2.projected(layer, x, cache)
    return gemma2.joined(layer, _query_only(queries, keys, values, cache))


def _counted() -> tuple[patch_points.PatchPoint, ...]:
    return patch_points.models_sdpa(), patch_points.fast_sdpa(), patch_points.gemma2_attention()


class CallCounter:
    """Context manager that counts the attention calls that reach an implementation."""

    def __init__(self, name: str, *, training: bool = False) -> None:
        """Create it with the arguments of `replace_attention`."""
        self._name = name
        self._patch = None if name == ORIGINAL else _patch(name, training)
        self._own = 0
        self._inside = False
        self._before: Counter[str] = Counter()
        self._handed_before: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Start counting."""
        if self._patch:
            self._before, self._handed_before = self._patch.taken.copy(), self._patch.handed.copy()
        else:
            for place in _counted():
                place.add(observer=self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        if self._patch is None:
            for place in _counted():
                place.remove(observer=self._count)

    def _count(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Count a call of mlx-lm's function; the nested call of MLX's function does not count."""
        if self._inside:
            return call(*args, **named)
        self._own += 1
        self._inside = True
        try:
            return call(*args, **named)
        finally:
            self._inside = False

    def event(self, case: int, path: str | None = None) -> CallsCounted:
        """Return the counts as an event; `path` is the path of unpatched mlx-lm's calls."""
        if self._patch is None:
            return CallsCounted(
                case=case,
                implementation=self._name,
                replaced=self._own,
                passed_on=0,
                path=path if self._own else None,
            )
        taken, handed = self._patch.taken - self._before, self._patch.handed - self._handed_before
        return CallsCounted(
            case=case,
            implementation=self._name,
            replaced=taken.total(),
            passed_on=handed.total(),
            reason=next((reason for reason, _ in handed.most_common(1)), None),
            path=next((each for each, _ in taken.most_common(1)), None),
        )
