"""One row per shape: seconds of each implementation, ratios within rounds, and the share of the machine's peak."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from attention.kernels import cpu
from attention.kernels.cpu import library
from attention.kernels.cpu.benchmark.runs import Run, calls_for, one_round, ours, sample, settled_sample, torchs
from attention.kernels.cpu.benchmark.shapes import DECODE, TYPES, Shape

PASSES_OF_DECODE = 4


@dataclass
class Row:
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


def measure(shape: Shape, dtype: str, backward: bool, rounds: int, seconds: float = 0.03) -> Row:
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
    row = Row(shape.name, dtype, backward, shape.flops(backward))
    row.seconds = {name: statistics.median(t) for name, t in times.items()}
    row.ratios = {name: _ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    row.peak_flops_per_s = statistics.median(peaks)
    row.peak_share = statistics.median(row.flops / t / p for t, p in zip(times["ours"], peaks, strict=True))
    if not backward:
        _against_mlx(row, shape, run, calls, seconds)
    return row


def _against_mlx(row: Row, shape: Shape, run: Run, calls: int, seconds: float) -> None:
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
