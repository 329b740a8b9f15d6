"""Measure everything and print it; `--json` prints the results as JSON."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Final

import mlx.core as mx

from attention.kernels import cpu
from attention.kernels.cpu import build
from attention.measure.rounds import keep_freed_memory
from benchmarks import cpu as benchmarks_cpu
from benchmarks.cpu import measure, quantized, sparse
from benchmarks.cpu.claims import BenchReport, Claim, claims
from benchmarks.cpu.measure import DECODE, SHAPES, TYPES, threads

MAX_LOAD: Final = 0.5
"""Load average above which the table warns of other programs."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {benchmarks_cpu.__name__}", description=benchmarks_cpu.__doc__)
    parser.add_argument(
        "subject",
        nargs="?",
        choices=["dense", "sparse", "quantized"],
        default="dense",
        help="sparse: block lists; quantized: quantized keys and values (default: dense)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="of each row (default: 15)")
    parser.add_argument(
        "--types",
        nargs="+",
        choices=list(TYPES),
        help="(default: float32 bfloat16, on AVX2 float16 too; of queries over quantized keys: float16 bfloat16)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--masks", nargs="+", metavar="MASK", help="sparse: these masks only")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="quantized: these formats only")
    parser.add_argument("--no-peers", action="store_true", help="sparse, quantized: leave out torch or mlx-lm")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="quantized: time decoding by the process's processor time, which other programs disturb less; "
        "with FATUI_THREADS=1 in the environment",
    )
    parser.add_argument(
        "--busy",
        type=int,
        default=4,
        metavar="N",
        help="dense: measure float32 beside N other processes, too; 0: do not (default: 4)",
    )
    parser.add_argument("--no-start", action="store_true", help="leave out the first use, which compiles")
    return parser.parse_args()


def _row_line(row: measure.BenchRow) -> str:
    rate = row.flops / row.seconds["ours"] / 1e9
    share = f"{row.peak_share:4.0%} of peak" if row.dtype == "float32" else ""
    ratios = "  ".join(f"{name} {ratio:7.2f}x" for name, ratio in row.ratios.items())
    passes = "fwd+bwd" if row.backward else "forward"
    return f"{row.dtype:9} {passes:8}{row.shape:20} {rate:6.0f} GFLOP/s  {share:13} {ratios}"


def _busy_line(row: measure.BenchRow, processes: int) -> str:
    ratios = "  ".join(f"{name} {ratio:7.2f}x" for name, ratio in row.ratios.items())
    return f"{row.dtype:9} forward {row.shape:20} beside {processes} processes  {ratios}"


def _decode_line(row: measure.DecodeRow) -> str:
    rates = f"{row.bytes_per_s / 1e9:.1f} GB/s of {row.plain_bytes_per_s / 1e9:.1f} ({row.share:.0%})"
    torch = f"  torch {row.against_torch:7.2f}x" if row.against_torch is not None else ""
    return f"{row.dtype:9} decode  {DECODE.name:20} {rates}{torch}"


def _table(found: list[Claim]) -> str:
    words = {True: "yes", False: "NO", None: "n/a"}
    lines = [("what", "target", "measured", "holds")]
    lines += [(claim.what, claim.target, claim.measured, words[claim.holds]) for claim in found]
    widths = [*(max(len(line[i]) for line in lines) for i in range(3)), 0]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _measure(arguments: argparse.Namespace, report: BenchReport) -> None:
    """Fill the report; each row is printed to stderr as it is measured."""
    for dtype in arguments.types:
        for backward in (False, True):
            for shape in SHAPES:
                report.rows.append(measure.measure(shape, dtype, backward, arguments.rounds))
                print(_row_line(report.rows[-1]), file=sys.stderr)
    if arguments.busy > 0 and "float32" in arguments.types:
        with measure.busy_processes(arguments.busy):
            for shape in SHAPES:
                report.busy.append(measure.measure_busy(shape, "float32", arguments.rounds))
                print(_busy_line(report.busy[-1], arguments.busy), file=sys.stderr)
    for dtype in TYPES:
        report.decode.append(measure.decode(dtype, arguments.rounds))
        print(_decode_line(report.decode[-1]), file=sys.stderr)
    report.tiny = measure.tiny_call()
    report.memory_per_thread = measure.memory_per_thread()
    if not arguments.no_start:
        report.start = measure.start_times()


def main() -> None:
    """Measure, and print the table of targets."""
    arguments = _arguments()
    mx.set_default_device(mx.cpu)
    keep_freed_memory()
    cpu.load(lambda message: print(message, file=sys.stderr))
    if arguments.subject == "quantized":
        quantized.main(arguments)
        return
    usual = list(TYPES) if cpu.variant() == "avx2" else ["float32", "bfloat16"]
    arguments.types = arguments.types or usual
    if arguments.subject == "sparse":
        sparse.main(arguments)
        return
    report = BenchReport(build.cpu_name(), cpu.variant(), threads(), os.getloadavg()[0])
    _measure(arguments, report)
    found = claims(report)
    if arguments.json:
        print(json.dumps({**asdict(report), "claims": [asdict(claim) for claim in found]}))
    else:
        print(f"\n{report.cpu} ({report.variant}), {report.threads} threads, {arguments.rounds} rounds")
        if report.load > MAX_LOAD:
            print(f"This machine was busy (load {report.load:.1f}): what depends on all processors reads too low.")
        print(_table(found))


if __name__ == "__main__":
    main()
