"""Shapes, timing of the kernel and its peers on them, and the costs of a call apart from its arithmetic."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention.core.statistics import noise_floor
from attention.core.workload import DTYPES
from attention.kernels import cpu
from attention.kernels.cpu import library
from attention.measure.device import usable_cores

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
            return f"{self.batch}/{self.heads}({self.kv_heads})/1x{self.keys}/{self.head_dim}"
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


Run = Callable[[], object]

SETTLE_S: Final = 0.012
"""Torch's threads spin for 7 ms after a call, which would take half a processor from the next sample."""


def ours(shape: BenchShape, dtype: str, backward: bool = False, fused: bool = True) -> Run:
    """Return a call of the CPU kernel, or of MLX's own attention if `fused` is false."""
    q, k, v, cotangent = (mx.array(x).astype(TYPES[dtype]) for x in shape.numbers())
    mx.eval(q, k, v, cotangent)
    scale = shape.head_dim**-0.5

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if fused:
            return cpu.flash_attention(q, k, v, scale=scale, causal=shape.causal)
        mask = "causal" if shape.causal else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    if backward:
        return lambda: mx.vjp(attend, [q, k, v], [cotangent])[1]
    return lambda: attend(q, k, v)


def torchs(shape: BenchShape, dtype: str, backward: bool = False) -> Run | None:
    """Return torch's call on as many threads, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads())
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    q, k, v, cotangent = (torch.tensor(x).to(getattr(torch, dtype)) for x in shape.numbers())
    shared: dict[str, Any] = {"enable_gqa": True} if shape.kv_heads else {}
    if not backward:
        return lambda: attention(q, k, v, is_causal=shape.causal, **shared)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*inputs, is_causal=shape.causal), inputs, cotangent)


def threads() -> int:
    """Return the number of threads that the kernel uses."""
    return int(os.environ.get("FATUI_THREADS") or usable_cores())


def sample(run: Run, calls: int) -> float:
    """Return seconds per call, of several independent calls evaluated together."""
    start = time.perf_counter()
    outputs = [run() for _ in range(calls)]
    first = outputs[0][0] if isinstance(outputs[0], list) else outputs[0]
    if isinstance(first, mx.array):
        mx.eval(outputs)
    return (time.perf_counter() - start) / calls


def settled_sample(run: Run, calls: int, lead_in: bool = True) -> float:
    """Take a sample after other libraries' threads have gone to sleep, and after an untimed call."""
    time.sleep(SETTLE_S)
    if lead_in:
        sample(run, 1)
    return sample(run, calls)


def calls_for(run: Run, seconds: float) -> int:
    """Return the number of calls for a sample of about `seconds`; at least one."""
    once = sample(run, 1)
    return 1 if once > 4 * seconds else max(1, min(200, round(seconds / max(1e-6, sample(run, 2)))))


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """Return the names in the order of one round: each round begins with the next one."""
    order = list(names)
    first = number % len(order)
    return order[first:] + order[:first]


def one_round(runs: dict[str, Run], calls: int, number: int) -> dict[str, float]:
    """Return seconds per call of each, measured in the order of the round."""
    return {name: settled_sample(runs[name], calls) for name in in_turn(runs, number)}


