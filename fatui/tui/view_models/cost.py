"""What a run takes before it is run: time, memory, what will be refused; and the time left while it is active."""

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Final

from msgspec import Struct, structs

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.plan import KnownTimes, ModelPlan, Plan, StreamPlan
from attention.core.results import MIN_ROUNDS, Report
from attention.core.stream import FULL
from attention.core.workload import Workload
from attention.engine.progress import MAX_SCALE, Forecast, costliest_cases, kind_of_call, scaled_call_s
from fatui import formatting
from fatui.draft import Draft
from fatui.storage.settings import RunSpeed
from fatui.tui.advisor import Advice
from fatui.tui.view_models import availability
from fatui.tui.view_models.session import AnySession

REFUSED: Final = "refused: "
"""How the line begins of what will not be measured."""
CANNOT: Final = "cannot run: "
"""How the line begins of what is set up with a mistake, where its cost would stand."""
NEAR: Final = 4.0
"""Calls up to this many times larger or smaller than a known one are not timed again."""


class Timing(Struct):
    """What single calls of a plan took, as the engine reports it.

    Attributes:
        running: whether it is being measured.
        device: where.
        calls: kind, FLOPs and seconds of each timed call.
        case_s: the estimated seconds of a model's cases, by index.
        weights_bytes: of the model; None if unknown.
        needs: predicted peak of an attention call by implementation, the largest of all cases.
        refused: why an implementation would not run, by name.
        problem: why nothing could be timed.
    """

    running: bool = False
    device: str = ""
    calls: list[tuple[str, float, float]] = []
    case_s: dict[int, float] = {}
    weights_bytes: int | None = None
    needs: dict[str, int] = {}
    refused: dict[str, str] = {}
    problem: str = ""

    def take(self, event: on.AnyEvent, plan: Plan | ModelPlan) -> None:
        """Take an event of the engine."""
        match event:
            case on.RunStarted(environment=where):
                self.device = where.machine or ""
            case on.CallTimed():
                kind = kind_of_call(event.implementation, plan.cases[event.case])
                self.calls.append((kind, float(event.flops), event.seconds))
            case on.CaseTimeEstimated():
                self.case_s[event.case] = event.seconds
            case on.WeightsLoaded():
                self.weights_bytes = event.weights_bytes
            case on.RouteFound(route=route) if route.supported and route.predicted_bytes is not None:
                name = event.implementation
                self.needs[name] = max(self.needs.get(name, 0), route.predicted_bytes)
            case on.RowEnded():
                self.refused[event.implementation] = event.reason
            case on.RunRefused():
                self.problem = formatting.problem_text(event).splitlines()[0]


def is_known(plan: Plan, known: KnownTimes, untimed: Collection[str] = ()) -> bool:
    """Whether calls near the costliest of each kind are known, so that none has to be timed.

    `untimed`: kinds that could not be timed: the implementation is refused, compiles first, or tries candidates.
    """
    return all(
        kind in untimed or scaled_call_s(known.calls.get(kind, []), case.flops, NEAR) is not None
        for case, kind in costliest_kinds(plan)
    )


def costliest_kinds(plan: Plan) -> list[tuple[Workload, str]]:
    """Return the costliest cases, each with a kind of its calls."""
    cases = (plan.cases[index] for index in costliest_cases(plan.cases))
    return [(case, kind_of_call(name, case)) for case in cases for name in plan.ordered]


def time_line(plan: Plan, pace: RunSpeed, device: str, timing: Timing) -> str:
    """Format how long a plan takes, and how sure its speedups will be."""
    if timing.running and estimate_s(plan, pace, device) is None:
        return "takes: not known yet, a call of each is being timed"
    return estimate_text(plan, pace, device)


def refusal_lines(draft: Draft, advice: Advice) -> list[str]:
    """Say which of the selected implementations will not be measured, in how many of several cases, and why."""
    answer, count = advice.answer, _count(draft)
    limit = availability.memory_limit(draft, advice.device)
    lines = []
    for name in draft.implementations:
        if problem := answer.problems.get(name, ""):
            lines.append(f"{name}: {problem.splitlines()[0]}")
        for reason, cases in answer.unsupported.get(name, {}).items():
            lines.append(f"{name}{_of(cases, count)}: {reason}")
        beyond = [size for size in answer.needs.get(name, ()) if limit is not None and size > limit]
        if beyond and limit is not None and not draft.force:
            needed = formatting.size(max(beyond))
            lines.append(f"{name}{_of(len(beyond), count)}: needs {needed} of {formatting.size(limit)}")
    return [f"{REFUSED}{'; '.join(lines)}"] if lines else []


