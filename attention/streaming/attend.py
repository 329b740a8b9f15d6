"""Attention of a stream's step over the slots: part by part through an implementation, or as one kernel of `poc`.

The kernel writes the step's keys and values in place, and attends to the slots as they lie. On a CPU it runs at once,
on the calling thread, and writes in place what nothing else refers to. On CUDA it is lazy: a step takes the output of
the step before as an argument, so that they are computed in order, and the slots are arrays that nothing but the steps
of one state refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import mlx.core as mx
from msgspec import Struct

from attention.core.bounded_dict import BoundedDict
from attention.core.errors import KernelUnavailable, UnsupportedError
from attention.core.forking import check_not_forked
from attention.core.kv_format import KVFormat
from attention.implementations.calls import call_hooks, call_through_hooks, current_backend, record_path, with_logsumexp
from attention.implementations.fused import Poc
from attention.implementations.protocol import Implementation, ReturnsLogsumexp
from attention.kernels import cpu
from attention.masks import Mask
from attention.measure.device import Backend
from attention.quantized_kv import KeyOrValue, arrays_of, quantized
from attention.streaming.rope import Rope
from attention.streaming.slots import Layout, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from attention.kernels.cuda.streaming.launch import StepPlan

ALL_SEEN: Final = Mask()
MIN_SUM: Final = 1e-37
"""Divides the zeros of rows that see nothing; the sum of other rows is at least 1."""
HALVES = (mx.bfloat16, mx.float16)
_PARTS: Final = ("streams", "few")
"""What a step needs of the CPU kernel, besides its dtype."""


class Part(Struct, frozen=True, eq=False):
    """Keys and values (B, Hkv, n, ·) in one place, the query (B, H, Lq, D) rotated for them, and what it sees."""

    q: mx.array
    k: KeyOrValue
    v: KeyOrValue
    mask: Mask = ALL_SEEN


class Settings(Struct, frozen=True, eq=False):
    """What all parts of a call have in common."""

    implementation: Implementation
    scale: float
    softcap: float | None = None
    sinks: mx.array | None = None
    """(H,): one more logit of each head's softmax, without a value."""


def attend_parts(parts: Sequence[Part], settings: Settings) -> mx.array:
    """Return attention (B, H, Lq, Dv) over the keys of all parts together.

    Raises:
        UnsupportedError: there is more than one softmax to join, and the implementation returns no logsumexp.
    """
    named: dict[str, Any] = {"scale": settings.scale, "softcap": settings.softcap}
    chosen: Any = settings.implementation
    if len(parts) == 1 and settings.sinks is None:
        (part,) = parts
        alone: mx.array = call_through_hooks(chosen, part.q, part.k, part.v, mask=part.mask, **named)
        return alone
    if not isinstance(chosen, ReturnsLogsumexp):
        raise UnsupportedError(f"{chosen.name}: it does not return the logsumexp; practical does")
    called = with_logsumexp(chosen)
    found = [call_through_hooks(called, part.q, part.k, part.v, mask=part.mask, **named) for part in parts]
    return _joined([out for out, _ in found], [lse for _, lse in found], settings.sinks)


def _joined(outputs: Sequence[mx.array], logsumexps: Sequence[mx.array], sinks: mx.array | None) -> mx.array:
    """Return the outputs (B, H, Lq, Dv) weighted by the sums of their exponentials; rows that see nothing are 0."""
    if sinks is not None:
        logsumexps = [*logsumexps, mx.broadcast_to(sinks.astype(mx.float32)[:, None], logsumexps[0].shape)]
    top = logsumexps[0]
    for lse in logsumexps[1:]:
        top = mx.maximum(top, lse)
    base = mx.where(mx.isfinite(top), top, 0)
    weights = [mx.exp(lse - base) for lse in logsumexps]
    total = mx.maximum(sum(weights[1:], weights[0]), MIN_SUM)
    made = sum(
        (out.astype(mx.float32) * (weight / total)[..., None] for out, weight in zip(outputs, weights, strict=False)),
        mx.zeros(1),
    )
    return made.astype(outputs[0].dtype)


CPU_PATH: Final = "CPU kernel, step of a stream"
CUDA_PATH: Final = "CUDA kernels, step of a stream"


class Token(Struct, frozen=True, eq=False):
    """The arguments of a step."""

    q: mx.array
    k: mx.array
    v: mx.array
    scale: float
    softcap: float | None
    rotated: bool
    given: tuple[object, object, bool, object] | None = None
    """Scale, softcap, `rotated` and implementation of the call; None if the next one is not compared with it."""


