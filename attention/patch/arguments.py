"""Translation of mlx-lm's attention calls into arguments of an implementation."""

from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
from msgspec import Struct, structs

from attention.arguments import checked_mask, checked_shapes
from attention.device import probe
from attention.errors import UnsupportedError, UsageError
from attention.implementations.asked import asked_for
from attention.implementations.packed import Packed
from attention.implementations.protocol import Implementation
from attention.masks import Mask

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