def nothing_runs(draft: Draft, advice: Advice) -> bool:
    """Whether every selected implementation is known to be refused in every case."""
    answer, count = advice.answer, _count(draft)
    limit = availability.memory_limit(draft, advice.device)

    def refused(name: str) -> int:
        most = limit if limit is not None and not draft.force else None
        beyond = sum(most is not None and size > most for size in answer.needs.get(name, ()))
        return beyond + sum(answer.unsupported.get(name, {}).values())

    return count > 0 and all(answer.problems.get(name) or refused(name) >= count for name in draft.implementations)


def _count(draft: Draft) -> int:
    try:
        return len(draft.workloads())
    except UsageError:
        return 0


def _of(cases: int, count: int) -> str:
    return f", {cases} of {count} cases" if count > 1 else ""


def model_lines(plan: ModelPlan, timing: Timing) -> list[str]:
    """Format what a model's plan, or a stream's, would take: its memory, what would be refused, and its time."""
    refused = "; ".join(f"{name}: {reason}" for name, reason in timing.refused.items())
    return [_model_time(plan, timing), *([f"{REFUSED}{refused}"] if refused else []), *_model_memory(plan, timing)]


def _model_memory(plan: ModelPlan, timing: Timing) -> list[str]:
    if isinstance(plan, StreamPlan):
        return [_stream_memory(plan)]
    if timing.weights_bytes is None:
        return []
    text = ", ".join(f"{name} {formatting.size(size)}" for name, size in timing.needs.items())
    above = f"; attention above them up to {text}" if text else ""
    return [f"needs {formatting.size(timing.weights_bytes)} of weights{above}"]


def _stream_memory(plan: StreamPlan) -> str:
    """Format the keys and values of all layers: those that are kept, and all of them."""
    from attention.mlx_lm.configuration import configuration_time

    work = plan.cases[0]
    layers = _layers(work.model, configuration_time(work.model)) if work.model else 1
    kept = layers * work.workload.key_value_bytes
    whole = layers * work.tokens * work.full_workload(1).kv_token_bytes  # a stream may be longer than a workload
    every = f", full attention {formatting.size(whole)} at the last token" if FULL in plan.implementations else ""
    weights = " beside the weights" if work.model else ""
    return f"needs {formatting.size(kept)} of keys and values{every}{weights}"


@lru_cache(maxsize=1)  # a screen asks at each repaint
def _layers(model: str, _written: int) -> int:
    from attention.mlx_lm.configuration import find_model

    return find_model(model).layers


def _model_time(plan: ModelPlan, timing: Timing) -> str:
    if timing.running:
        return "takes: not known yet, a call is being timed"
    if timing.case_s:
        about = f"takes up to about {formatting.duration(sum(timing.case_s.values()))}, judging by a timed call"
        limit = f"; a row ends after {formatting.duration(plan.seconds)}" if isinstance(plan, StreamPlan) else ""
        return f"{about}{limit}"
    if isinstance(plan, StreamPlan) and not timing.problem:
        longest = formatting.duration(plan.seconds * len(plan.ordered) * len(plan.cases))
        return f"takes at most {longest}: {formatting.duration(plan.seconds)} a row, less if its tokens are done sooner"
    return f"takes: not known, {timing.problem or 'it is estimated from a timed call once the run has begun'}"


MAX_SIZES: Final = 16
"""Number of sizes remembered per kind of call."""


def known_times(pace: RunSpeed, device: str) -> KnownTimes:
    """Return what is known of the calls on a device."""
    if not device or pace.device != device:
        return KnownTimes()
    return KnownTimes(calls=pace.calls, set_up_s=pace.set_up_s or None)


def estimate_s(plan: Plan, pace: RunSpeed, device: str, max_scale: float = MAX_SCALE) -> float | None:
    """Estimate the maximum seconds of a run; rounds that reach their precision end earlier.

    None if no call of a case's kind is known that is at most `max_scale` times as large or small: times of training in
    bfloat16 do not predict those of decode.
    """
    forecast, cases = Forecast(plan, known_times(pace, device)), range(len(plan.cases))
    return sum(map(forecast.case_s, cases)) if all(forecast.knows_any(case, max_scale) for case in cases) else None


