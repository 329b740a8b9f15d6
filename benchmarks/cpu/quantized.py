"""Quantized keys and values against dense ones and against mlx-lm's quantized path, in interleaved rounds.

Predicted for decoding with 4 query rows a K/V head and D = 128, on AVX-512 at two 512-bit operations a cycle. A key or
value of int4 takes 72 bytes with its scales, one of int8 136, one of a 16-bit type 256: if reading decided, 3.6 and 1.9
times as fast. Instructions for 128 numbers and 4 rows: keys in int8 16 dot products of bytes, 10 for the scales, 3 for
the sums, and in int4 12 more for the numbers; values 28 in integers, and 5 for the weights. So 15 to 20 cycles for each
key and each value, 0.12 to 0.16 a number.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import mlx.core as mx

from attention.core.kv_format import KVFormat, parse_kv_format
from attention.kernels import cpu
from attention.kernels.cpu import build
from attention.measure.rounds import Arm, Clock, TimedCall, take_sample
from attention.quantized_kv import QuantizedArray, quantized
from benchmarks.cpu.measure import DECODE, TYPES, BenchShape, calls_per_sample, let_threads_sleep
from benchmarks.rounds import MlxCalls, sample

PREFILL: Final = BenchShape(1, 8, 2048, 128, causal=True, kv_heads=2, keys=2048)
FORMATS: Final = ("int8", "int4", "int8+int4", "mxfp8", "mxfp4", "int6", "int3")
MIN_SPEEDUP: Final = {"int8": 1.6, "int4": 2.0}
"""Minimum speedup of decoding over a 16-bit type."""
LEAST_OVER_MLX: Final = 20.0
MIN_PREFILL: Final = 0.8
"""Minimum speed of prefill relative to float32."""
ROUNDS_OF_MLX: Final = 3


@dataclass
class QuantizedRow:
    """Medians of ratios within rounds: speedups over the dense call and over mlx-lm's quantized path."""

    case: str
    dtype: str
    kv_format: str
    seconds: float
    kv_bytes: int
    over_dense: float
    over_mlx: float | None
    target: str = ""
    holds: bool | None = None


def _inputs(shape: BenchShape, dtype: str) -> list[mx.array]:
    made = [mx.array(x).astype(TYPES[dtype]) for x in shape.numbers()[:3]]
    mx.eval(made)
    return made


def _quantize(k: mx.array, v: mx.array, form: KVFormat) -> tuple[QuantizedArray, QuantizedArray]:
    both = quantized(k, form.key), quantized(v, form.value)
    mx.eval([array.arrays for array in both])
    return both


def _ours(shape: BenchShape, q: mx.array, k: mx.array | QuantizedArray, v: mx.array | QuantizedArray) -> TimedCall:
    return MlxCalls(lambda: cpu.flash_attention(q, k, v, scale=shape.head_dim**-0.5, causal=shape.causal))


def _mlx(shape: BenchShape, q: mx.array, k: QuantizedArray, v: QuantizedArray) -> TimedCall | None:
    """Return calls of mlx-lm's attention over a quantized cache; None for formats that it does not take."""
    if k.format != v.format or not k.format.has_biases:
        return None
    try:
        from mlx_lm.models.base import quantized_scaled_dot_product_attention
    except ImportError:
        return None
    attend: Any = quantized_scaled_dot_product_attention
    form, scale = k.format, shape.head_dim**-0.5
    options = {"group_size": form.group_size, "bits": form.bits}
    # It scales q in place.
    return MlxCalls(lambda: attend(mx.stop_gradient(q), k.arrays, v.arrays, scale, None, **options))


def _arms(runs: dict[str, TimedCall], calls: int, clock: Clock = time.perf_counter) -> list[Arm]:
    return [
        Arm(name=name, runner=run, call_s=take_sample(run, 1), calls=calls, lead_in=True, clock=clock)
        for name, run in runs.items()
    ]


def _ratio(times: dict[str, list[float]], slower: str, faster: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slower], times[faster], strict=True))


