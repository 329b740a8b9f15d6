"""Monitor attention in a user's own program: calls, shapes, paths, time and memory."""

import random
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import mlx.core as mx
import msgspec
from msgspec import Struct, field, structs

from attention.arguments import check_mask
from attention.core.errors import UnsupportedError, UsageError
from attention.core.files import checked_path, write_whole
from attention.core.numbers import is_number, shown_value
from attention.core.results import Case, Peaks, Report, Row, Run, Summary, sealed
from attention.core.route import Needs, Route
from attention.core.statistics import median_interval
from attention.core.workload import Workload
from attention.implementations import load_implementation
from attention.implementations.calls import call_hooks, call_signature
from attention.implementations.protocol import Implementation
from attention.masks import Mask
from attention.measure.device import Device, environment, probe
from attention.measure.rounds import Clock
from attention.monitoring import patch_points
from attention.monitoring.patch_points import call_cost_s
from attention.quantized_kv import QuantizedArray, arrays_of, kv_format_of

BUDGET_PART: Final = 0.375
"""Part of the share for counting calls (uncounted ones included), and as much again for timing.

The rest is a reserve for indirect costs: cold caches and extra synchronisation.
"""
MIN_COUNTING_PART: Final = 0.25
"""Minimum share of the counting part that remains for counted calls, whatever uncounted ones cost."""
MAX_STRIDE: Final = 1 << 12
MAX_GAP: Final = 64
"""Counted calls between two decisions whether one may be timed."""


class SamplingBudget:
    """Decide which calls are counted (every one, unless they come too fast) and which are timed.

    Attributes:
        stride: one in this many calls is counted, on average.
        sampled: number of calls counted.
        spent_s: seconds that timed calls took, their own work included.
    """

    def __init__(self, share: float, sample_s: float, skip_s: float = 0.0, clock: Clock = time.perf_counter) -> None:
        """Start now.

        Args:
            share: share of elapsed time that monitoring may take.
            sample_s: seconds of overhead of a counted call.
            skip_s: seconds of overhead of an uncounted call.
            clock: in seconds.
        """
        self.stride = 1
        self.spent_s = 0.0
        self.sampled = 0
        self._share, self._sample_s, self._skip_s, self._clock = share, sample_s, skip_s, clock
        self._began = self._latest = clock()
        self._sampled_then = 0
        self._draw = random.Random(0)

    def next_sample(self) -> int:
        """Count a call; return the distance to the next one to count, drawn so as not to hit the same layer."""
        self.sampled += 1
        return 1 if self.stride == 1 else self._draw.randint(1, 2 * self.stride - 1)

    def may_time(self, cost_s: float) -> bool:
        """Return whether a call of about `call_cost_s` seconds may be timed now; adapts the stride."""
        now = self._clock()
        self._adapt(now)
        return self.spent_s + cost_s <= BUDGET_PART * self._share * (now - self._began)

    @property
    def overhead_s(self) -> float:
        """Seconds spent on monitoring, the work of timed calls included."""
        return self.spent_s + self.sampled * self._sample_s

    def _adapt(self, now: float) -> None:
        """Choose the stride from the rate of calls since the last time."""
        counted, passed = self.sampled - self._sampled_then, now - self._latest
        if counted < MAX_GAP or passed <= 0:
            return
        call_s = passed / (counted * self.stride)
        needed = self._sample_s / self._counting_budget_s(call_s) if self._share else MAX_STRIDE
        self.stride = 1
        while self.stride < min(needed, MAX_STRIDE):
            self.stride *= 2
        self._latest, self._sampled_then = now, self.sampled

    def _counting_budget_s(self, call_s: float) -> float:
        """Return the seconds per call that counting may take; uncounted calls alone may exceed it."""
        part = BUDGET_PART * self._share * call_s
        return part if self._skip_s > part else max(part - self._skip_s, MIN_COUNTING_PART * part)


