"""Events as lines of the log; figures shown in the table are not repeated."""

from typing import Final

from attention import events as on
from attention.plan import AnyPlan
from attention.tuning.news import in_words
from fatui import figures
from fatui.journal import Level

Said = tuple[str, Level] | None
SILENT: Final = None


def narrate(event: on.AnyEvent, plan: AnyPlan) -> Said:
    """Return the log line of an event and its level, or None for events that are not logged."""
    match event:
        case on.RunStarted():
            where = event.environment
            parts = [where.device or "device n/a", where.backend or "backend n/a", f"MLX {where.mlx or 'n/a'}"]
            return f"engine up: {', '.join(parts)}", "info"
        case on.PeaksMeasured():
            peaks = event.peaks
            best = figures.flops(peaks.flops_per_s)
            return f"best rate {best}/s, copy {figures.bytes_per_second(peaks.copy_bytes_per_s)}", "info"
        case on.Message():
            return event.text, event.level
        case on.RunRefused():
            return event.reason, "error"
        case on.RunDone():
            return "all cases complete", "info"
        case on.WorkerUnusable():
            return "the device is in an unknown state; the engine is restarted", "warning"
        case on.TrialStarted() | on.Tuned() | on.Switched():
            return in_words(event), "info"
        case on.Progress():
            return SILENT
        case _:
            return _narrate_case(event, plan)


def _narrate_case(event: on.CaseEvent, plan: AnyPlan) -> Said:
    match event:
        case on.CaseStarted():
            return f"case {event.case + 1} of {len(plan.cases)}: {plan.cases[event.case].label}", "info"
        case on.RouteFound():
            return f"{event.implementation}: {event.route.path}; {event.route.reason}", "info"
        case on.Expected():
            return expected(event), "info"
        case on.RowEnded():
            level: Level = "error" if event.status == "failed" else "warning"
            return f"{event.implementation}: {event.status}: {event.reason}", level
        case on.FirstCall():
            return f"{event.implementation}: first call {figures.seconds(event.seconds)}", "info"
        case on.Checked() if not event.accurate:
            return f"{event.implementation}: inaccurate: {event.detail}", "error"
        case on.ReferenceChosen() if event.implementation != plan.ordered[0]:
            return f"speedups are relative to {event.implementation}", "info"
        case on.CaseDone(stopped_by="failed" | "nothing to run"):
            return f"case {event.case + 1} of {len(plan.cases)} ended: no implementation is left", "warning"
        case on.CaseDone():
            return f"case {event.case + 1} of {len(plan.cases)} complete, stopped by {event.stopped_by}", "info"
    return SILENT


def expected(event: on.Expected) -> str:
    """Format an estimate: "about 4 min 20 s for 5 implementations"."""
    count = event.implementations
    return f"about {figures.duration(event.seconds)} for {count} implementation{'s' if count > 1 else ''}"
