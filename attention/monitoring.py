"""Attention in a user's own program, watched: calls, shapes, paths, time and memory."""

import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import mlx.core as mx
import msgspec
from msgspec import Struct, field, structs

from attention import watching
from attention.arguments import checked_mask
from attention.device import Device, environment, probe
from attention.errors import UnsupportedError, UsageError
from attention.implementations import get
from attention.implementations.asked import asked_for
from attention.implementations.protocol import Implementation
from attention.masks import Mask
from attention.patch import seams
from attention.report import Case, Peaks, Report, Row, Run, Summary
from attention.route import Needs, Route
from attention.statistics import median_interval
from attention.workload import Workload

SHARE: Final = 0.01
"""Share of the program's time that watching may take, timed calls included, although their work had to be done."""
FIRST_S: Final = 0.001
"""What a kind of call is expected to cost that was never timed."""
MOST_SAMPLES: Final = 1000
_inside = threading.local()


class Kind(Struct):
    """All calls of one implementation on one kind of workload."""

    implementation: str
    workload: Workload
    route: Route | None
    calls: int = 0
    samples: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    peak_bytes: int | None = None


class Monitor:
    """Watches attention from enter to exit; a context manager.

    It sees `attention.attention`, calls that a patch takes, and `mx.fast.scaled_dot_product_attention`. A call inside
    another is part of it. Some calls are evaluated at once to be timed, within `SHARE` of the time that passes; calls
    that `mx.compile` traces are counted, once, and not timed. A timed call resets MLX's peak memory:
    `peak_bytes` keeps the highest.

    Attributes:
        peak_bytes: the highest peak of MLX's memory that was seen.
        spent_s: seconds that watching took, the work of timed calls included.
    """

    def __init__(self, share: float = SHARE) -> None:
        """Sets the share of the program's time that watching may take."""
        self.peak_bytes = 0
        self.spent_s = 0.0
        self._share = share
        self._kinds: dict[tuple[object, ...], Kind] = {}
        self._lock = threading.Lock()
        self._started, self._ended = time.perf_counter(), 0.0
        self._began = datetime.now().astimezone()
        self._device: Device = probe()

    def __enter__(self) -> Self:
        """Begins to watch."""
        self._started = time.perf_counter()
        watching.watchers.append(self._of_implementation)
        seams.fast().add(watcher=self._of_mlx)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        seams.fast().remove(watcher=self._of_mlx)
        watching.watchers.remove(self._of_implementation)
        self._ended = time.perf_counter()
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())

    @property
    def calls(self) -> int:
        """All calls seen."""
        return sum(kind.calls for kind in self._kinds.values())

    def report(self) -> Report:
        """What was seen, in the rows of `fatui bench`; without a reference there are no speedups."""
        kinds = list(self._kinds.values())
        workloads = dict.fromkeys(kind.workload for kind in kinds)
        cases = [Case(workload=one, rows=tuple(_row(k) for k in kinds if k.workload == one)) for one in workloads]
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
        """Writes the report as JSON; `fatui history add FILE` takes it in."""
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self.report()), indent=2))

    def summary(self) -> str:
        """What was seen, in lines: the most frequent first."""
        kinds = sorted(self._kinds.values(), key=lambda kind: -kind.calls)
        return "\n".join(_line(kind) for kind in kinds) or "no call of attention was seen"

    def _of_mlx(self, call: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, **more: Any) -> mx.array:
        if getattr(_inside, "watched", False):
            return call(q, k, v, **more)
        return self._watched("mlx", lambda: call(q, k, v, **more), (q, k, v), more.get("mask"))

    def _of_implementation(
        self, one: Implementation, q: mx.array, k: Any, v: Any, *, mask: Mask, **more: Any
    ) -> mx.array:
        if getattr(_inside, "watched", False):
            return one(q, k, v, mask=mask, **more)
        return self._watched(one, lambda: one(q, k, v, mask=mask, **more), (q, k, v), mask)

    def _watched(self, by: Any, call: Callable[[], mx.array], arrays: tuple[Any, ...], mask: Any) -> mx.array:
        """Counts a call, and times it where that is within the share."""
        began = time.perf_counter()
        _inside.watched = True  # asking for a route calls MLX's function too
        try:
            kind = self._kind(by, arrays, mask)
            cost = kind.samples[-1] if kind is not None and kind.samples else FIRST_S
            if kind is None or self.spent_s + cost > self._share * (began - self._started):
                self.spent_s += time.perf_counter() - began
                return call()
            return self._timed(kind, call, arrays)
        finally:
            _inside.watched = False

    def _timed(self, kind: Kind, call: Callable[[], mx.array], arrays: tuple[Any, ...]) -> mx.array:
        try:
            mx.eval([one for one in arrays if isinstance(one, mx.array)])
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
        self.spent_s += seconds
        if len(kind.samples) < MOST_SAMPLES:
            kind.samples.append(seconds)
        kind.peak_bytes = max(kind.peak_bytes or 0, mx.get_peak_memory() - before)
        return out

    def _kind(self, by: Any, arrays: tuple[Any, ...], mask: Any) -> Kind | None:
        """The kind that a call is of, counted; None for what is no attention that a workload can be."""
        q, k, v = arrays
        what = (
            (mask.causal, mask.window, mask.array is None)
            if isinstance(mask, Mask)
            else isinstance(mask, str) or mask is None or None
        )
        name = by if isinstance(by, str) else by.name
        key = (name, tuple(q.shape), tuple(k.shape), v.shape[-1], q.dtype, what, mask is None)
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._new_kind(by, name, arrays, mask)
                if kind is None:
                    return None
                self._kinds[key] = kind
            kind.calls += 1
        return kind

    def _new_kind(self, by: Any, name: str, arrays: tuple[Any, ...], mask: Any) -> Kind | None:
        q, k, v = arrays
        try:
            given = mask if isinstance(mask, Mask) else checked_mask(mask, None, q, k)
            workload, needs = asked_for(q, k, v, given, None)
        except (UsageError, UnsupportedError):
            return None
        if workload.seq == 1:
            workload = structs.replace(workload, pass_="decode")
        route = _route(get(by) if isinstance(by, str) else by, workload, self._device, needs)
        same = [one for one in self._kinds.values() if one.implementation == name and one.workload == workload]
        return same[0] if same else Kind(implementation=name, workload=workload, route=route)


def _route(one: Implementation, workload: Workload, device: Device, needs: Needs) -> Route | None:
    try:
        return one.route(workload, device, needs)
    except (RuntimeError, ValueError):
        return None


def _row(kind: Kind) -> Row:
    call = median_interval(kind.samples) if kind.samples else None
    route = kind.route
    told = f"; {route.reason}" if route else ""
    return Row(
        implementation=kind.implementation,
        status="ok",
        path=route.path if route else None,
        fused=route.fused if route else None,
        reason=f"{kind.calls:,} calls in a program, {len(kind.samples):,} of them timed{told}",
        tokens_per_second=kind.workload.tokens / call.median if call else None,
        call_s=call,
        flops_per_s=kind.workload.flops / call.median if call else None,
        peak_bytes=kind.peak_bytes,
        predicted_bytes=route.predicted_bytes if route else None,
        samples=tuple(kind.samples),
    )


def _line(kind: Kind) -> str:
    row = _row(kind)
    timed = f"{row.call_s.median * 1e3:.3f} ms" if row.call_s else "not timed"
    memory = f"{row.peak_bytes / 2**20:.1f} MiB" if row.peak_bytes is not None else "n/a"
    return f"{kind.implementation}  {kind.workload.label}  {row.path or '-'}  {kind.calls:,} calls  {timed}  {memory}"
