"""How long a run will take here, and what that is based on."""

from attention.plan import Plan
from attention.report import MIN_ROUNDS, Report
from attention.workload import Workload
from fatui import figures
from fatui.settings import Pace

CALLS_OUTSIDE = 8
"""Calls of an implementation on a case outside its rounds: first, checked, for memory, warm, timed alone."""


def estimate_s(plan: Plan, pace: Pace) -> float | None:
    """Seconds at the most, from the last complete run's pace; rounds that are precise enough end sooner.

    None where nothing is known of a case's kind: what training in bfloat16 took says nothing of a decode.
    """
    total = 0.0
    for case in plan.cases:
        calls = [case.flops / rate for name in plan.ordered if (rate := pace.flops_per_s.get(_kind(name, case)))]
        if not calls:
            return None
        calls += [sum(calls) / len(calls)] * (len(plan.ordered) - len(calls))  # those unknown, as the others
        first = case.flops / (pace.flops_per_s.get(_kind(plan.ordered[0], case)) or case.flops / max(calls))
        rounds = max(plan.seconds, MIN_ROUNDS * (sum(calls) + first))  # the reference runs twice
        total += rounds + CALLS_OUTSIDE * sum(calls) + pace.set_up_s * len(plan.implementations)
    return total


def _kind(name: str, case: Workload) -> str:
    return f"{name} {case.dtype} {case.pass_}"


def in_words(plan: Plan, pace: Pace, device: str) -> str:
    """One line: the estimate, or why there is none yet."""
    seconds = estimate_s(plan, pace) if pace.device == device and device else None
    if seconds is not None:
        return f"takes up to about {figures.duration(seconds)}, going by the last run here"
    rounds = figures.duration(plan.seconds * len(plan.cases))
    return f"takes up to {rounds} of rounds, and set-up; the first run of this kind will tell how long in all"


def pace_of(report: Report, spent_s: float) -> Pace:
    """What a complete run teaches about this machine.

    Args:
        report: the run.
        spent_s: its seconds in rounds, and in what was done once for all.
    """
    rows = [row for case in report.cases for row in case.rows]
    rates: dict[str, float] = {}
    for case in report.cases:
        for row in case.rows:
            if row.flops_per_s:
                kind = _kind(row.implementation, case.workload)
                rates[kind] = min(row.flops_per_s, rates.get(kind, row.flops_per_s))
    set_up = max(0.0, report.run.seconds - spent_s) / max(1, len(rows))
    return Pace(device=report.environment.device or "", set_up_s=set_up, flops_per_s=rates)