PASSES_OF_DECODE = 4


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
    run, torch_run = ours(shape, dtype, backward), torchs(shape, dtype, backward)
    runs = {"ours": run} if torch_run is None else {"ours": run, "torch": torch_run}
    calls = calls_for(run, seconds)
    for name in runs:
        sample(runs[name], 1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = []
    for number in range(rounds):
        for name, taken in one_round(runs, calls, number).items():
            times[name].append(taken)
        peaks.append(library.load().fma_peak())
    row = BenchRow(shape.name, dtype, backward, shape.flops(backward))
    row.seconds = {name: statistics.median(t) for name, t in times.items()}
    row.ratios = {name: _ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    row.peak_flops_per_s = statistics.median(peaks)
    row.peak_share = statistics.median(row.flops / t / p for t, p in zip(times["ours"], peaks, strict=True))
    if not backward:
        _against_mlx(row, shape, run, calls, seconds)
    return row


def _against_mlx(row: BenchRow, shape: BenchShape, run: Run, calls: int, seconds: float) -> None:
    """Measure against MLX's own attention, which is tens of times slower: few rounds, two for a long call."""
    mlx = ours(shape, row.dtype, fused=False)
    mlx_calls = calls_for(mlx, seconds)
    rounds = 2 if mlx_calls == 1 else 5
    pairs = [(settled_sample(mlx, mlx_calls, lead_in=mlx_calls > 1), settled_sample(run, calls)) for _ in range(rounds)]
    row.seconds["mlx"] = statistics.median(theirs for theirs, _ in pairs)
    row.ratios["mlx"] = statistics.median(theirs / mine for theirs, mine in pairs)


def decode(dtype: str, rounds: int) -> DecodeRow:
    """Measure decoding, alternating with a plain loop that reads the same K and V."""
    q, k, v, _ = (mx.array(x).astype(TYPES[dtype]) for x in DECODE.numbers())
    mx.eval(q, k, v)
    runs: dict[str, Run] = {"ours": lambda: cpu.flash_attention(q, k, v, scale=DECODE.head_dim**-0.5)}
    torch_run = torchs(DECODE, dtype)
    if torch_run is not None:
        runs["torch"] = torch_run
    bytes_read = k.nbytes + v.nbytes
    plain = _plain_loop(k, v)
    times: dict[str, list[float]] = {name: [] for name in (*runs, "plain")}
    for number in range(rounds + 1):
        for name, taken in one_round(runs, PASSES_OF_DECODE, number).items():
            times[name].append(taken)
        plain()
        times["plain"].append(statistics.fmean(bytes_read / plain() for _ in range(PASSES_OF_DECODE)))
    times = {name: t[1:] for name, t in times.items()}  # the first round warms up
    return DecodeRow(
        dtype,
        bytes_read / statistics.median(times["ours"]),
        bytes_read / statistics.median(times["plain"]),
        _ratio(times["plain"], times["ours"]),
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
    """Time one evaluated call on a 1/1/4/8 input and one evaluated mx.add, alternating."""
    x = mx.zeros((1, 1, 4, 8))
    mx.eval(x)
    runs: dict[str, Run] = {
        "ours": lambda: mx.eval(cpu.flash_attention(x, x, x, scale=1.0)),
        "add": lambda: mx.eval(mx.add(x, x)),
        "add again": lambda: mx.eval(mx.add(x, x)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in in_turn(runs, number):
            start = time.perf_counter()
            for _ in range(calls):
                runs[name]()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    floor = noise_floor(times["add"], times["add again"])
    return TinyCall(
        statistics.median(times["ours"]),
        statistics.median(times["add"]),
        statistics.median(a / b for a, b in zip(times["ours"], times["add"], strict=True)),
        floor.floor if floor else 0.0,
    )


_START = (
    "import mlx.core, time; from attention.kernels import cpu; t = time.perf_counter(); cpu.load();"
    "print(time.perf_counter() - t)"
)


def start_times() -> tuple[float, float]:
    """Return the seconds until the kernel is loaded: first time (compiling), and a later process."""
    with tempfile.TemporaryDirectory() as room:
        environment = {**os.environ, "FATUI_CACHE_DIR": room}
        command = [sys.executable, "-c", _START]
        outputs = [subprocess.check_output(command, env=environment, text=True) for _ in range(6)]
    first, *later = (float(text) for text in outputs)
    return first, statistics.median(later)


def memory_per_thread() -> float:
    """Return the maximum bytes per thread above inputs and outputs, over all default shapes, dtypes and passes."""
    sizes = [
        cpu.workspace_bytes(shape.query_shape, shape.key_shape, shape.key_shape, dtype=dtype, training=training)
        for shape in (*SHAPES, DECODE)
        for dtype in TYPES.values()
        for training in (False, True)
    ]
    return max(sizes) / threads()