def decode(
    dtype: str, formats: Sequence[str], rounds: int, with_peers: bool, clock: Clock = time.perf_counter
) -> list[QuantizedRow]:
    """Measure decoding over each format in the same rounds as over dense keys and values of the queries' dtype."""
    q, k, v = _inputs(DECODE, dtype)
    pairs = {text: _quantize(k, v, form) for text in formats if (form := parse_kv_format(text)) is not None}
    runs = {"dense": _ours(DECODE, q, k, v)} | {text: _ours(DECODE, q, *pair) for text, pair in pairs.items()}
    times = sample(_arms(runs, calls_per_sample(runs["dense"], 0.02), clock), rounds, let_threads_sleep)
    rows = []
    for text, pair in pairs.items():
        peer = _mlx(DECODE, q, *pair) if with_peers else None
        over_mlx = None
        if peer is not None:
            arms = {"ours": runs[text], "mlx": peer}
            over_mlx = _ratio(sample(_arms(arms, 1), ROUNDS_OF_MLX, let_threads_sleep), "mlx", "ours")
        seconds = statistics.median(times[text])
        size = sum(array.nbytes for array in pair)
        row = QuantizedRow("decode", dtype, text, seconds, size, _ratio(times, "dense", text), over_mlx)
        if text in MIN_SPEEDUP and dtype != "float32":
            row.target = f">= {MIN_SPEEDUP[text]:g} of dense"
            row.holds = row.over_dense >= MIN_SPEEDUP[text]
            if over_mlx is not None:
                row.target += f", {LEAST_OVER_MLX:g} of mlx-lm"
                row.holds = row.holds and over_mlx >= LEAST_OVER_MLX
        rows.append(row)
    return rows


def prefill(dtype: str, formats: Sequence[str], rounds: int) -> list[QuantizedRow]:
    """Measure a causal prefill over each format in the same rounds as the dense one in float32."""
    q, k, v = _inputs(PREFILL, dtype)
    runs = {"dense": _ours(PREFILL, *_inputs(PREFILL, "float32"))}
    pairs = {text: _quantize(k, v, form) for text in formats if (form := parse_kv_format(text)) is not None}
    runs |= {text: _ours(PREFILL, q, *pair) for text, pair in pairs.items()}
    times = sample(_arms(runs, 1), rounds, let_threads_sleep)
    rows = []
    for text, pair in pairs.items():
        size = sum(array.nbytes for array in pair)
        row = QuantizedRow(
            "prefill", dtype, text, statistics.median(times[text]), size, _ratio(times, "dense", text), None
        )
        row.target, row.holds = f">= {MIN_PREFILL:g} of float32", row.over_dense >= MIN_PREFILL
        rows.append(row)
    return rows


def _line(row: QuantizedRow) -> str:
    dense = "float32" if row.case == "prefill" else row.dtype
    mlx = f"{row.over_mlx:6.1f}x of mlx-lm" if row.over_mlx is not None else ""
    held = f"{row.target}: {'yes' if row.holds else 'NO'}" if row.target else ""
    shape = (PREFILL if row.case == "prefill" else DECODE).name
    return (
        f"{row.dtype:9} {row.case:8}{shape:28} {row.kv_format:10} {row.seconds * 1e3:8.2f} ms "
        f"{row.kv_bytes / 2**20:6.1f} MiB  {row.over_dense:5.2f}x of {dense:9} {mlx:18} {held}"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measure decoding and prefill; rows are printed as they are measured, or all of them as JSON."""
    rows: list[QuantizedRow] = []
    formats = arguments.formats or FORMATS
    clock = time.process_time if arguments.processor_time else time.perf_counter
    for dtype in arguments.types or ("float16", "bfloat16"):
        for made in (
            decode(dtype, formats, arguments.rounds, not arguments.no_peers, clock),
            prefill(dtype, formats, max(3, arguments.rounds // 3)),
        ):
            rows += made
            for row in made:
                print(_line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"cpu": build.cpu_name(), "load": os.getloadavg()[0], "rows": [asdict(row) for row in rows]}))
