"""Costs of a call apart from its arithmetic: a tiny call, the first use, a later start, memory."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import mlx.core as mx

from attention.core.statistics import noise_floor
from attention.kernels import cpu
from benchmarks.cpu.rows import Run, in_turn, threads
from benchmarks.cpu.shapes import DECODE, SHAPES, TYPES


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
