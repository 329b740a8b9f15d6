"""Benchmark a stream of tokens: time and memory of each one, beside full attention at growing lengths of its cache."""

import gc
import os
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import structs

from attention import implementations
from attention.core import events as on
from attention.core.plan import StreamPlan
from attention.core.route import validated_route
from attention.core.stream import FULL, MAX_BLOCKS, STREAMING, Stream, StreamBlock, bin_of, block_of
from attention.core.workload import Workload
from attention.engine.case_runner import CaseRunner
from attention.engine.peaks import measure_peaks
from attention.engine.progress import EMIT_INTERVAL_S
from attention.implementations.calls import take_path
from attention.implementations.protocol import build
from attention.measure.device import Device, environment, probe
from attention.measure.rounds import gc_disabled

if TYPE_CHECKING:
    import mlx.core as mx

ATTENDS: Final = "poc"
"""The implementation that attends in every row."""
POOL: Final = 64
"""Different tokens of a stream without a model, given in turn."""
MIN_LENGTH: Final = 256
"""The shortest cache at which full attention is measured."""
LENGTHS_PER_DOUBLING: Final = 2
MIN_CALLS: Final = 5
LENGTH_S: Final = 0.3
"""Seconds for the calls at one length of the cache."""
MAX_CALL_S: Final = 0.5
"""Longer lengths, whose calls would take more, are extrapolated."""
MAX_CACHE_BYTES: Final = {"cpu": 2**30, "metal": 2**32, "cuda": 2**34}
"""The largest cache that full attention is measured at."""
CACHE_SHARE: Final = 0.25
"""The largest share of the free memory that it may take."""
BARE_S: Final = 2.0
"""Seconds at most of a loop that does nothing, as long a step as a token's."""
BOUND_S: Final = 0.2
"""Seconds for measuring how fast the window's bytes can be read."""


