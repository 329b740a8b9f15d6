"""Fabricated runs: records fed with events, for tests of everything that reads a report."""

import random
from collections.abc import Iterator, Sequence

from msgspec import structs

from attention.core import events as on
from attention.core.plan import Plan
from attention.core.results import Environment, Peaks, Report, Run
from attention.core.route import Route
from attention.core.workload import Workload
from attention.engine.record import Record

ENVIRONMENT = Environment(
    fatui="0.1.0",
    mlx="0.32.4",
    backend="cpu",
    device="AMD EPYC 9R14",
    memory_bytes=64 * 2**30,
    blas="OpenBLAS",
    os="Linux 6.8",
    python="3.11.7",
)
PATHS = {
    "baseline": ("unfused", 1.0),
    "poc": ("CPU kernel avx512", 0.02),
    "practical": ("blocks 256 x 512", 0.9),
    "demo": ("MLX SDPA, compiled", 1.001),
}


UNQUANTIZED = {"int8": 1.7, "int4": 2.5, "int3": 0.8}
"""Time with unquantized keys and values, as a multiple of that in a format."""
KV_ERRORS = {"int8": 0.006, "int4": 0.11, "int3": 0.24}


def plan_of(cases: Sequence[Workload] = (Workload(seq=128),), names: Sequence[str] = tuple(PATHS)) -> Plan:
    """A plan over a few cases."""
    return Plan(cases=tuple(cases), implementations=tuple(names), seconds=1.0)


def run_of(preset: str | None = None, identity: str = "0a1b2c3d") -> Run:
    """The description of a run."""
    started = "2026-01-02T03:04:05+00:00"
    return Run(id=identity, started=started, seconds=12.3, command="fatui bench quick", preset=preset)


def events_of(plan: Plan, seed: int = 0, noise: float = 0.004) -> Iterator[on.AnyEvent]:
    """The events of a run without failures."""
    draw = random.Random(seed)
    yield on.RunStarted(environment=ENVIRONMENT)
    yield on.PeaksMeasured(peaks=Peaks(matmul_flops_per_s=1.3e11, copy_bytes_per_s=2.1e10))
    for number, workload in enumerate(plan.cases):
        yield on.Progress(done=number / len(plan.cases), remaining_s=9.0, now=f"case {number + 1}")
        yield on.CaseStarted(case=number)
        for name in plan.ordered:
            yield from preparation(number, workload, name)
        yield on.ReferenceChosen(case=number, implementation=plan.ordered[0])
        for _ in range(4):
            arms = {name: PATHS.get(name, ("", 1.0))[1] for name in plan.ordered} | {on.REPEATED_REFERENCE: 1.0}
            slow = workload.flops / 3e9
            times = {name: [slow * part * draw.gauss(1, noise) for _ in range(6)] for name, part in arms.items()}
            counterparts = {
                counterpart: {
                    name: [other.flops / 3e9 * PATHS[name][1] * factor * draw.gauss(1, noise) for _ in range(6)]
                    for name in plan.ordered
                    if name in PATHS
                }
                for counterpart, other in workload.counterparts.items()
                for factor in [UNQUANTIZED.get(workload.kv_format, 1.0) if counterpart == "unquantized" else 1.0]
            }
            yield on.RoundsDone(
                case=number, samples=times, counterparts=counterparts, active_bytes=2**20, peak_bytes=2**22
            )
        yield on.CaseDone(case=number, stopped_by="precision")
    yield on.RunDone()


def preparation(number: int, workload: Workload, name: str) -> Iterator[on.AnyEvent]:
    """The events of an implementation before its rounds."""
    path, _ = PATHS.get(name, ("blocks 2048 x 2048, g8", 1.0))
    route = Route(path=path, fused=name == "poc", reason="as the test says", predicted_bytes=workload.scores * 4)
    yield on.RouteFound(case=number, implementation=name, route=route)
    yield on.FirstCall(case=number, implementation=name, seconds=0.2)
    yield on.AccuracyChecked(
        case=number,
        implementation=name,
        max_error=1.2e-3,
        rms_error=2e-4,
        accurate=True,
        detail="output 1.2e-3 of 3e-3",
        kv_error=KV_ERRORS.get(workload.kv_format),
    )
    yield on.MemoryMeasured(case=number, implementation=name, peak_bytes=workload.scores * 4)
    yield on.LatencyMeasured(case=number, implementation=name, seconds=0.001)


def record_of(plan: Plan, seed: int = 0) -> Record:
    """A record of a whole run."""
    record = Record(plan)
    for event in events_of(plan, seed):
        record.apply(event)
    return record


def report_of(plan: Plan | None = None, run: Run | None = None, seed: int = 0) -> Report:
    """A report of a whole run."""
    return record_of(plan or plan_of(), seed).report(run or run_of())


def compared(**environment):
    """Two runs of the same code; the second in an environment that differs in some fields."""
    before = report_of(run=run_of(identity="aaaa1111"))
    after = report_of(run=run_of(identity="bbbb2222"), seed=1)
    return before, structs.replace(after, environment=structs.replace(ENVIRONMENT, **environment))