class Step:
    """The steps of a state whose heads are all streaming.

    Attributes:
        latest: the output of the latest step on CUDA, until something else has waited for it.
        again: makes the steps after the latest that are like it; None if there is none, or for other kinds.
    """

    def __init__(self, layout: Layout, formats: KVFormat | None, rope: Rope | None) -> None:
        self._layout, self._formats, self._rope = layout, formats, rope
        self._options = cpu.stream_options(formats, layout.first, layout.window, layout.ring)
        self._radians = None if rope is None else rope.radians()
        self._plans = BoundedDict[tuple[object, ...], "StepPlan | None"]()
        self.latest: mx.array | None = None
        self.again: Callable[..., mx.array | None] | None = None

    def backend_for(self, implementation: str | Implementation) -> Backend | None:
        """Return the backend whose kernel computes steps with an implementation: `poc`, unless calls are watched."""
        named = implementation == "poc" or (isinstance(implementation, Poc) and implementation.variant is None)
        if call_hooks or not named:
            return None
        backend = current_backend()
        if backend == "cpu":
            return backend if _loads() or cpu.is_loaded(_PARTS) else None
        return backend if backend == "cuda" else None

    def settle(self) -> None:
        """Evaluate the steps of CUDA, before anything else uses the slots; steps are not repeated after it."""
        self.again = None
        if self.latest is not None:
            mx.eval(self.latest)
            self.latest = None

    def on_cpu(self, token: Token, slots: list[mx.array], rows: list[tuple[int, int]]) -> mx.array:
        """Write one token into slots, and attend with its query; slots are replaced where they had to be copied.

        Raises:
            ValueError: shapes or dtypes do not fit.
            KernelUnavailable: the kernel does not run here.
        """
        check_not_forked()
        self.settle()
        if self._radians is not None:
            mx.eval(self._radians)
        named: dict[str, Any] = {
            "softcap": token.softcap,
            "radians": self._radians,
            "adjacent": self._rope is not None and self._rope.traditional,
            "rotated": token.rotated,
        }
        new = (token.q, token.k, token.v)
        out = cpu.stream_step(*new, slots, self._options, rows, token.scale, **named)
        seen, oldest = rows[0]
        full = seen >= self._layout.slots and oldest == seen - self._layout.ring
        if token.given is not None and full and all(row == rows[0] for row in rows):
            self.again = cpu.stream_steps(*new, slots, self._options, seen + 1, token.scale, token.given, **named)
        record_path(CPU_PATH)
        return out

    def on_cuda(
        self, token: Token, slots: list[mx.array], row: Row, fits: Callable[[mx.array, mx.array, mx.array], bool]
    ) -> mx.array | None:
        """Return the output of a step over a full ring, lazily; None if no kernel computes it.

        The slots become arrays of their own when the first of several steps takes them. `fits` says whether q, k and v
        fit what is kept.
        """
        layout = self._layout
        first, ring = layout.first, layout.ring
        before = first + ring
        q, k, v = token.q, token.k, token.v
        if row.seen < before or row.oldest != row.seen - ring or layout.spare:
            return None
        key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, token.scale, token.softcap)
        made = self._plans.get(key)
        if made is None and key not in self._plans:
            made = self._plans[key] = self._cuda_plan(token) if fits(q, k, v) else None
        if made is None:
            return None
        check_not_forked()
        slot = first + (row.seen - first) % ring
        new = [k, v]
        if self._formats is not None and not made.quantizes:
            if self._rope is not None and not token.rotated:
                k = self._rope.consecutive(k, slot)
            new = arrays_of(quantized(k, self._formats.key), quantized(v, self._formats.value))
        if self.latest is None:
            slots[:] = [mx.contiguous(array + 0) for array in slots]
            mx.eval(slots)
        at = slot if token.rotated else 0
        radians = [] if self._radians is None else [self._radians]
        arrays = [q, *new, *slots, *radians, k if self.latest is None else self.latest]
        positions = (slot - at, slot + ring - at, first + layout.window - 1 - at)
        out: mx.array = made(arrays, [slot, *positions, first, slot + 1, slot + 1, before, 0, first])
        self.latest, self.again = out, None
        if token.given is not None and len(new) == 2:
            ring_numbers = (first, layout.window, ring)
            self.again = made.repeated([q, *new], [*slots, *radians], out, ring_numbers, row.seen + 1, token.given)
        record_path(CUDA_PATH)
        return out

    def repeat(
        self, q: mx.array, k: mx.array, v: mx.array, given: tuple[object, object, bool, object]
    ) -> mx.array | None:
        """Return the output of a step that is like the one before; None if it is not."""
        if self.again is None or call_hooks:
            return None
        check_not_forked()
        try:
            out = self.again(q, k, v, *given)
            if out is None and self.latest is None:  # a CPU computes at once
                mx.eval(q, k, v)
                out = self.again(q, k, v, *given)
        except (TypeError, ValueError):  # the general way says what is wrong
            return None
        except Exception:
            self.again = None
            raise
        if out is None:
            return None
        if self.latest is None:
            record_path(CPU_PATH)
        else:
            self.latest = out
            record_path(CUDA_PATH)
        return out

    def _cuda_plan(self, token: Token) -> StepPlan | None:
        """Return the plan of steps like one; None if there is none."""
        from attention.kernels.cuda.streaming import launch

        q, k, v, rope = token.q, token.k, token.v, self._rope
        if q.dtype not in HALVES or k.shape[3] != v.shape[3]:
            return None
        dims, adjacent = (0, False) if rope is None else (rope.dims, rope.traditional)
        slots = self._layout.slots
        kind = launch.kind_of(q, slots, k.shape[1], token.scale, token.softcap, dims, adjacent, self._formats)
        try:
            return launch.plan(kind)
        except KernelUnavailable:
            return None


def needs_building() -> bool:
    """Return whether the first step would have to compile the kernel that computes steps; quick."""
    return current_backend() == "cpu" and cpu.availability(_PARTS)[0] and not cpu.is_compiled(_PARTS)


def build(on_message: Callable[[str], None]) -> None:
    """Compile the kernel that computes steps; if that fails, they are computed part by part."""
    with suppress(KernelUnavailable):
        cpu.load(on_message, _PARTS)


@cache
def _loads() -> bool:
    try:
        cpu.load(parts=_PARTS)
    except KernelUnavailable:
        return False
    return True
