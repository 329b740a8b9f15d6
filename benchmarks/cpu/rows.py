"""One row per shape: seconds of each implementation, ratios within rounds, and the share of the machine's peak."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import mlx.core as mx

from attention.kernels import cpu
from attention.kernels.cpu import library
from attention.measure.device import usable_cores
from benchmarks.cpu.shapes import DECODE, TYPES, BenchShape

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
