"""Performance targets of the kernel: target, measured value, and whether it holds on this machine."""

import statistics
from dataclasses import dataclass, field
from typing import Final

from benchmarks.cpu.measure import LONG, SHAPES, TYPES, BenchRow, DecodeRow, StartTimes, TinyCall


@dataclass
class BenchReport:
    """All measurements of one run."""

    cpu: str
    variant: str
    threads: int
    load: float  # one-minute load average before it began
    rows: list[BenchRow] = field(default_factory=list)
    busy: list[BenchRow] = field(default_factory=list)  # the float32 forward rows, beside other processes
    decode: list[DecodeRow] = field(default_factory=list)
    tiny: TinyCall | None = None
    start: StartTimes | None = None
    memory_per_thread: float = 0.0


@dataclass
class Claim:
    """One line of the table; `holds` is None if it cannot be decided on this machine."""

    what: str
    target: str
    measured: str
    holds: bool | None


@dataclass(frozen=True)
class Targets:
    """Speed against torch, shares of the FMA peak and of a plain read loop; None without a target."""

    forward: float = 1.45
    least_forward: float = 1.15
    half_forward: float = 2.0
    training: float = 1.3
    least_training: float | None = None
    peak: float = 0.75
    decode: float = 0.8
    least_busy: float | None = None


DEFAULT_TARGETS: Final = Targets()
TARGETS: Final = {
    "avx2": Targets(
        forward=1.7, least_forward=1.18, training=1.6, least_training=1.15, peak=0.82, decode=0.85, least_busy=1.2
    )
}
"""By variant of the source; the others have the default."""


def _targets(report: BenchReport) -> Targets:
    return TARGETS.get(report.variant, DEFAULT_TARGETS)


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
    targets = _targets(report)
    forward = _ratios(report, "torch", "float32")
    claims = _mean("float32 forward against torch", forward, targets.forward)
    claims += _least("float32 forward against torch", forward, targets.least_forward)
    for dtype in ("float16", "bfloat16"):
        for claim in _mean(f"{dtype} forward against torch", _ratios(report, "torch", dtype), targets.half_forward):
            if report.variant not in ("amx", "avx512_bf16", "avx2"):
                claim.holds = None  # a target for processors that multiply it, and for those where torch cannot either
            claims.append(claim)
    for dtype in TYPES:
        training = _ratios(report, "torch", dtype, backward=True)
        claims += _mean(f"{dtype} forward and backward against torch", training, targets.training)
        if targets.least_training is not None:
            claims += _least(f"{dtype} forward and backward against torch", training, targets.least_training)
    for dtype in TYPES:
        claims += _least(f"{dtype} forward against MLX", _ratios(report, "mlx", dtype), 30)
    if targets.least_busy is not None:
        ratios = [row.ratios["torch"] for row in report.busy if "torch" in row.ratios]
        claims += _least("float32 forward against torch, beside other processes", ratios, targets.least_busy)
    return claims


def _shares(report: BenchReport) -> list[Claim]:
    targets = _targets(report)
    long = {shape.name for shape in SHAPES if shape.queries >= LONG}
    claims = [
        Claim(
            f"float32 forward {row.shape}",
            f">= {targets.peak:.0%} of the FMA peak",
            f"{row.peak_share:.0%} of {row.peak_flops_per_s / 1e9:.0f} GFLOP/s",
            row.peak_share >= targets.peak,
        )
        for row in report.rows
        if row.dtype == "float32" and not row.backward and row.shape in long
    ]
    for row in report.decode:
        measured = f"{row.share:.0%} of {row.plain_bytes_per_s / 1e9:.0f} GB/s"
        target = f">= {targets.decode:.0%} of a plain read loop"
        claims.append(Claim(f"{row.dtype} decode", target, measured, row.share >= targets.decode))
    return claims


def _costs(report: BenchReport) -> list[Claim]:
    claims = []
    if report.tiny is not None:
        tiny, most = report.tiny, 1 + report.tiny.floor
        measured = f"{tiny.ratio:.3f}x ({tiny.ours_us:.1f} us), noise {tiny.floor:.1%}"
        claims.append(Claim("tiny call, evaluated", "<= mx.add", measured, tiny.ratio <= most))
    if (start := report.start) is not None:
        first = f"{start.first_call_s:.1f} s ({start.first_call_cpu_s:.1f} s of CPU)"
        claims.append(Claim("first use, until a first kind of call", "< 10 s", first, start.first_call_s < 10))
        claims.append(Claim("first use, all of the kernel", "< 30 s", f"{start.all_s:.1f} s", start.all_s < 30))
        later = f"{start.later_s * 1e3:.0f} ms"
        claims.append(Claim("later processes, until ready", "< 50 ms", later, start.later_s < 0.05))
    mib = report.memory_per_thread / 2**20
    claims.append(Claim("extra memory a thread", "< 4 MiB", f"{mib:.2f} MiB", mib < 4))
    return claims


def claims(report: BenchReport) -> list[Claim]:
    """Return every target that the run measured."""
    return _speedups(report) + _shares(report) + _costs(report)
