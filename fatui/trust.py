"""Whether a run can be trusted: the noise, what else the machine did, and settings that change what is measured."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal

from msgspec import Struct

from attention.core.results import AnyCase, Conditions, FineTuningCase, Report
from fatui import formatting
from fatui.verdict import MAX_FLOOR, places

Severity = Literal["note", "warning", "serious"]
SEVERITIES: Final[tuple[Severity, ...]] = ("note", "warning", "serious")
HIGH_FLOOR: Final = 0.03
"""Noise floor above which small differences cannot be seen."""
BUSY_SHARE: Final = 0.05
"""Share of the cores in use by others that is worth a warning."""
MANY_SHARE: Final = 0.25
"""Share of the cores in use by others that is serious."""
SLOW_BLAS: Final = 2.0
"""A matrix product this many times below the processor's own rate has a slow BLAS."""
UNRECORDED: Final = "conditions"
"""The topic of the finding that conditions are not known."""
SLOW_GOVERNORS: Final = ("powersave", "conservative")
PRELOAD: Final = (
    "use --blas numpy, or install OpenBLAS (Debian, Ubuntu: apt install libopenblas0), "
    "then put LD_PRELOAD=libopenblas.so.0 in front of the command"
)


class TrustFinding(Struct, frozen=True, kw_only=True):
    """One thing that a run's figures depend on."""

    topic: str
    severity: Severity
    text: str
    """A few words, for the line below the verdict."""
    detail: str
    """What it means for the figures, and what to do about it."""

    @property
    def rank(self) -> int:
        """How serious it is, from 0."""
        return SEVERITIES.index(self.severity)


def trust(report: Report) -> tuple[TrustFinding, ...]:
    """Return the findings of a run, the most serious first."""
    return ranked([*of_cases(report.all_cases), *of_machine(report)])


def of_cases(cases: Sequence[AnyCase]) -> list[TrustFinding]:
    """Return what the rows of some cases show of noise and throttling."""
    return [*_noise(cases), *_throttling(cases)]


def of_machine(report: Report) -> list[TrustFinding]:
    """Return what a run's machine and settings say of its figures, whichever the cases."""
    return [
        *(_processes(report.conditions) if report.conditions else _unrecorded()),
        *_blas(report),
        *(_clock(report.conditions) if report.conditions else ()),
        *_tf32(report),
    ]


def ranked(findings: Iterable[TrustFinding]) -> tuple[TrustFinding, ...]:
    """Return findings with the most serious first."""
    return tuple(sorted(findings, key=lambda each: -each.rank))


def worst(findings: Sequence[TrustFinding]) -> Severity:
    """Return the severity of the most serious finding."""
    return max((each.severity for each in findings), key=SEVERITIES.index, default="note")


def trust_line(findings: Sequence[TrustFinding]) -> str:
    """Format the findings as one line: "noise floor 0.8 % · OpenBLAS"."""
    return " · ".join(each.text for each in findings if each.topic != UNRECORDED)


def _noise(cases: Sequence[AnyCase]) -> Iterator[TrustFinding]:
    floors = [case.noise_floor.floor for case in cases if case.noise_floor]
    if not floors:
        return
    floor = max(floors)
    severity: Severity = "serious" if floor > MAX_FLOOR else "warning" if floor > HIGH_FLOOR else "note"
    several = " at most" if len(floors) > 1 else ""
    high = [case for case in cases if case.noise_floor and case.noise_floor.floor > MAX_FLOOR]
    where = f", above {formatting.percent(MAX_FLOOR)} {places(high, cases)}" if high and len(cases) > 1 else ""
    yield TrustFinding(
        topic="noise floor",
        severity=severity,
        text=f"noise floor{several} {formatting.percent(floor)}{where}",
        detail="The reference, measured a second time in the same rounds, differed by up to "
        f"{formatting.percent(floor)}: smaller differences are printed as ≈ 1. "
        "Measuring for longer narrows it, a quiet machine too.",
    )


