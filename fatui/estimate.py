"""How long a run will take here, and what that is based on."""

from attention.plan import Plan
from attention.report import Report
from fatui import figures
from fatui.settings import Pace

CALLS_OUTSIDE = 8
"""Calls of an implementation on a case outside its rounds: first, checked, for memory, warm, timed alone."""
CALLS_INSIDE = 3
"""The fewest rounds worth having, however slow a call."""


def estimate_s(plan: Plan, pace: Pace) -> float:
    """Seconds at the most, from the last complete run's pace; rounds that are precise enough end sooner."""
    total = 0.0
    for case in plan.cases:
        calls = [case.flops / rate for name in plan.ordered if (rate := pace.flops_per_s.get(name))]
        rounds = max(plan.seconds, CALLS_INSIDE * sum(calls))
        total += rounds + CALLS_OUTSIDE * sum(calls) + pace.set_up_s * len(plan.implementations)
    return total


def in_words(plan: Plan, pace: Pace, device: str) -> str:
    """One line: the estimate, or why there is none yet."""
    if pace.device == device and device:
        return f"takes up to about {figures.duration(estimate_s(plan, pace))}, going by the last run here"
    rounds = figures.duration(plan.seconds * len(plan.cases))
    return f"takes up to {rounds} of rounds, and set-up; the first run will tell how long in all"


def pace_of(report: Report, spent_s: float) -> Pace:
    """What a complete run teaches about this machine.

    Args:
        report: the run.
        spent_s: its seconds in rounds, and in what was done once for all.
    """
    rows = [row for case in report.cases for row in case.rows]
    rates: dict[str, float] = {}
    for row in rows:
        if row.flops_per_s:
            rates[row.implementation] = min(row.flops_per_s, rates.get(row.implementation, row.flops_per_s))
    set_up = max(0.0, report.run.seconds - spent_s) / max(1, len(rows))
    return Pace(device=report.environment.device or "", set_up_s=set_up, flops_per_s=rates)
