"""The CPU kernel against torch's and MLX's attention: `python -m attention.kernels.cpu.benchmark`.

Rounds are interleaved: each takes one sample of every implementation, in an order that turns, and a ratio is formed
within the round. A sample is several independent calls evaluated together. Peak, bandwidth, start and call costs are
measured in the same run. `--json` prints the figures for machines.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from attention.kernels import cpu
from attention.kernels.cpu import library, toolchain

_TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
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
        """As the table shows it."""
        if self.keys:
            return f"decode {self.batch}/{self.heads}({self.kv_heads})/1x{self.keys}/{self.head_dim}"
        return f"{self.batch}/{self.heads}/{self.queries}/{self.head_dim}" + (" causal" if self.causal else "")

    def flops(self, backward: bool) -> float:
        """4 B H P D, P the pairs that the mask leaves; 3.5 times that with the backward pass."""
        keys = self.keys or self.queries
        pairs = self.queries * (self.queries + 1) // 2 if self.causal else self.queries * keys
        return 4.0 * self.batch * self.heads * pairs * self.head_dim * (3.5 if backward else 1.0)


SHAPES = (
    Shape(1, 8, 64, 32),
    Shape(1, 8, 128, 64),
    Shape(4, 8, 256, 32),
    Shape(1, 8, 512, 64),
    Shape(1, 8, 2048, 64),
    Shape(1, 8, 2048, 64, causal=True),
    Shape(1, 4, 4096, 128),
    Shape(1, 4, 4096, 128, causal=True),
)
DECODE = Shape(1, 32, 1, 128, kv_heads=8, keys=8192)


@dataclass
class Row:
    """One shape: seconds a call (median) of each implementation, and the ratios to ours, formed within the rounds."""

    shape: str
    dtype: str
    backward: bool
    flops: float
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    peak_share: float = 0.0


def _arrays(shape: Shape) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    kv = (shape.batch, shape.kv_heads or shape.heads, shape.keys or shape.queries, shape.head_dim)
    q = (shape.batch, shape.heads, shape.queries, shape.head_dim)
    return [random.standard_normal(s, dtype=np.float32) for s in (q, kv, kv, q)]


def _ours(shape: Shape, dtype: str, backward: bool, fused: bool = True) -> Run:
    q, k, v, cotangent = (mx.array(x).astype(_TYPES[dtype]) for x in _arrays(shape))
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


def _torch(shape: Shape, dtype: str, backward: bool) -> Run | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    q, k, v, cotangent = (torch.tensor(x).to(getattr(torch, dtype)) for x in _arrays(shape))
    shared: dict[str, Any] = {"enable_gqa": True} if shape.kv_heads else {}
    if not backward:
        return lambda: attention(q, k, v, is_causal=shape.causal, **shared)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*inputs, is_causal=shape.causal), inputs, cotangent)


def _sample(name: str, run: Run, calls: int) -> float:
    start = time.perf_counter()
    outputs = [run() for _ in range(calls)]
    if name != "torch":
        mx.eval(outputs)
    return (time.perf_counter() - start) / calls


def _rounds(runs: dict[str, Run], calls: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = []
    names = list(runs)
    for name in names:
        _sample(name, runs[name], calls)
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            times[name].append(_sample(name, runs[name], calls))
        peaks.append(max(library.load().fma_peak() for _ in range(2)))
    return times, peaks


def measure(shape: Shape, dtype: str, backward: bool, rounds: int, seconds: float = 0.03) -> Row:
    """One shape in interleaved rounds; a sample lasts about `seconds`."""
    runs = {"ours": _ours(shape, dtype, backward)}
    torch_run = _torch(shape, dtype, backward)
    if torch_run is not None:
        runs["torch"] = torch_run
    _sample("ours", runs["ours"], 1)
    calls = max(1, min(200, math.ceil(seconds / max(1e-6, _sample("ours", runs["ours"], 2)))))
    times, peaks = _rounds(runs, calls, rounds)
    row = Row(shape.name, dtype, backward, shape.flops(backward))
    row.seconds = {name: statistics.median(t) for name, t in times.items()}
    row.ratios = {
        name: statistics.median(a / b for a, b in zip(t, times["ours"], strict=True))
        for name, t in times.items()
        if name != "ours"
    }
    row.peak_share = statistics.median(row.flops / t / p for t, p in zip(times["ours"], peaks, strict=True))
    if not backward and not shape.keys:
        _against_mlx(row, shape, dtype, runs["ours"], calls)
    return row


def _against_mlx(row: Row, shape: Shape, dtype: str, ours: Run, calls: int) -> None:
    """MLX's own attention takes tens of times longer: two rounds, few calls."""
    runs = {"ours": ours, "mlx": _ours(shape, dtype, False, fused=False)}
    pairs = [(_sample("mlx", runs["mlx"], 1), _sample("ours", ours, calls)) for _ in range(2)]
    row.seconds["mlx"] = min(theirs for theirs, _ in pairs)
    row.ratios["mlx"] = statistics.median(theirs / mine for theirs, mine in pairs)