class CallStream:
    """One stream of calls, of which some are counted.

    Attributes:
        seen: number of calls so far.
        next_sample: number of the next call to count.
    """

    def __init__(self) -> None:
        """Start with no calls; the first one will be counted."""
        self.seen = self.next_sample = self._last_sample = 0

    def take_sample(self, budget: SamplingBudget) -> int:
        """Return how many calls the counted call represents (those since the last), and choose the next one."""
        passed, self._last_sample = self.seen - self._last_sample, self.seen
        self.next_sample = self.seen + budget.next_sample()
        return passed


class CallKind(Struct):
    """All calls of one implementation on one workload."""

    implementation: str
    workload: Workload
    query_route: Callable[[], Route | None]
    """Returns the route; evaluated only for the rows: per call it would exceed the overhead allowed."""
    calls: int = 0
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    next_check: int = 1
    """Number of the call at which timing is considered again."""
    gap: int = 1

    def schedule_check(self, timed: bool, stride: int) -> None:
        """Set when timing is considered next: soon after a timed call, with exponential back-off otherwise."""
        self.gap = 1 if timed else min(2 * self.gap, MAX_GAP)
        self.next_check = self.calls + self.gap * stride

    def row(self, estimated: bool) -> Row:
        """Return a result row as a benchmark has it; the number of calls may be an estimate."""
        call = median_interval(self.samples) if self.samples else None
        route = self.query_route()
        route_reason = f"; {route.reason}" if route else ""
        return Row(
            implementation=self.implementation,
            status="ok",
            path=route.path if route else None,
            fused=route.fused if route else None,
            reason=f"{self._counted(estimated)} in a program, {len(self.samples):,} of them timed{route_reason}",
            tokens_per_second=self.workload.tokens / call.median if call else None,
            call_s=call,
            flops_per_s=self.workload.flops / call.median if call else None,
            peak_bytes=self.peak_bytes,
            predicted_bytes=route.predicted_bytes if route else None,
            samples=tuple(self.samples),
        )

    def line(self, estimated: bool) -> str:
        """Return the row as one line of text."""
        row = self.row(estimated)
        timed = f"{row.call_s.median * 1e3:.3f} ms" if row.call_s else "not timed"
        memory = f"{row.peak_bytes / 2**20:.1f} MiB" if row.peak_bytes is not None else "n/a"
        counted = self._counted(estimated)
        return f"{self.implementation}  {self.workload.label}  {row.path or '-'}  {counted}  {timed}  {memory}"

    def _counted(self, estimated: bool) -> str:
        return f"{'about ' if estimated else ''}{self.calls:,} calls"


SHARE: Final = 0.01
"""Share of the program's time that monitoring may take, timed calls with their own work included."""
INITIAL_COST_S: Final = 0.001
"""Assumed seconds of a kind of call that was never timed."""
MAX_SAMPLES: Final = 1000


class _ThreadState(threading.local):
    """Whether this thread is inside a monitored call: nested calls are part of it."""

    in_call = False


_thread = _ThreadState()


