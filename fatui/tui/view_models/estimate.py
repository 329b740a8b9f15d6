"""Run time estimates: from earlier runs before a run starts, and from its own progress while it is active."""

import math
from collections.abc import Sequence
from typing import Final

from msgspec import Struct, structs

from attention.core.plan import KnownTimes, Plan
from attention.core.results import Report
from attention.core.workload import Workload
from attention.engine.progress import Forecast, kind_of_call, scaled_call_s
from fatui import formatting
from fatui.storage.settings import RunSpeed
from fatui.tui.view_models.session import AnySession

MAX_SIZES: Final = 16
"""Number of sizes remembered per kind of call."""


def known_times(pace: RunSpeed, device: str) -> KnownTimes:
    """Return what is known of the calls on a device."""
    if not device or pace.device != device:
        return KnownTimes()
    return KnownTimes(calls=pace.calls, set_up_s=pace.set_up_s or None)


def estimate_s(plan: Plan, pace: RunSpeed, device: str) -> float | None:
    """Estimate the maximum seconds of a run; rounds that reach their precision end earlier.

    None if no call of a case's kind is known: times of training in bfloat16 do not predict those of decode.
    """
    forecast, cases = Forecast(plan, known_times(pace, device)), range(len(plan.cases))
    return sum(map(forecast.case_s, cases)) if all(map(forecast.knows_any, cases)) else None


def call_times(workload: Workload, names: Sequence[str], pace: RunSpeed, device: str) -> dict[str, float]:
    """Return seconds of a call of the implementations that earlier runs on the device allow to estimate."""
    known = known_times(pace, device).calls
    found = {name: scaled_call_s(known.get(kind_of_call(name, workload), []), workload.flops) for name in names}
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
        basis = "earlier runs here" if pace.set_up_s else "a timed call of each"
        return f"takes up to about {formatting.duration(seconds)}, judging by {basis}{sure}"
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
    rows = [(case.workload, row) for case in report.cases for row in case.rows]
    timed = [
        (kind_of_call(row.implementation, workload), float(workload.flops), row.call_s.median)
        for workload, row in rows
        if row.call_s is not None
    ]
    set_up = max(0.0, report.run.seconds - spent_s) / max(1, len(rows))
    halves = [formatting.half_width(row.speedup) / row.speedup.value for _, row in rows if row.speedup]
    width = max(halves, default=0.0) * math.sqrt(max(spent_s / max(1, len(report.cases)), 0.0))
    return structs.replace(learn_calls(pace, device, timed), set_up_s=set_up, width_1s=width)


def learn_calls(pace: RunSpeed, device: str, timed: Sequence[tuple[str, float, float]]) -> RunSpeed:
    """Add single calls, each of a kind, FLOPs and seconds; those of another device are dropped."""
    same = pace.device == device
    calls = {name: list(sizes) for name, sizes in pace.calls.items()} if same else {}
    for kind, flops, call_s in timed:
        sizes = calls.setdefault(kind, [])
        sizes[:] = [each for each in sizes if each[0] != flops][1 - MAX_SIZES :]
        sizes.append((flops, call_s))
    return structs.replace(pace if same else RunSpeed(), device=device, calls=calls)


MAX_GROWTH: Final = 3.0
"""An estimate that grows beyond this many times the least that was shown is shown as "more than" that."""
SOON_S: Final = 2.0
"""Less time left than this counts as this for that."""


class Remaining(Struct, frozen=True):
    """The progress of a run, and its time left."""

    done: float
    """Completed fraction, 0 to 1."""
    seconds: float
    """Seconds to the end; negative if the run takes longer than estimated."""
    case_s: float | None = None
    """Seconds to the end of the case."""
    at_least: bool = False
    """Whether the estimate is longer: it has grown by more than MAX_GROWTH."""

    @property
    def words(self) -> str:
        """The time left as text: "10 s left", "more than 30 s left"."""
        return f"{'more than ' if self.at_least else ''}{formatting.time_left(self.seconds)}"


def remaining(session: AnySession) -> Remaining | None:
    """Return the estimate shown by both status line and progress bar; None before there is any.

    It is the worker's last estimate, counted down, but not less than an estimate of the case from earlier runs or a
    timed call, and not more than MAX_GROWTH times the least one before. There is none as long as the worker guesses,
    since no call was timed.
    """
    known, progress = [], session.record.progress
    if progress is not None and progress.sure:
        known.append(progress.left_s(session.since_progress_s))
    if session.expected_s is not None:
        known.append(session.expected_s + session.once_s - session.elapsed_s)
    if not known:
        return None
    estimated = max(known)
    seconds = min(estimated, MAX_GROWTH * max(session.least_left_s, SOON_S))
    session.least_left_s = min(session.least_left_s, max(estimated, 0.0))
    whole = session.elapsed_s + max(seconds, 0.0)
    case_s = progress.case_left_s(session.since_progress_s) if progress is not None and progress.sure else None
    done = min(session.elapsed_s / whole, 0.99) if whole > 0 else 0.0
    return Remaining(done, seconds, min(case_s, seconds) if case_s else case_s, at_least=seconds < estimated)
