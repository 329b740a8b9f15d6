"""How long a run takes: estimated from earlier runs before it starts, and from itself while it goes on."""

import math
from typing import Final

from msgspec import Struct, structs

from attention.plan import Plan
from attention.report import Report
from attention.teller import case_s
from attention.teller import kind as kind_of_case
from attention.workload import Workload
from fatui import figures
from fatui.session import AnySession
from fatui.settings import Pace

MAX_SCALE: Final = 64.0
"""A call of this many times more or fewer FLOPs than all known ones is not estimated from them."""
MAX_SIZES: Final = 16
"""Sizes that are remembered of one kind of call."""


def kind(name: str, workload: Workload) -> str:
    """The calls whose times say something of each other: "poc float16 forward"."""
    return f"{name} {kind_of_case(workload)}"


def estimate_s(plan: Plan, pace: Pace, device: str) -> float | None:
    """Seconds at the most, as rounds that are precise enough end sooner.

    None where no call of a case's kind is known: what training in bfloat16 took says nothing of a decode.
    """
    if not device or pace.device != device:
        return None
    total = 0.0
    for case in plan.cases:
        known = [_call_s(pace.calls.get(kind(name, case), []), case.flops) for name in plan.ordered]
        calls = [seconds for seconds in known if seconds is not None]
        if not calls:
            return None
        mean = sum(calls) / len(calls)  # of those unknown
        calls = [mean if seconds is None else seconds for seconds in known]
        total += case_s(calls, plan.seconds) + pace.set_up_s * len(plan.implementations)
    return total


def _call_s(known: list[tuple[float, float]], flops: float) -> float | None:
    """Scale the time of the known call that is nearest in size."""
    if not known or flops <= 0:
        return None
    size, seconds = min(known, key=lambda each: abs(math.log(each[0] / flops)))
    return seconds * flops / size if 1 / MAX_SCALE <= flops / size <= MAX_SCALE else None


def in_words(plan: Plan, pace: Pace, device: str) -> str:
    """One line: the estimate, or why there is none yet."""
    seconds = estimate_s(plan, pace, device)
    if seconds is not None:
        return f"takes up to about {figures.duration(seconds)}, going by earlier runs here"
    rounds = figures.duration(plan.seconds * len(plan.cases))
    return f"takes up to {rounds} of rounds, and set-up; the first run of this kind will tell how long in all"


def learn(pace: Pace, report: Report, spent_s: float) -> Pace:
    """Add what a complete run teaches about this machine; what is known of another device is dropped.

    Args:
        pace: what is known.
        report: the run.
        spent_s: its seconds in rounds, and in what was done once for all.
    """
    device = report.environment.device or ""
    calls = {name: list(sizes) for name, sizes in pace.calls.items()} if pace.device == device else {}
    rows = [(case.workload, row) for case in report.cases for row in case.rows]
    for workload, row in rows:
        if row.call_s is not None:
            sizes = calls.setdefault(kind(row.implementation, workload), [])
            sizes[:] = [each for each in sizes if each[0] != workload.flops][1 - MAX_SIZES :]
            sizes.append((float(workload.flops), row.call_s.median))
    set_up = max(0.0, report.run.seconds - spent_s) / max(1, len(rows))
    return structs.replace(pace, device=device, set_up_s=set_up, calls=calls)


class Left(Struct, frozen=True):
    """How far a run is."""

    done: float
    """From 0 to 1."""
    seconds: float
    """Until its end; below 0 where it takes longer than was estimated."""

    @property
    def words(self) -> str:
        """ "10 s left"."""
        return figures.time_left(self.seconds)


def left(session: AnySession) -> Left | None:
    """The one estimate that status line and progress bar show; None before there is any.

    It is the worker's, counted down since the worker last gave it; where the end of the case was estimated from earlier
    runs or by a timed call, it is not less than that.
    """
    known = []
    if session.record.progress is not None:
        known.append(session.record.progress.remaining_s - session.since_progress_s)
    if session.expected_s is not None:
        known.append(session.expected_s + session.once_s - session.elapsed_s)
    if not known:
        return None
    seconds = max(known)
    whole = session.elapsed_s + max(seconds, 0.0)
    return Left(min(session.elapsed_s / whole, 0.99) if whole > 0 else 0.0, seconds)
