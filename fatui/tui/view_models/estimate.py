"""Run time estimates: from earlier runs before a run starts, and from its own progress while it is active."""

import math
from collections.abc import Sequence
from typing import Final

from msgspec import Struct, structs

from attention.core.plan import Plan
from attention.core.results import Report
from attention.core.workload import Workload
from attention.engine.progress import case_s, counterpart_calls
from attention.engine.progress import timing_group as kind_of_case
from fatui import formatting
from fatui.storage.settings import RunSpeed
from fatui.tui.view_models.session import AnySession

MAX_SCALE: Final = 64.0
"""A call of this many times more or fewer FLOPs than all known ones is not estimated from them."""
MAX_SIZES: Final = 16
"""Number of sizes remembered per kind of call."""


def timing_group(name: str, workload: Workload) -> str:
    """Return the kind of calls that can be estimated from each other: "poc float16 forward"."""
    return f"{name} {kind_of_case(workload)}"


def estimate_s(plan: Plan, pace: RunSpeed, device: str) -> float | None:
    """Estimate the maximum seconds of a run; rounds that reach their precision end earlier.

    None if no call of a case's kind is known: times of training in bfloat16 do not predict those of decode.
    """
    if not device or pace.device != device:
        return None
    total = 0.0
    for case in plan.cases:
        known = [_call_s(pace.calls.get(timing_group(name, case), []), case.flops) for name in plan.ordered]
        calls = [seconds for seconds in known if seconds is not None]
        if not calls:
            return None
        mean = sum(calls) / len(calls)  # used for the unknown ones
        calls = [mean if seconds is None else seconds for seconds in known]
        beside = counterpart_calls(calls, case, plan.seconds)
        total += case_s(calls, plan.seconds, beside) + pace.set_up_s * len(plan.implementations)
    return total


def _call_s(known: list[tuple[float, float]], flops: float) -> float | None:
    """Scale the time of the known call nearest in size."""
    if not known or flops <= 0:
        return None
    size, seconds = min(known, key=lambda each: abs(math.log(each[0] / flops)))
    return seconds * flops / size if 1 / MAX_SCALE <= flops / size <= MAX_SCALE else None


def call_times(workload: Workload, names: Sequence[str], pace: RunSpeed, device: str) -> dict[str, float]:
    """Return seconds of a call of the implementations that earlier runs on the device allow to estimate."""
    if not device or pace.device != device:
        return {}
    found = {name: _call_s(pace.calls.get(timing_group(name, workload), []), workload.flops) for name in names}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def expected_width(plan: Plan, pace: RunSpeed, device: str) -> float | None:
    """Estimate the half width of the speedups' intervals, relative, from earlier runs; None without any.

    It shrinks with the square root of the time, down to the precision at which rounds end.
    """
    if not device or pace.device != device or not pace.width_1s:
        return None
    return max(pace.width_1s / math.sqrt(plan.seconds), min(plan.precision, pace.width_1s))


def estimate_text(plan: Plan, pace: RunSpeed, device: str) -> str:
    """Format the estimate, or the reason why there is none, in one line."""
    seconds = estimate_s(plan, pace, device)
    width = expected_width(plan, pace, device)
    sure = f"; speedups to about ±{formatting.percent(width)}" if width and width <= formatting.WIDE else ""
    if seconds is not None:
        return f"takes up to about {formatting.duration(seconds)}, judging by earlier runs here{sure}"
    rounds = formatting.duration(plan.seconds * len(plan.cases))
    return f"takes up to {rounds} of rounds, and set-up; the total is known after the first run of this kind"


def learn(pace: RunSpeed, report: Report, spent_s: float) -> RunSpeed:
    """Add the timings of a complete run; those of another device are dropped.

    Args:
        pace: the known timings.
        report: the run.
        spent_s: the seconds it spent in rounds and in steps done once per run.
    """
    device = report.environment.machine or ""
    calls = {name: list(sizes) for name, sizes in pace.calls.items()} if pace.device == device else {}
    rows = [(case.workload, row) for case in report.cases for row in case.rows]
    for workload, row in rows:
        if row.call_s is not None:
            sizes = calls.setdefault(timing_group(row.implementation, workload), [])
            sizes[:] = [each for each in sizes if each[0] != workload.flops][1 - MAX_SIZES :]
            sizes.append((float(workload.flops), row.call_s.median))
    set_up = max(0.0, report.run.seconds - spent_s) / max(1, len(rows))
    halves = [formatting.half_width(row.speedup) / row.speedup.value for _, row in rows if row.speedup]
    width = max(halves, default=0.0) * math.sqrt(max(spent_s / max(1, len(report.cases)), 0.0))
    return structs.replace(pace, device=device, set_up_s=set_up, calls=calls, width_1s=width)


class Remaining(Struct, frozen=True):
    """The progress of a run, and its time left."""

    done: float
    """Completed fraction, 0 to 1."""
    seconds: float
    """Seconds to the end; negative if the run takes longer than estimated."""

    @property
    def words(self) -> str:
        """The time left as text: "10 s left"."""
        return formatting.time_left(self.seconds)


def remaining(session: AnySession) -> Remaining | None:
    """Return the estimate shown by both status line and progress bar; None before there is any.

    It is the worker's last estimate, counted down, but not less than an estimate of the case from earlier runs or a
    timed call.
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
    return Remaining(min(session.elapsed_s / whole, 0.99) if whole > 0 else 0.0, seconds)