def decoding(dtype: str, rounds: int) -> dict[str, float]:
    """Bytes/s of K and V read while decoding, beside a plain read loop over as many bytes."""
    run = _ours(DECODE, dtype, False)
    module = library.load()
    size = 4 if dtype == "float32" else 2
    count = 2 * DECODE.batch * DECODE.kv_heads * DECODE.keys * DECODE.head_dim * size
    rates, plain = [], []
    for _ in range(rounds + 1):
        rates.append(count / _sample("ours", run, 4))
        plain.append(module.read_bandwidth(count))
    share = statistics.median(a / b for a, b in zip(rates[1:], plain[1:], strict=True))
    return {"bytes_per_s": statistics.median(rates[1:]), "plain": statistics.median(plain[1:]), "share": share}


def tiny_call() -> dict[str, float]:
    """Microseconds of one evaluated call on a 1/1/4/8 input, and of one evaluated mx.add, in turns; medians."""
    x = mx.zeros((1, 1, 4, 8))
    mx.eval(x)
    runs: dict[str, Run] = {
        "ours": lambda: mx.eval(cpu.flash_attention(x, x, x, scale=1.0)),
        "add": lambda: mx.eval(mx.add(x, x)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(40):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(200):
                run()
            times[name].append((time.perf_counter() - start) / 200 * 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


_START = "import mlx.core, time; from attention.kernels import cpu; t = time.perf_counter(); cpu.load(); "


def start_times() -> dict[str, float]:
    """Seconds until the kernel is ready: the first time (compiling, in an empty folder), and in a later process."""
    code = _START + "print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as room:
        environment = {**os.environ, "FATUI_CACHE_DIR": room}
        command = [sys.executable, "-c", code]
        outputs = [subprocess.check_output(command, env=environment, text=True) for _ in range(4)]
    first, *later = (float(text) for text in outputs)
    return {"first": first, "later": statistics.median(later)}


def memory_per_thread(training: bool) -> float:
    """The most bytes a thread that any default shape takes above its inputs and outputs."""
    threads = int(os.environ.get("FATUI_THREADS") or len(os.sched_getaffinity(0)))
    sizes = []
    for shape in (*SHAPES, DECODE):
        q = (shape.batch, shape.heads, shape.queries, shape.head_dim)
        k = (shape.batch, shape.kv_heads or shape.heads, shape.keys or shape.queries, shape.head_dim)
        sizes += [cpu.workspace_bytes(q, k, k, dtype=t, training=training) for t in _TYPES.values()]
    return max(sizes) / threads


def _print_rows(rows: list[Row]) -> None:
    for row in rows:
        rate = row.flops / row.seconds["ours"] / 1e9
        ratios = "  ".join(f"{name} {ratio:7.2f}x" for name, ratio in row.ratios.items())
        what = "fwd+bwd" if row.backward else "forward"
        print(f"{row.dtype:9} {what} {row.shape:20} {rate:7.0f} GFLOP/s {row.peak_share:5.0%} of peak   {ratios}")
    for name in sorted({name for row in rows for name in row.ratios}):
        against = [row.ratios[name] for row in rows if name in row.ratios]
        mean = statistics.geometric_mean(against)
        print(f"          against {name}: geometric mean {mean:.2f}x, least {min(against):.2f}x")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m attention.kernels.cpu.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=list(_TYPES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-start", action="store_true", help="leave out the first use, which compiles")
    return parser.parse_args()


def main() -> None:
    """Measure everything and print it."""
    arguments = _arguments()
    mx.set_default_device(mx.cpu)
    cpu.load(lambda message: print(message, file=sys.stderr))
    report: dict[str, Any] = {"cpu": toolchain.cpu_name(), "variant": cpu.variant(), "rows": []}
    for dtype in arguments.types:
        for backward in (False, True):
            rows = [measure(shape, dtype, backward, arguments.rounds) for shape in SHAPES]
            report["rows"] += [asdict(row) for row in rows]
            if not arguments.json:
                _print_rows(rows)
        report[f"decode_{dtype}"] = decoding(dtype, arguments.rounds)
    report["fma_peak"] = max(library.load().fma_peak() for _ in range(20))
    report["tiny_call_us"] = tiny_call()
    report["memory_per_thread"] = {str(t): memory_per_thread(t) for t in (False, True)}
    if not arguments.no_start:
        report["start_s"] = start_times()
    if arguments.json:
        print(json.dumps(report))
    else:
        print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1))


if __name__ == "__main__":
    main()
