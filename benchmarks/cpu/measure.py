"""Shapes, timing of the kernel and its peers on them, and the costs of a call apart from its arithmetic."""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np

from attention.core.statistics import noise_floor
from attention.core.workload import DTYPES
from attention.kernels import cpu
from attention.kernels.cpu import library
from attention.measure.device import usable_cores
from attention.measure.rounds import Arm, TimedCall, calls_for, take_sample
from benchmarks.rounds import EvaluatedCalls, MlxCalls, TorchCalls, sample

TYPES: Final[dict[str, mx.Dtype]] = {name: getattr(mx, name) for name in DTYPES}


@dataclass(frozen=True)
class BenchShape:
    """B/H/L/D of a square call, or of decoding with a cache of `keys` and fewer K/V heads."""

    batch: int
    heads: int
    queries: int
    head_dim: int
    causal: bool = False
    kv_heads: int = 0
    keys: int = 0

    @property
    def name(self) -> str:
        """Name for the table."""
        if self.keys:
            causal = " causal" if self.causal else ""
            return f"{self.batch}/{self.heads}({self.kv_heads})/{self.queries}x{self.keys}/{self.head_dim}{causal}"
        return f"{self.batch}/{self.heads}/{self.queries}/{self.head_dim}" + (" causal" if self.causal else "")

    def flops(self, backward: bool) -> float:
        """Return 4 B H P D with P the unmasked pairs; 3.5 times that with the backward pass."""
        keys = self.keys or self.queries
        pairs = self.queries * (self.queries + 1) // 2 if self.causal else self.queries * keys
        return 4.0 * self.batch * self.heads * pairs * self.head_dim * (3.5 if backward else 1.0)

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """(B, H, Lq, D)."""
        return (self.batch, self.heads, self.queries, self.head_dim)

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, Lk, D), also the shape of the values."""
        return (self.batch, self.kv_heads or self.heads, self.keys or self.queries, self.head_dim)

    def numbers(self) -> list[np.ndarray[Any, Any]]:
        """Return random q, k, v and an output gradient, in float32."""
        random = np.random.default_rng(0)
        shapes = (self.query_shape, self.key_shape, self.key_shape, self.query_shape)
        return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


SHAPES: Final = (
    BenchShape(1, 8, 64, 32),
    BenchShape(1, 8, 128, 64),
    BenchShape(4, 8, 256, 32),
    BenchShape(1, 8, 512, 64),
    BenchShape(1, 8, 2048, 64),
    BenchShape(1, 8, 2048, 64, causal=True),
    BenchShape(1, 4, 4096, 128),
    BenchShape(1, 4, 4096, 128, causal=True),
)
DECODE: Final = BenchShape(1, 32, 1, 128, kv_heads=8, keys=8192)
LONG: Final = 2048
"""Minimum length for the target of the share of the machine's peak."""


SETTLE_S: Final = 0.012
"""Torch's threads spin for 7 ms after a call, which would take half a processor from the next sample."""


def ours(shape: BenchShape, dtype: str, backward: bool = False, fused: bool = True) -> TimedCall:
    """Return calls of the CPU kernel, or of MLX's own attention if `fused` is false."""
    q, k, v, cotangent = (mx.array(x).astype(TYPES[dtype]) for x in shape.numbers())
    mx.eval(q, k, v, cotangent)
    scale = shape.head_dim**-0.5

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if fused:
            return cpu.flash_attention(q, k, v, scale=scale, causal=shape.causal)
        mask = "causal" if shape.causal else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    if backward:
        return MlxCalls(lambda: mx.vjp(attend, [q, k, v], [cotangent])[1])
    return MlxCalls(lambda: attend(q, k, v))


def torchs(shape: BenchShape, dtype: str, backward: bool = False) -> TimedCall | None:
    """Return torch's calls on as many threads, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads())
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    q, k, v, cotangent = (torch.tensor(x).to(getattr(torch, dtype)) for x in shape.numbers())
    shared: dict[str, Any] = {"enable_gqa": True} if shape.kv_heads else {}
    if not backward:
        return TorchCalls(lambda: attention(q, k, v, is_causal=shape.causal, **shared))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return TorchCalls(lambda: torch.autograd.grad(attention(*inputs, is_causal=shape.causal), inputs, cotangent))


def threads() -> int:
    """Return the number of threads that the kernel uses."""
    return int(os.environ.get("FATUI_THREADS") or usable_cores())


def calls_per_sample(run: TimedCall, seconds: float) -> int:
    """Return the number of calls for a sample of about `seconds`; at least one.

    Most of two small calls is the threads' waking, so that the time of a call is taken from longer and longer samples.
    """
    if take_sample(run, 1) > 4 * seconds:
        return 1
    calls = 2
    for part in (seconds / 4, seconds / 4, seconds):
        calls = calls_for(take_sample(run, calls), part, 1)
    return calls


def let_threads_sleep(arm: Arm) -> None:
    """Wait until other libraries' threads have gone to sleep."""
    time.sleep(SETTLE_S)