def _throttling(cases: Sequence[AnyCase]) -> Iterator[TrustFinding]:
    slowed = [case for case in cases if any(row.throttled for row in case.rows)]
    if slowed:
        count = f" in {len(slowed)} of {len(cases)} cases" if len(cases) > 1 else ""
        yield TrustFinding(
            topic="throttling",
            severity="warning",
            text=f"slowed down{count}",
            detail=f"The last rounds of {slowed[0].reference} were slower than its first by more than the noise floor: "
            "the processor throttled, or something else began to run. Speedups are paired in each round and hold; "
            "tokens/s are lower than the machine can do.",
        )


def _unrecorded() -> Iterator[TrustFinding]:
    yield TrustFinding(
        topic=UNRECORDED,
        severity="note",
        text="other load not recorded",
        detail="What else the machine did during this run was not recorded.",
    )


def _processes(conditions: Conditions) -> Iterator[TrustFinding]:
    if conditions.other_engines:
        yield TrustFinding(
            topic="another run",
            severity="serious",
            text="another fatui measures too",
            detail="Another run of fatui was measuring on this machine at the same time: both disturb each other. "
            "Run them one after the other.",
        )
    busy, cores = conditions.other_cores, conditions.cores or 1
    if busy is not None and busy >= BUSY_SHARE * cores:
        names = ", ".join(conditions.busiest)
        yield TrustFinding(
            topic="other processes",
            severity="serious" if busy >= MANY_SHARE * cores else "warning",
            text=f"others used {_cores(busy)}{f' ({names})' if names else ''}",
            detail=f"Other processes kept {_cores(busy)} of {cores} busy while this was measured"
            f"{f', most of all {names}' if names else ''}. Speedups are paired and suffer less than tokens/s; stop "
            "these programs, and measure again.",
        )
    stolen = conditions.stolen_cores
    if stolen is not None and stolen >= BUSY_SHARE * cores:
        yield TrustFinding(
            topic="hypervisor",
            severity="warning",
            text=f"the host took {_cores(stolen)}",
            detail=f"This is a virtual machine whose host gave {_cores(stolen)} of {cores} to others while this was "
            "measured.",
        )


def _cores(count: float) -> str:
    text = f"{count:.1f}"
    return f"{text} core{'' if text == '1.0' else 's'}"


def _blas(report: Report) -> Iterator[TrustFinding]:
    where, peaks = report.environment, report.peaks
    if where.backend != "cpu":
        return
    name = where.blas or "BLAS unknown"
    fma, matmul = peaks.fma_flops_per_s, peaks.matmul_flops_per_s
    slow = fma is not None and matmul is not None and where.blas != "Accelerate" and fma > SLOW_BLAS * matmul
    rates = (
        f"MLX's best matrix product reached {formatting.flops(matmul)}/s, where this processor's cores multiply and "
        f"add {formatting.flops(fma)}/s."
        if fma and matmul
        else f"MLX's matrix products on this processor: {name}."
    )
    times = f"{fma / matmul:.0f}" if fma and matmul else ""
    yield TrustFinding(
        topic="BLAS",
        severity="warning" if slow else "note",
        text=f"{name}: products {times} times below the cores" if slow else name,
        detail=f"{rates} Implementations made of MLX's products, such as baseline, are slow for that alone; to compare "
        f"with a fast one, {PRELOAD}."
        if slow
        else rates,
    )


def _clock(conditions: Conditions) -> Iterator[TrustFinding]:
    if conditions.governor in SLOW_GOVERNORS:
        yield TrustFinding(
            topic="governor",
            severity="warning",
            text=f"governor {conditions.governor}",
            detail=f"The processor's clock is set by the governor {conditions.governor}, which raises it late; for "
            "steady figures: cpupower frequency-set -g performance.",
        )
    if conditions.on_battery:
        yield TrustFinding(
            topic="battery",
            severity="warning",
            text="on battery",
            detail="The machine ran on its battery, where most lower the clocks: connect it to power.",
        )


def _tf32(report: Report) -> Iterator[TrustFinding]:
    dtypes = {case.workload.dtype for case in report.all_cases if not isinstance(case, FineTuningCase)}
    if report.conditions and report.conditions.tf32 and "float32" in dtypes:
        yield TrustFinding(
            topic="TF32",
            severity="warning",
            text="float32 in TF32",
            detail="MLX multiplies float32 matrices in TF32 on this device, with errors of about 1e-3, and faster than "
            "in float32; MLX_ENABLE_TF32=0 in the environment selects float32.",
        )