class StreamBench(CaseRunner[StreamPlan]):
    """The part of a run over a stream that one worker executes; subclasses define the rows."""

    def _load_implementations(self) -> None:
        implementations.load_implementation(ATTENDS)

    def _prepare_all(self, device: Device) -> None:
        self._device = device
        self._peaks = self._assignment.peaks
        if self._peaks is None:
            self._progress.emit_progress("measuring peak rates", 0.0)
            self._peaks = measure_peaks(device)
            self._progress.emit(on.PeaksMeasured(peaks=self._peaks))
        self._limit = self._plan.memory_limit_bytes or device.available_bytes

    def measure_cost(self) -> None:
        """Estimate the time of each row from a timed call, and report from where full attention is extrapolated.

        What has to be compiled first is not timed.
        """
        self._device = device = probe()
        self._load_implementations()
        self._progress.emit(on.RunStarted(environment=environment(device)))
        self._limit = self._plan.memory_limit_bytes or device.available_bytes
        work, names = self._plan.cases[0], self._plan.ordered
        self._progress.begin_case(0)
        longest = self._longest(work)
        if FULL in names and longest < work.tokens:
            where = f"beyond token {longest:,} its keys and values are too large, and its figures are extrapolated"
            self._progress.end_row(FULL, "refused", where)
        self._emit_estimate(0, names)
        self._progress.end_case("cost")
        self._progress.emit(on.RunDone())

    def _emit_estimate(self, case: int, names: Sequence[str]) -> None:
        """Emit how long rows take, judging by timed calls, unless these would have to be compiled first."""
        work = self._plan.cases[case]
        if not self._needs_building(ATTENDS, work.workload, self._device):
            seconds = sum(min(self._plan.seconds, each) for each in self._rows_s(names, work))
            self._progress.emit(on.CaseTimeEstimated(case=case, seconds=seconds, implementations=len(names)))

    @abstractmethod
    def _longest(self, work: Stream) -> int:
        """Return the number of tokens whose keys and values full attention may keep."""

    @abstractmethod
    def _rows_s(self, names: Sequence[str], work: Stream) -> list[float]:
        """Estimate the seconds of each row, if they were not limited, from timed calls."""

    def _run_case(self, case: int) -> str:
        work = self._plan.cases[case]
        names = list(self._assignment.remaining(case))
        if self._make_shared(names, lambda: self._prepare(work)) is None:
            return "failed"
        if len(names) == len(self._plan.ordered):
            try:
                self._emit_estimate(case, names)
            except Exception as error:
                self._progress.log(f"the time could not be estimated: {error}")
        complete = True
        for index, name in enumerate(names):
            self._rows_after = len(names) - index - 1
            self._progress.mark_running(name)
            self._progress.emit(on.StepStarted(case=case, implementation=name, step="stream"))
            try:
                complete = self._measure(name, work) and complete
            except Exception as error:
                self._fail(name, error)
        return "iterations" if complete else "time"

    @abstractmethod
    def _prepare(self, work: Stream) -> object:
        """Make what all rows share; return anything but None."""

    @abstractmethod
    def _measure(self, name: str, work: Stream) -> bool:
        """Measure one row; return whether it came to the end of the stream, or as far as it was meant to."""

    def _emit_route(self, name: str, workload: Workload) -> None:
        """Emit the path of the attention calls of a row, and compile it if that is still to be done."""
        from attention.streaming import attend

        device, case = probe(), self._progress.case
        implementation = implementations.load_implementation(ATTENDS)
        if self._needs_building(ATTENDS, workload, device) or attend.needs_building():
            self._progress.emit(on.StepStarted(case=case, implementation=name, step="build"))
            self._progress.emit_progress(f"compiling {ATTENDS}, once", 0.0)
            build(implementation, workload, self._progress.log)
            attend.build(self._progress.log)
            self._progress.emit(on.StepStarted(case=case, implementation=name, step="stream"))
        self._predicted = validated_route(implementation.route(workload, device))
        self._progress.emit(on.RouteFound(case=case, implementation=name, route=self._predicted))

    def _emit_taken_path(self, name: str) -> None:
        """Emit the path that the latest call recorded, if it is not the one that was expected."""
        path = take_path()
        if path is not None and path != self._predicted.path:
            self._predicted = structs.replace(self._predicted, path=path, reason="as the calls recorded it")
            self._progress.emit(on.RouteFound(case=self._progress.case, implementation=name, route=self._predicted))

    def _blocks(self, name: str) -> "BlockStream":
        return BlockStream(self._progress.case, name, self._progress.emit)

    def _steps(
        self,
        name: str,
        work: Stream,
        step: Callable[[int], float | None],
        *,
        may_continue: Callable[[int], bool] = lambda position: True,
    ) -> bool:
        """Give a stream's tokens to a row, chunk by chunk, and emit its blocks.

        A block ends after its tokens, or after its share of the time limit.

        Args:
            name: the row.
            work: the stream.
            step: gives the tokens from a position on, evaluates the result, and returns the mean loss if it has one.
            may_continue: whether to continue from a position; called between blocks.

        Returns:
            Whether all tokens were given.
        """
        stream = self._blocks(name)
        began = time.perf_counter()
        position, block_end = 0, work.block_tokens
        block_s = self._plan.seconds / MAX_BLOCKS
        with without_collection():
            while position < work.tokens:
                chunk = min(work.chunk, work.tokens - position)
                started = time.perf_counter()
                loss = step(position)
                now = time.perf_counter()
                stream.add((now - started) / chunk, loss, chunk)
                position += chunk
                up = now - began > self._plan.seconds
                if position >= block_end or position == work.tokens or up or now - stream.began >= block_s:
                    block_end = position + work.block_tokens - position % work.block_tokens
                    stream.close_block(position)
                    self._emit_taken_path(name)
                    up = up or not may_continue(position)
                if stream.due:
                    stream.flush()
                    left_s = self._left_s(now - began, position / work.tokens)
                    self._progress.emit_progress(f"{name}: token {position:,} of {work.tokens:,}", left_s)
                if up and position < work.tokens:
                    stream.flush()
                    done = f"{position:,} of {work.tokens:,} tokens, after {now - began:.0f} s"
                    self._progress.log(f"{name}: ended at {done}")
                    return False
        stream.flush()
        if name == STREAMING:
            self._measure_bare_loop(stream.typical_s, -(-work.tokens // work.chunk))
        return True

    def _left_s(self, elapsed_s: float, done: float) -> float:
        """Estimate the seconds left of all rows: of this one by its pace, of each later one as long as this one."""
        row_s = min(elapsed_s / done, self._plan.seconds)
        return max(0.0, row_s - elapsed_s) + self._rows_after * row_s

    def _emit_bound(self, size: int) -> None:
        """Emit how fast the bytes that a token needs can be read."""
        rate = self._peaks.copy_bytes_per_s if self._peaks else None
        seconds = read_time_s(size, self._device, rate)
        if seconds:
            self._progress.emit(on.BoundMeasured(case=self._progress.case, implementation=STREAMING, seconds=seconds))

    def _measure_bare_loop(self, token_s: float, steps: int) -> None:
        """Emit the times of a loop that waits for as long as a token takes, to show what the system interrupts."""
        times: list[float] = []
        with without_collection():
            began = time.perf_counter()
            while len(times) < steps and time.perf_counter() - began < BARE_S:
                started = time.perf_counter()
                while (elapsed := time.perf_counter() - started) < token_s:
                    pass
                times.append(elapsed)
        bins = dict(Counter(map(bin_of, times)))
        self._progress.emit(on.BareLoopMeasured(case=self._progress.case, implementation=STREAMING, bins=bins))


class BlockStream:
    """The blocks of a row: collected step by step, emitted a few times a second.

    Attributes:
        began: clock reading at the beginning of the block.
        typical_s: median time of a token in the latest block.
    """

    def __init__(self, case: int, name: str, emit: Callable[[on.AnyEvent], None]) -> None:
        self._case, self._name, self._emit = case, name, emit
        self._times: list[float] = []
        self._loss, self._losses = 0.0, 0
        self._blocks: list[StreamBlock] = []
        self._emitted = self.began = time.perf_counter()
        self.typical_s = 0.0

    def add(self, seconds: float, loss: float | None, tokens: int) -> None:
        """Add a step: seconds per token, mean loss, and number of tokens."""
        self._times.append(seconds)
        if loss is not None:
            self._loss += loss * tokens
            self._losses += tokens

    def close_block(self, end: int) -> None:
        """Complete the block that ends at a position."""
        import mlx.core as mx

        self._blocks.append(
            block_of(
                end,
                self._times,
                resident_bytes=resident_bytes(),
                device_bytes=mx.get_active_memory(),
                loss=self._loss / self._losses if self._losses else None,
                losses=self._losses,
            )
        )
        self.typical_s = self._blocks[-1].seconds
        self._times, self._loss, self._losses = [], 0.0, 0
        self.began = time.perf_counter()

    @property
    def due(self) -> bool:
        """Whether blocks are to be emitted now."""
        return time.perf_counter() - self._emitted >= EMIT_INTERVAL_S

    def flush(self) -> None:
        """Emit the complete blocks."""
        if self._blocks:
            self._emit(on.StreamAdvanced(case=self._case, implementation=self._name, blocks=self._blocks))
        self._blocks, self._emitted = [], time.perf_counter()


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect garbage before the context and not in it: the pauses would be a token's."""
    gc.collect()
    with gc_disabled():
        yield


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import psutil

        return int(psutil.Process().memory_info().rss)


def read_time_s(size: int, device: Device, copy_bytes_per_s: float | None) -> float | None:
    """Return the seconds in which so many bytes can be read.

    On a CPU it is the fastest of many scalar products of a buffer of that size with itself, in the caches that hold it;
    on a GPU the bytes over the rate of the best copy.
    """
    if device.backend != "cpu":
        return size / copy_bytes_per_s if copy_bytes_per_s else None
    buffer = np.random.default_rng(0).standard_normal(max(1, size // 4), dtype=np.float32)
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < BOUND_S:
        started = time.perf_counter()
        np.dot(buffer, buffer)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def full_lengths(tokens: int) -> list[int]:
    """Return the lengths of the cache at which full attention is measured, if they fit: each half as long again."""
    lengths, length = [], float(min(MIN_LENGTH, tokens))
    while length < tokens:
        lengths.append(int(length))
        length *= 2 ** (1 / LENGTHS_PER_DOUBLING)
    return [*lengths, tokens]


class AttentionStreamBench(StreamBench):
    """A stream through one attention call, on random inputs, without a model."""

    def _prepare(self, work: Stream) -> object:
        import mlx.core as mx

        mx.random.seed(self._plan.seed)
        dtype = getattr(mx, work.dtype)
        shapes = ((work.heads, work.chunk), (work.kv_heads, work.chunk), (work.kv_heads, work.chunk))
        self._pool = [
            tuple(mx.random.normal((1, heads, rows, work.head_dim)).astype(dtype) for heads, rows in shapes)
            for _ in range(POOL)
        ]
        mx.eval(self._pool)
        return self._pool

    def _measure(self, name: str, work: Stream) -> bool:
        return self._measure_full(work) if name == FULL else self._measure_streaming(work)

    def _longest(self, work: Stream) -> int:
        largest = min(MAX_CACHE_BYTES[self._device.backend], CACHE_SHARE * self._limit)
        largest = self._limit if self._plan.force else largest
        return int(largest // work.full_workload(1).kv_token_bytes)

    def _rows_s(self, names: Sequence[str], work: Stream) -> list[float]:
        from attention.engine.cost import time_call

        call_s = time_call(ATTENDS, work.workload, self._plan.seed, MIN_CALLS) or 0.0
        token_s = call_s / work.kept  # by key
        lengths = [each for each in full_lengths(work.tokens) if each <= self._longest(work)]
        full_s = sum(max(LENGTH_S, MIN_CALLS * token_s * each) for each in lengths if token_s * each <= MAX_CALL_S)
        return [full_s if name == FULL else call_s * work.tokens / work.chunk for name in names]

    def _measure_streaming(self, work: Stream) -> bool:
        import mlx.core as mx

        from attention.streaming.state import StreamingKV

        self._emit_route(STREAMING, work.workload)
        state = StreamingKV(first=work.first, window=work.window, format=work.kv_format)

        def step(position: int) -> None:
            q, k, v = self._pool[position // work.chunk % POOL]
            if position + work.chunk > work.tokens:  # the last chunk of a stream may be shorter
                q, k, v = (array[:, :, : work.tokens - position] for array in (q, k, v))
            mx.eval(state.attend(q, k, v))

        complete = self._steps(STREAMING, work, step)
        self._emit_bound(work.workload.key_value_bytes)
        return complete

    def _measure_full(self, work: Stream) -> bool:
        """Time calls of one token over caches of growing lengths, as far as time and memory allow."""
        import mlx.core as mx

        self._emit_route(FULL, work.full_workload(min(work.tokens, MIN_LENGTH)))
        longest = self._longest(work)
        blocks: list[StreamBlock] = []
        lengths = full_lengths(work.tokens)
        for number, length in enumerate(lengths):
            expected_s = blocks[-1].seconds * length / blocks[-1].end if blocks else 0.0
            if length > longest or expected_s > MAX_CALL_S:
                break
            token_s = next((block.seconds for block in blocks if block.end >= work.kept), expected_s)
            left_s = LENGTH_S * (len(lengths) - number) + work.tokens * token_s
            self._progress.emit_progress(f"{FULL}: {length:,} of {work.tokens:,} keys", left_s)
            blocks.append(self._time_full(work, length))
            on_row = on.StreamAdvanced(case=self._progress.case, implementation=FULL, blocks=blocks[-1:])
            self._progress.emit(on_row)
            mx.clear_cache()
        if blocks:  # a longer cache may take another path
            self._emit_route(FULL, work.full_workload(blocks[-1].end))
        return True

    def _time_full(self, work: Stream, length: int) -> StreamBlock:
        """Time calls of one token that attends to a cache; appending to the cache is not counted, in its favour."""
        import mlx.core as mx

        from attention import attention

        q = self._pool[0][0][:, :, :1]
        k, v = (self._cache(work, length, number) for number in (1, 2))
        mx.eval(q, k, v, attention(q, k, v, implementation=ATTENDS))
        times: list[float] = []
        began = time.perf_counter()
        with without_collection():
            while len(times) < MIN_CALLS or time.perf_counter() - began < LENGTH_S:
                started = time.perf_counter()
                mx.eval(attention(q, k, v, implementation=ATTENDS))
                times.append(time.perf_counter() - started)
        return block_of(length, times, resident_bytes=resident_bytes(), device_bytes=mx.get_active_memory())

    def _cache(self, work: Stream, length: int, number: int) -> "mx.array":
        """Return keys or values of a cache: the rows of the pool, repeated."""
        import mlx.core as mx

        rows = mx.concatenate([arrays[number][:, :, :1] for arrays in self._pool], axis=2)
        return mx.tile(rows, (1, 1, -(-length // POOL), 1))[:, :, :length]