CALLS_OF_DECODE: Final = 4


@dataclass
class BenchRow:
    """Medians: seconds per call of each implementation, their ratio to the kernel's, and the kernel's share of peak."""

    shape: str
    dtype: str
    backward: bool
    flops: float
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    peak_flops_per_s: float = 0.0
    peak_share: float = 0.0


@dataclass
class DecodeRow:
    """Bytes/s of K and V in decoding and in a plain loop that reads the same arrays; torch's time over the kernel's."""

    dtype: str
    bytes_per_s: float
    plain_bytes_per_s: float
    share: float
    against_torch: float | None


def _ratio(theirs: list[float], mine: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, mine, strict=True))


def measure(shape: BenchShape, dtype: str, backward: bool, rounds: int, seconds: float = 0.03) -> BenchRow:
    """Measure one shape in interleaved rounds, each with the machine's float32 peak; samples of about `seconds`."""
    arms = _with_torch(shape, dtype, backward, seconds)
    peaks: list[float] = []
    times = sample(arms, rounds, let_threads_sleep, lambda: peaks.append(library.load().fma_peak()))
    row = BenchRow(shape.name, dtype, backward, shape.flops(backward))
    row.seconds = {name: statistics.median(t) for name, t in times.items()}
    row.ratios = {name: _ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    row.peak_flops_per_s = statistics.median(peaks)
    row.peak_share = statistics.median(row.flops / t / p for t, p in zip(times["ours"], peaks, strict=True))
    if not backward:
        _against_mlx(row, shape, arms[0].runner, arms[0].calls, seconds)
    return row


def _with_torch(shape: BenchShape, dtype: str, backward: bool, seconds: float) -> list[Arm]:
    """Return arms of the kernel and, if it is installed, of torch, with samples of about `seconds` of the kernel's."""
    run, torch_run = ours(shape, dtype, backward), torchs(shape, dtype, backward)
    runs = {"ours": run} if torch_run is None else {"ours": run, "torch": torch_run}
    calls = calls_per_sample(run, seconds)
    return [_arm(name, each, calls) for name, each in runs.items()]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep the CPUs busy by some other processes."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def measure_busy(shape: BenchShape, dtype: str, rounds: int, seconds: float = 0.03) -> BenchRow:
    """Measure a forward call against torch only, for use beside other processes; the ratio is that of the summed times.

    A sample is shorter or longer by whole time slices of the other processes, so that a median of ratios says little.
    """
    times = sample(_with_torch(shape, dtype, False, seconds), rounds, let_threads_sleep)
    row = BenchRow(shape.name, dtype, False, shape.flops(False))
    row.seconds = {name: statistics.fmean(t) for name, t in times.items()}
    row.ratios = {name: seconds / row.seconds["ours"] for name, seconds in row.seconds.items() if name != "ours"}
    return row


def _arm(name: str, run: TimedCall, calls: int, lead_in: bool = True) -> Arm:
    return Arm(name=name, runner=run, call_s=take_sample(run, 1), calls=calls, lead_in=lead_in)


def _against_mlx(row: BenchRow, shape: BenchShape, run: TimedCall, calls: int, seconds: float) -> None:
    """Measure against MLX's own attention, which is tens of times slower: few rounds, two for a long call."""
    mlx = ours(shape, row.dtype, fused=False)
    mlx_calls = calls_per_sample(mlx, seconds)
    arms = [_arm("ours", run, calls), _arm("mlx", mlx, mlx_calls, lead_in=mlx_calls > 1)]
    times = sample(arms, 2 if mlx_calls == 1 else 5, let_threads_sleep)
    row.seconds["mlx"] = statistics.median(times["mlx"])
    row.ratios["mlx"] = _ratio(times["mlx"], times["ours"])


def decode(dtype: str, rounds: int) -> DecodeRow:
    """Measure decoding, alternating with a plain loop that reads the same K and V."""
    q, k, v, _ = (mx.array(x).astype(TYPES[dtype]) for x in DECODE.numbers())
    mx.eval(q, k, v)
    runs: dict[str, TimedCall] = {"ours": MlxCalls(lambda: cpu.flash_attention(q, k, v, scale=DECODE.head_dim**-0.5))}
    torch_run = torchs(DECODE, dtype)
    if torch_run is not None:
        runs["torch"] = torch_run
    bytes_read = k.nbytes + v.nbytes
    plain_loop = _plain_loop(k, v)
    plain_loop()
    plain: list[float] = []

    def read() -> None:
        plain.append(statistics.fmean(bytes_read / plain_loop() for _ in range(CALLS_OF_DECODE)))

    times = sample([_arm(name, run, CALLS_OF_DECODE) for name, run in runs.items()], rounds, let_threads_sleep, read)
    return DecodeRow(
        dtype,
        bytes_read / statistics.median(times["ours"]),
        bytes_read / statistics.median(plain),
        _ratio(plain, times["ours"]),
        _ratio(times["torch"], times["ours"]) if "torch" in times else None,
    )


def _plain_loop(k: mx.array, v: mx.array) -> Callable[[], float]:
    """Return a function that reads both arrays once on all threads and returns bytes/s."""
    module = library.load()
    return lambda: float(module.read_bandwidth(k, v))


@dataclass
class TinyCall:
    """Median microseconds; the kernel's cost over mx.add's, and the noise of mx.add against itself."""

    ours_us: float
    add_us: float
    ratio: float
    floor: float


def tiny_call(rounds: int = 40, calls: int = 200) -> TinyCall:
    """Time one evaluated call on a 1/1/4/8 input and one evaluated mx.add, in the same rounds."""
    x = mx.zeros((1, 1, 4, 8))
    mx.eval(x)

    def attend() -> mx.array:
        return cpu.flash_attention(x, x, x, scale=1.0)

    def add() -> mx.array:
        return mx.add(x, x)

    runs = {"ours": attend, "add": add, "add again": add}
    arms = [_arm(name, EvaluatedCalls(run), calls, lead_in=False) for name, run in runs.items()]
    times = sample(arms, rounds)
    floor = noise_floor(times["add"], times["add again"])
    return TinyCall(
        statistics.median(times["ours"]) * 1e6,
        statistics.median(times["add"]) * 1e6,
        _ratio(times["ours"], times["add"]),
        floor.floor if floor else 0.0,
    )


_START = """
import mlx.core, resource, sys, time
from attention.kernels import cpu
start = time.perf_counter()
cpu.load(parts=sys.argv[1].split(",") if sys.argv[1] else None)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_utime + used.ru_stime)
"""


class StartTimes(NamedTuple):
    """Seconds until the kernel is loaded."""

    first_call_s: float
    """With what a first kind of call needs, in an empty cache folder."""
    first_call_cpu_s: float
    """CPU time of the compiler for that, which a busy machine changes little."""
    all_s: float
    """With all of its parts, in another empty cache folder."""
    later_s: float
    """In a later process; the median of some."""


def start_times() -> StartTimes:
    """Return how long the kernel takes to be ready: first time, compiling, and in a later process."""
    few = ",".join(sorted(cpu.parts("float16", 128)))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as another:
        first, used = _start_time(one, few)
        whole, _ = _start_time(another, "")
        later = [_start_time(another, "")[0] for _ in range(5)]
    return StartTimes(first, used, whole, statistics.median(later))


def _start_time(cache: str, parts: str) -> tuple[float, float]:
    """Return the seconds until these parts are loaded in a process of its own, and the CPU time of the compiler."""
    command = [sys.executable, "-c", _START, parts]
    text = subprocess.check_output(command, env={**os.environ, "FATUI_CACHE_DIR": cache}, text=True)
    seconds, used = map(float, text.split())
    return seconds, used


def memory_per_thread() -> float:
    """Return the maximum bytes per thread above inputs and outputs, over all default shapes, dtypes and passes."""
    sizes = [
        cpu.workspace_bytes(shape.query_shape, shape.key_shape, shape.key_shape, dtype=dtype, training=training)
        for shape in (*SHAPES, DECODE)
        for dtype in TYPES.values()
        for training in (False, True)
    ]
    return max(sizes) / threads()
