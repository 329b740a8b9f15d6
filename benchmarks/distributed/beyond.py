"""One rank of `python -m benchmarks.distributed --beyond TOKENS`: a prefill whose arrays exceed one GPU's memory.

Each rank makes its own rows only, one head after another from a seed. A sample of rows is compared with float64.
"""

import statistics
import sys
import time
from typing import Any, Final, cast

import mlx.core as mx
import msgspec
import numpy as np

from attention import attention
from attention.core.workload import Workload
from attention.distributed import collectives, make_layout
from attention.kernels.common.selfcheck import exact
from attention.measure.reference import Rules, forward

ROUNDS: Final = 3
ROWS: Final = 24
"""Rows of each compared head."""


def head(which: int, number: int, rank: int, workload: Workload, ranks: int) -> mx.array:
    """Return the rows of a head of q, k or v (0 to 2) on a rank, (1, 1, rows, D)."""
    key = mx.random.key((which * workload.heads + number) * ranks + rank)
    return mx.random.normal((1, 1, workload.seq // ranks, workload.head_dim), key=key).astype(mx.bfloat16)


def measure(workload: Workload, group: collectives.Group) -> dict[str, Any]:
    """Return the row of a windowed prefill, whose sequence is a multiple of the ranks."""
    rank, ranks = group.rank(), group.size()
    layout = make_layout(workload.seq, ranks, "contiguous")
    arrays = []
    for which, heads in enumerate((workload.heads, workload.kv_heads, workload.kv_heads)):
        parts = [head(which, number, rank, workload, ranks) for number in range(heads)]
        for part in parts:
            mx.eval(part)
        arrays.append(mx.concatenate(parts, axis=1))
        mx.eval(arrays[-1])
        del parts
        mx.clear_cache()
    times = []
    for _ in range(ROUNDS + 1):
        mx.eval(mx.distributed.all_sum(mx.array([1.0]), group=group))
        mx.synchronize()
        mx.reset_peak_memory()
        started = time.perf_counter()
        out = attention(*arrays, group=group, layout=layout, window=workload.window, implementation="poc")
        mx.eval(out)
        times.append(time.perf_counter() - started)
    numbers = [statistics.median(times[1:]), mx.get_peak_memory(), _excess(out, arrays, workload, rank, ranks)]
    gathered = mx.distributed.all_gather(mx.array([numbers], mx.float32), group=group)
    seconds, peaks, excesses = zip(*cast("list[list[float]]", gathered.tolist()), strict=True)
    return {
        "part": "beyond",
        "workload": msgspec.to_builtins(workload),
        "ranks": ranks,
        "transport": collectives.transport(),
        "by_method": collectives.statistics().by_method,
        "one_needs_bytes": workload.input_bytes + workload.output_bytes,
        "gpu_bytes": int(mx.device_info().get("memory_size") or mx.device_info().get("total_memory") or 0),
        "peak_bytes": [int(peak) for peak in peaks],
        "ranks_s": max(seconds),
        "accurate": max(excesses) <= 1,
    }


def _excess(out: mx.array, arrays: list[mx.array], workload: Workload, rank: int, ranks: int) -> float:
    """Return the largest error of some rows over twice that of unfused attention in bfloat16, and a rounding."""
    rows, window = int(out.shape[2]), workload.window or workload.seq
    per_key_head = workload.heads // workload.kv_heads
    places = np.unique(np.concatenate([np.arange(4), np.linspace(0, rows - 1, ROWS - 4).astype(int)]))
    worst = 0.0
    for number in (0, workload.heads - 1):
        of_key = number // per_key_head
        before = [head(which, of_key, rank - 1, workload, ranks)[:, :, -window:] for which in (1, 2)] if rank else []
        for place in places.tolist():
            q = arrays[0][0, number, place]
            k, v = (x[0, of_key, max(0, place - window + 1) : place + 1] for x in arrays[1:])
            missing = window - 1 - place if rank else 0
            if missing > 0:
                k, v = (mx.concatenate([x[0, 0, -missing:], y]) for x, y in zip(before, (k, v), strict=True))
            plain = mx.softmax((k @ q) * workload.head_dim**-0.5) @ v
            wanted = forward(exact(q)[None], exact(k), exact(v), Rules(scale=workload.head_dim**-0.5)).output[0]
            error, of_plain = (float(np.abs(exact(x) - wanted).max()) for x in (out[0, number, place], plain))
            worst = max(worst, error / (2 * of_plain + float(np.abs(wanted).max()) * 2.0**-8))
    return worst


def main() -> int:
    """Measure a prefill of as many tokens as the argument says; rank 0 prints the row as JSON after `ROW`."""
    group = mx.distributed.init(strict=True, backend=sys.argv[2])
    workload = Workload(seq=int(sys.argv[1]), heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", mask="window:4096")
    row = measure(workload, group)
    if group.rank() == 0:
        print("ROW", msgspec.json.encode(row).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