class Monitor:
    """Context manager that monitors attention.

    It covers `attention.attention`, calls through a patch, and `mx.fast.scaled_dot_product_attention`. A nested call
    is part of the outer one. Some calls are evaluated at once to be timed, within `SHARE` of elapsed time; calls traced
    by `mx.compile` are counted once and not timed. If calls come so fast that counting each would cost more than that
    (more than about three per millisecond), only a sample is counted, and each counted call represents those since the
    last; an uncounted call costs some tenths of a microsecond. Timing a call resets MLX's peak memory; `peak_bytes`
    keeps the highest value.

    Attributes:
        peak_bytes: the highest peak of MLX's memory seen.
    """

    def __init__(self, share: float = SHARE) -> None:
        """Set the share of the program's time that monitoring may take; with 0 calls are counted and not timed.

        Raises:
            UsageError: it is no number from 0 on.
        """
        if not is_number(share) or not share >= 0:
            raise UsageError(f"share: got {shown_value(share)}; it takes a number from 0")
        self.peak_bytes = 0
        self._share = share
        self._kinds: dict[tuple[object, ...], CallKind | None] = {}
        self._seen: dict[tuple[str, Workload], CallKind] = {}
        self._budget = SamplingBudget(share, 0.0)
        self._mlx_calls, self._implementation_calls = CallStream(), CallStream()
        self._estimated = False
        self._started, self._ended = time.perf_counter(), 0.0
        self._began = datetime.now().astimezone()
        self._device: Device = probe()

    def __enter__(self) -> Self:
        """Start monitoring."""
        self._budget = SamplingBudget(self._share, self._sample_cost_s(), patch_points.PatchPoint.skip_cost_s())
        self._started = time.perf_counter()
        call_hooks.append(self._on_implementation_call)
        patch_points.fast_sdpa().add(observer=self._on_mlx_call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop monitoring."""
        patch_points.fast_sdpa().remove(observer=self._on_mlx_call)
        call_hooks.remove(self._on_implementation_call)
        self._ended = time.perf_counter()
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())

    @property
    def calls(self) -> int:
        """Number of calls; an estimate if they came too fast to count each."""
        return sum(kind.calls for kind in self._seen.values())

    @property
    def spent_s(self) -> float:
        """Seconds spent on monitoring, the work of timed calls included."""
        return self._budget.overhead_s

    def report(self) -> Report:
        """Return the statistics as a report with the rows of a benchmark; without a reference there are no speedups."""
        kinds = [*self._seen.values()]
        workloads = dict.fromkeys(kind.workload for kind in kinds)
        rows = [(kind.workload, kind.row(self._estimated)) for kind in kinds]
        cases = [Case(workload=one, rows=tuple(row for of, row in rows if of == one)) for one in workloads]
        names = dict.fromkeys(kind.implementation for kind in kinds)
        seconds = (self._ended or time.perf_counter()) - self._started
        return Report(
            run=Run(
                id=uuid.uuid4().hex[:8],
                started=self._began.isoformat(timespec="seconds"),
                seconds=seconds,
                command="attention.monitor()",
                preset="monitor",
            ),
            environment=environment(self._device),
            peaks=Peaks(),
            cases=tuple(cases),
            summary=tuple(Summary(implementation=name, cases=0) for name in names),
        )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, in the format of a benchmark's result file; as a whole or not at all.

        Raises:
            UsageError: the path is none.
            OSError: it cannot be written.
        """
        write_whole(checked_path(path), msgspec.json.format(sealed(self.report()), indent=2))

    def summary(self) -> str:
        """Return the statistics as lines of text, the most frequent call first."""
        kinds = sorted(self._seen.values(), key=lambda kind: -kind.calls)
        return "\n".join(kind.line(self._estimated) for kind in kinds) or "no call of attention was seen"

    def _on_mlx_call(self, call: Callable[..., mx.array], *arrays: mx.array, **more: Any) -> mx.array:
        stream = self._mlx_calls
        stream.seen += 1
        if stream.seen < stream.next_sample:
            return call(*arrays, **more)
        return self._sample_mlx_call(call, *arrays, **more)

    def _sample_mlx_call(self, call: Callable[..., mx.array], q: mx.array, k: Any, v: Any, **more: Any) -> mx.array:
        stream = self._mlx_calls
        passed = stream.take_sample(self._budget)
        stream.seen += patch_points.fast_sdpa().skip_calls(stream.next_sample - stream.seen - 1)
        if _thread.in_call:  # part of another call, as are on average those that it represents
            return call(q, k, v, **more)
        mask = more.get("mask")
        form = "array" if isinstance(mask, mx.array) else mask
        kind = self._count_calls("mlx", ("mlx", q.shape, k.shape, v.shape, q.dtype, form), passed, q, k, v, mask)
        if kind is None:
            return call(q, k, v, **more)
        return self._timed_call(kind, lambda: call(q, k, v, **more), (q, k, v))

    def _on_implementation_call(
        self, one: Implementation, q: mx.array, k: Any, v: Any, *, mask: Mask, **more: Any
    ) -> mx.array:
        if _thread.in_call:
            return one(q, k, v, mask=mask, **more)
        _thread.in_call = True
        try:
            stream = self._implementation_calls
            stream.seen += 1
            if stream.seen < stream.next_sample:
                return one(q, k, v, mask=mask, **more)
            key = (
                one.name,
                q.shape,
                k.shape,
                v.shape,
                q.dtype,
                kv_format_of(k, v),
                mask.causal,
                mask.window,
                mask.array is None,
                mask.pattern,
                mask.alibi is None,
            )
            kind = self._count_calls(one, key, stream.take_sample(self._budget), q, k, v, mask)
            if kind is None:
                return one(q, k, v, mask=mask, **more)
            return self._timed_call(kind, lambda: one(q, k, v, mask=mask, **more), (q, k, v))
        finally:
            _thread.in_call = False

    def _count_calls(
        self, by: Any, key: tuple[object, ...], passed: int, q: mx.array, k: Any, v: Any, mask: Any
    ) -> CallKind | None:
        """Count the calls that this one represents; return their kind if this one may be timed."""
        try:
            kind = self._kinds[key]
        except KeyError:
            kind = self._kinds[key] = self._new_kind(by, key, q, k, v, mask)
        if kind is None:
            return None
        kind.calls += passed
        if kind.calls < kind.next_check:
            return None
        budget = self._budget
        timed = budget.may_time(kind.samples[-1] if kind.samples else INITIAL_COST_S)
        self._estimated |= budget.stride > 1
        kind.schedule_check(timed, budget.stride)
        return kind if timed else None

    def _sample_cost_s(self) -> float:
        """Measure the seconds of overhead of a counted call."""
        scratch, array = Monitor(self._share), mx.zeros((1, 1, 1, 1))
        key = ("mlx", array.shape, array.shape, array.shape, array.dtype, None)
        scratch._kinds[key] = CallKind(
            implementation="mlx", workload=Workload(seq=1), query_route=lambda: None, next_check=1 << 60
        )
        observed = partial(scratch._on_mlx_call, lambda q, k, v, **more: q)

        def call(*arrays: mx.array, **more: Any) -> mx.array:  # as a patch point does
            return observed(*arrays, **more)

        return call_cost_s(call, array)

    def _timed_call(self, kind: CallKind, call: Callable[[], mx.array], arrays: tuple[Any, ...]) -> mx.array:
        try:
            mx.eval(arrays_of(*(one for one in arrays if isinstance(one, mx.array | QuantizedArray))))
            mx.synchronize()
        except (RuntimeError, ValueError):
            return call()  # traced: there is nothing to evaluate
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        out = call()
        mx.eval(out)
        mx.synchronize()
        seconds = time.perf_counter() - started
        self._budget.spent_s += seconds
        if len(kind.samples) < MAX_SAMPLES:
            kind.samples.append(seconds)
        kind.peak_bytes = max(kind.peak_bytes or 0, mx.get_peak_memory() - before)
        return out

    def _new_kind(self, by: Any, key: tuple[object, ...], q: mx.array, k: Any, v: Any, mask: Any) -> CallKind | None:
        """Return the kind of a new call; None if its arguments do not form a workload."""
        name = str(key[0])
        try:
            given = mask if isinstance(mask, Mask) else check_mask(mask, None, q, k)
            workload, needs = call_signature(q, k, v, given, None)
        except (UsageError, UnsupportedError):
            return None
        if workload.seq == 1:
            workload = structs.replace(workload, pass_="decode")
        kind = self._seen.get((name, workload))  # several forms of a mask may be one
        if kind is None:
            query_route = partial(_route, by, workload, self._device, needs)
            kind = self._seen[name, workload] = CallKind(
                implementation=name, workload=workload, query_route=query_route
            )
        return kind


def _route(by: str | Implementation, workload: Workload, device: Device, needs: Needs) -> Route | None:
    before, _thread.in_call = _thread.in_call, True  # computing a route calls MLX's function too
    try:
        return (load_implementation(by) if isinstance(by, str) else by).route(workload, device, needs)
    except (RuntimeError, ValueError):
        return None
    finally:
        _thread.in_call = before
