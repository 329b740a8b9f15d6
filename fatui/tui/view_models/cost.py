"""The block of a set-up: its time, its memory by implementation, and what will be refused, before it is run."""

from collections.abc import Collection
from functools import lru_cache
from typing import Final

from msgspec import Struct

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.plan import KnownTimes, ModelPlan, Plan, StreamPlan
from attention.core.stream import FULL
from attention.core.workload import Workload
from attention.engine.progress import costliest_cases, kind_of_call, scaled_call_s
from fatui import formatting
from fatui.draft import Draft
from fatui.storage.settings import RunSpeed
from fatui.tui.advisor import Advice
from fatui.tui.view_models import availability, estimate

REFUSED: Final = "refused: "
"""How the line begins of what will not be measured."""
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
    if timing.running and estimate.estimate_s(plan, pace, device) is None:
        return "takes: not known yet, a call of each is being timed"
    return estimate.estimate_text(plan, pace, device)


def refusal_lines(draft: Draft, advice: Advice) -> list[str]:
    """Say which of the selected implementations will not be measured, in how many of several cases, and why."""
    answer, count = advice.answer, _count(draft)
    most = availability.memory_limit(draft, advice.device)
    lines = []
    for name in draft.implementations:
        if problem := answer.problems.get(name, ""):
            lines.append(f"{name}: {problem.splitlines()[0]}")
        for reason, cases in answer.unsupported.get(name, {}).items():
            lines.append(f"{name}{_of(cases, count)}: {reason}")
        beyond = [size for size in answer.needs.get(name, ()) if most is not None and size > most]
        if beyond and most is not None and not draft.force:
            needed = formatting.size(max(beyond))
            lines.append(f"{name}{_of(len(beyond), count)}: needs {needed} of {formatting.size(most)}")
    return [f"{REFUSED}{'; '.join(lines)}"] if lines else []


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


@lru_cache(maxsize=1)  # a screen asks at each repaint, and a model's layers are in a file
def _stream_memory(plan: StreamPlan) -> str:
    """Format the keys and values of all layers: those that are kept, and all of them."""
    from attention.mlx_lm.configuration import find_model

    work = plan.cases[0]
    layers = find_model(work.model).layers if work.model else 1
    kept, whole = (layers * each.key_value_bytes for each in (work.workload, work.full_workload(work.tokens)))
    every = f", full attention {formatting.size(whole)} at the last token" if FULL in plan.implementations else ""
    weights = " beside the weights" if work.model else ""
    return f"needs {formatting.size(kept)} of keys and values{every}{weights}"


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
