"""Performance targets of the kernel: target, measured value, and whether it holds on this machine."""

import statistics
from dataclasses import dataclass, field

from benchmarks.cpu.measure import LONG, SHAPES, BenchRow, DecodeRow, TinyCall


@dataclass
class BenchReport:
    """All measurements of one run."""

    cpu: str
    variant: str
    threads: int
    load: float  # one-minute load average before it began
    rows: list[BenchRow] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    tiny: TinyCall | None = None
    first_start_s: float | None = None
    later_start_s: float | None = None
    memory_per_thread: float = 0.0


@dataclass
class Claim:
    """One line of the table; `holds` is None if it cannot be decided on this machine."""

    what: str
    target: str
    measured: str
    holds: bool | None


def _ratios(report: BenchReport, peer: str, dtype: str, backward: bool = False) -> list[float]:
    rows = [row for row in report.rows if row.dtype == dtype and row.backward == backward]
    return [row.ratios[peer] for row in rows if peer in row.ratios]


def _mean(what: str, ratios: list[float], target: float) -> list[Claim]:
    if not ratios:  # torch is missing, or the dtype was not measured
        return []
    found = statistics.geometric_mean(ratios)
    return [Claim(f"{what}, geometric mean", f">= {target:g}x", f"{found:.2f}x", found >= target)]


def _least(what: str, ratios: list[float], target: float) -> list[Claim]:
    if not ratios:
        return []
    return [Claim(f"{what}, least", f">= {target:g}x", f"{min(ratios):.2f}x", min(ratios) >= target)]


def _speedups(report: BenchReport) -> list[Claim]:
    forward = _ratios(report, "torch", "float32")
    claims = _mean("float32 forward against torch", forward, 1.45)
    claims += _least("float32 forward against torch", forward, 1.15)
    for claim in _mean("bfloat16 forward against torch", _ratios(report, "torch", "bfloat16"), 2.0):
        if report.variant not in ("amx", "avx512_bf16"):
            claim.holds = None  # a target for processors with AVX-512 BF16 only
        claims.append(claim)
    for dtype in ("float32", "bfloat16"):
        claims += _mean(f"{dtype} forward and backward against torch", _ratios(report, "torch", dtype, True), 1.3)
    for dtype in ("float32", "bfloat16"):
        claims += _least(f"{dtype} forward against MLX", _ratios(report, "mlx", dtype), 30)
    return claims


def _shares(report: BenchReport) -> list[Claim]:
    long = {shape.name for shape in SHAPES if shape.queries >= LONG}
    claims = [
        Claim(
            f"float32 forward {row.shape}",
            ">= 75 % of the FMA peak",
            f"{row.peak_share:.0%} of {row.peak_flops_per_s / 1e9:.0f} GFLOP/s",
            row.peak_share >= 0.75,
        )
        for row in report.rows
        if row.dtype == "float32" and not row.backward and row.shape in long
    ]
    for row in report.decode:
        measured = f"{row.share:.0%} of {row.plain_bytes_per_s / 1e9:.0f} GB/s"
        claims.append(Claim(f"{row.dtype} decode", ">= 80 % of a plain read loop", measured, row.share >= 0.8))
    return claims


def _costs(report: BenchReport) -> list[Claim]:
    claims = []
    if report.tiny is not None:
        tiny, most = report.tiny, 1 + report.tiny.floor
        measured = f"{tiny.ratio:.3f}x ({tiny.ours_us:.1f} us), noise {tiny.floor:.1%}"
        claims.append(Claim("tiny call, evaluated", "<= mx.add", measured, tiny.ratio <= most))
    if report.first_start_s is not None and report.later_start_s is not None:
        first, later = report.first_start_s, report.later_start_s
        claims.append(Claim("first use, compiling", "< 30 s", f"{first:.1f} s", first < 30))
        claims.append(Claim("later processes, until ready", "< 50 ms", f"{later * 1e3:.0f} ms", later < 0.05))
    mib = report.memory_per_thread / 2**20
    claims.append(Claim("extra memory a thread", "< 4 MiB", f"{mib:.2f} MiB", mib < 4))
    return claims


def claims(report: BenchReport) -> list[Claim]:
    """Return every target that the run measured."""
    return _speedups(report) + _shares(report) + _costs(report)