def least_rounds_text(plan: Plan, pace: RunSpeed, device: str) -> str:
    """Say that the rounds of a case take longer than their time, since a least number of them is made; else nothing."""
    forecast = Forecast(plan, known_times(pace, device))
    longest = max((forecast.rounds_s(case) for case in range(len(plan.cases))), default=0.0)
    if longest <= plan.seconds:
        return ""
    limit = formatting.duration(plan.seconds)
    return f"; {MIN_ROUNDS} rounds, the fewest, take {formatting.duration(longest)}, not {limit}"


def call_times(
    workload: Workload, names: Sequence[str], pace: RunSpeed, device: str, launch_s: float | None = None
) -> dict[str, availability.CallTime]:
    """Return the times of a call of the implementations that earlier runs on the device allow to estimate.

    `launch_s`: seconds of the smallest call on the device, which none falls below, if known.
    """
    known, found = known_times(pace, device).calls, {}
    for name in names:
        sizes = known.get(kind_of_call(name, workload), [])
        seconds = scaled_call_s(sizes, workload.flops, fixed_s=launch_s or 0.0)
        if seconds is not None:
            found[name] = availability.CallTime(seconds, all(flops != workload.flops for flops, _ in sizes))
    return found


def expected_width(plan: Plan, pace: RunSpeed, device: str) -> float | None:
    """Estimate the half width of the speedups' intervals, relative, from earlier runs; None without any.

    It shrinks with the square root of the time, down to the precision at which rounds end.
    """
    if not device or pace.device != device or not pace.width_1s:
        return None
    return max(pace.width_1s / math.sqrt(plan.seconds), min(plan.precision, pace.width_1s))


def estimate_text(plan: Plan, pace: RunSpeed, device: str) -> str:
    """Format the estimate, or the reason why there is none, in one line."""
    near_s = estimate_s(plan, pace, device)
    seconds = estimate_s(plan, pace, device, math.inf) if near_s is None else near_s
    width = expected_width(plan, pace, device)
    sure = f"; speedups to about ±{formatting.percent(width)}" if width and width <= formatting.WIDE else ""
    if seconds is not None:
        basis = "earlier runs here" if pace.set_up_s else "a timed call of each"
        if near_s is None:
            basis = "calls of very different sizes"
        longer = least_rounds_text(plan, pace, device)
        return f"takes up to about {formatting.duration(seconds)}, judging by {basis}{longer}{sure}"
    rounds = formatting.duration(plan.seconds * len(plan.cases))
    return (
        f"takes {rounds} of rounds, longer if {MIN_ROUNDS} rounds do, and set-up; "
        "the total is known after the first run of this kind"
    )


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


def _estimated_left_s(session: AnySession) -> float | None:
    known, progress = [], session.record.progress
    if progress is not None and progress.sure:
        known.append(progress.left_s(session.since_progress_s))
    if session.expected_s is not None:
        known.append(session.expected_s + session.once_s - session.elapsed_s)
    return max(known, default=None)


def note_time_left(session: AnySession) -> None:
    """Keep the least time left of a run so far, which bounds how far the estimate shown may grow."""
    estimated = _estimated_left_s(session)
    if estimated is not None:
        session.least_left_s = min(session.least_left_s, max(estimated, 0.0))


def remaining(session: AnySession) -> Remaining | None:
    """Return the estimate shown by both status line and progress bar; None before there is any.

    It is the worker's last estimate, counted down, but not less than an estimate of the case from earlier runs or a
    timed call, and not more than MAX_GROWTH times the least one before. There is none as long as the worker guesses,
    since no call was timed.
    """
    estimated = _estimated_left_s(session)
    if estimated is None:
        return None
    progress = session.record.progress
    seconds = min(estimated, MAX_GROWTH * max(session.least_left_s, SOON_S))
    whole = session.elapsed_s + max(seconds, 0.0)
    case_s = progress.case_left_s(session.since_progress_s) if progress is not None and progress.sure else None
    done = min(session.elapsed_s / whole, 0.99) if whole > 0 else 0.0
    return Remaining(done, seconds, min(case_s, seconds) if case_s else case_s, at_least=seconds < estimated)
