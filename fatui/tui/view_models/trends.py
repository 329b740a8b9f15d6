"""What the Live pane shows of a run: trends of rates, ratios and memory, a line per device, and energy per token."""

import math
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Final, Literal, get_args

from msgspec import Struct, structs

from attention.core import statistics
from attention.core.results import MIN_ROUNDS, NoiseFloor, Report
from attention.engine.record import CaseState, RowState
from fatui import formatting
from fatui.draft import UNNAMED
from fatui.tui.view_models import cost
from fatui.tui.view_models.session import AnySession, Session
from fatui.tui.view_models.table_lines import step_text

View = Literal["common", "own", "ratio"]
VIEWS: Final[tuple[View, ...]] = get_args(View)
MEMORY: Final = ("MLX active", "MLX peak", "process", "device")
BAR: Final = 16
UNTIMED: Final = "time left: known once a call of each is timed"
STEPS: Final = ("first call", "accuracy", "memory", "warm up", "latency", "rounds")
"""The steps of an implementation on a case, in their order."""
MAX_RATIOS: Final = 1024
"""The latest rounds whose ratios are drawn."""
MIN_SPAN: Final = 0.01
"""Minimum span of a trend's own scale, relative: smaller changes are drawn as such."""
ROOM: Final = 1.6
"""The scale of ratios reaches this many times as far from the median as their outer twentieths."""


class Trend(Struct, frozen=True):
    """One trend: its label, its points, and its formatted figures."""

    label: str
    points: tuple[float, ...] = ()
    now: str = ""
    best: str = ""
    note: str = ""
    """Shown instead of points: "waiting", "failed: killed by signal 9"; with points, a second line of figures."""
    low: float = 0.0
    high: float | None = None
    """The ends of its own scale; None: that of the chart."""
    band: tuple[float, float] | None = None
    """What is shaded; a trend whose scale does not begin at zero is drawn as a line, others as an area."""
    line: float | None = None
    """The height of a dotted line."""


class Scale(Struct, frozen=True):
    """The heading of the chart, and the value at the top of its scale."""

    title: str
    highest: float = 0.0
    words: str = ""
    """What follows the title: the ends of the scale."""
    columns: tuple[str, str] = ("now", "best")


def ceiling(highest: float) -> float:
    """Round up to 1, 1.2, 1.6, 2, 3, 4, 6 or 8 times a power of ten, so that the scale seldom changes."""
    if highest <= 0:
        return 0.0
    power: float = 10 ** math.floor(math.log10(highest))
    return next(step * power for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if step * power >= highest * 0.999)


def ceiling_bytes(highest: float) -> float:
    """Round up to a power of two."""
    return float(2 ** math.ceil(math.log2(highest))) if highest > 1 else highest


def latest(session: AnySession) -> str:
    """Return the heading of the latest figures, which are not those of now once the run has ended."""
    return "now" if session.active else "last"


def from_zero(title: str, top: float, session: AnySession) -> Scale:
    """Return the heading of a scale of rates that begins at zero."""
    return Scale(title, top, f"0 to {formatting.rate(top)}" if top else "", (latest(session), "best"))


def rate_chart(
    session: AnySession, view: View = "common", reference: str | None = None
) -> tuple[Scale, tuple[Trend, ...]]:
    """Return the heading and the trends of the implementations on the current case.

    Args:
        session: the run.
        view: what is drawn.
        reference: the implementation that ratios are to, if it has figures; else that of the case.
    """
    if view == "ratio":
        return _ratio_chart(session, reference)
    highest = max((series.highest or 0.0 for series in session.rates.values()), default=0.0)
    if view == "common":
        return from_zero("tokens/s", ceiling(highest), session), rate_trends(session)
    words = "each from its lowest to highest"
    return Scale("tokens/s", ceiling(highest), words, (latest(session), "best")), rate_trends(session, own=True)


def rate_trends(session: AnySession, *, own: bool = False) -> tuple[Trend, ...]:
    """Return one trend per implementation of the plan, with a note where there are no points.

    `own`: each on a scale of its own.
    """
    trends = []
    for name in session.plan.ordered:
        series, row = session.rates.get(name), _row(session, name)
        if (row is not None and row.ended is not None) or series is None or not series.points:
            trends.append(Trend(name, note=_note(session, row)))
        else:
            trend = Trend(
                name, tuple(series.points), now=formatting.rate(series.last), best=formatting.rate(series.highest)
            )
            trends.append(_on_own_scale(trend) if own else trend)
    return tuple(trends)


def _case(session: AnySession) -> CaseState | None:
    return session.record.cases[session.case_number] if session.case_number is not None else None


def _row(session: AnySession, name: str) -> RowState | None:
    case = _case(session)
    return case.rows.get(name) if case else None


def _note(session: AnySession, row: RowState | None) -> str:
    """Return what is shown of an implementation without points."""
    if row is not None and row.ended is not None:
        return f"{row.ended.status}: {row.ended.reason}"
    if not session.active:
        return "no samples"
    return step_text(row.step) if row is not None and row.step else "waiting"


def _on_own_scale(trend: Trend) -> Trend:
    """Return the trend between its lowest and highest point, and how far these are apart, so that jitter is not taken
    for change.
    """
    low, high = min(trend.points), max(trend.points)
    least = MIN_SPAN * high
    middle, half = (low + high) / 2, max(high - low, least) / 2
    span = formatting.percent(high / low - 1) if low > 0 else formatting.UNKNOWN
    return structs.replace(trend, low=middle - half, high=middle + half, note=f"spans {span}")


def _ratio_chart(session: AnySession, other: str | None = None) -> tuple[Scale, tuple[Trend, ...]]:
    """Return each implementation's ratio to the reference by round, with the noise floor around its median shaded.

    `other`: an implementation that takes the place of the case's reference, if it has samples.
    """
    case = _case(session)
    own = case.reference if case else None
    name_of = other if other and case and own and other in case.rows and case.rows[other].samples else own
    reference = case.rows[name_of].samples if case and name_of else []
    floor = statistics.noise_floor(case.rows[own].samples, case.repeated_reference) if case and own else None
    title = f"ratio to {name_of}" if name_of else "ratio"
    words = f"band: noise floor {formatting.percent(floor.floor)}" if floor else "by round"
    columns = ("speedup", "95 %")  # the interval, and what it was after the first rounds
    trends = []
    for name in session.plan.ordered:
        row = _row(session, name)
        if row is None or row.ended is not None or not row.samples:
            trends.append(Trend(name, note=_note(session, row)))
        elif name == name_of != own:
            trends.append(Trend(name, note="the reference"))
        elif case is not None and name == name_of:
            trends.append(_ratio_trend(name, reference, case.repeated_reference, floor, note="measured again"))
        else:
            trends.append(_ratio_trend(name, reference, row.samples, floor))
    return Scale(title, 0.0, words, columns), tuple(trends)


def _ratio_trend(
    name: str, reference: Sequence[float], samples: Sequence[float], floor: NoiseFloor | None, note: str = ""
) -> Trend:
    logs = statistics.log_ratios(reference, samples)
    if len(logs) < MIN_ROUNDS:
        return Trend(name, note=f"{note or 'collecting'}: {len(logs)} of {MIN_ROUNDS} rounds")
    ratio = statistics.speedup(reference, samples, floor)
    assert ratio is not None
    ratios = [math.exp(log) for log in logs[-MAX_RATIOS:]]
    middle, width = median(ratios), floor.floor if floor else 0.0
    outer = quantiles(ratios, n=20)
    reach = ROOM * max(outer[-1] - middle, middle - outer[0], middle * width, middle * 1e-4)
    first = statistics.ratio_interval(logs[:MIN_ROUNDS])
    halves = (
        formatting.half_width(ratio) / ratio.value,
        max(math.expm1(first[2] - first[0]), -math.expm1(first[1] - first[0])),
    )
    return Trend(
        name,
        tuple(ratios),
        now="again" if note else formatting.speedup_text(ratio),
        best=f"±{formatting.percent(halves[0])}",
        low=middle - reach,
        high=middle + reach,
        band=(middle / (1 + width), middle * (1 + width)),
        line=1.0 if abs(middle - 1) < reach else None,
        note=f"from ±{formatting.percent(halves[1])}" if len(logs) > MIN_ROUNDS else "",
    )


def memory_chart(session: Session) -> tuple[Scale, tuple[Trend, ...]]:
    """Return the heading and the trends of memory; the prediction is a line in those that it is about."""
    predicted = predicted_bytes(session)
    known = {name: series for name, series in session.memory.items() if series.points}
    names = [name for name in MEMORY if name in known] + sorted(name for name in known if name not in MEMORY)
    highest = max((series.highest or 0.0 for series in known.values()), default=0.0)
    top = ceiling_bytes(max(highest, predicted or 0.0)) if known else 0.0
    made = [
        Trend(
            name,
            tuple(known[name].points),
            now=formatting.size(known[name].last),
            best=formatting.size(known[name].highest),
            line=predicted if name == "MLX peak" else None,
        )
        for name in names
    ]
    words = f"to {formatting.size(top)}" if top else ""
    if predicted is not None and "MLX peak" in names:
        words += f"; line: {formatting.size(predicted)} predicted in all"
    return Scale("memory", top, words, (latest(session), "peak")), tuple(made) or (Trend("", note="no figures yet"),)


def predicted_bytes(session: Session) -> int | None:
    """Return the bytes that the case's inputs and its hungriest implementation are predicted to need, if known."""
    case = _case(session)
    if case is None or session.case_number is None:
        return None
    routes = [row.route for row in case.rows.values() if row.route is not None and row.ended is None]
    known = [route.predicted_bytes for route in routes if route.supported and route.predicted_bytes is not None]
    return session.plan.cases[session.case_number].held_bytes + max(known) if known else None


def energy_text(session: Session, watts: float | None) -> str:
    """Format the energy of a token at a power: "energy per token at 85 W: baseline 6.0 mJ, poc 121 µJ".

    The sensor is slower than the rounds, so that all implementations are charged the same power.
    """
    rates = {name: series.last for name, series in session.rates.items() if series.last}
    if not watts or not rates:
        return ""
    each = ", ".join(f"{name} {formatting.energy(watts / rate)}" for name, rate in rates.items())
    return f"energy per token at {formatting.three(watts)} W: {each}"


def opened_line(report: Report) -> str:
    """Format the line shown instead of the progress while a past run is open."""
    run = report.run
    when = formatting.started_text(run.started)
    broken_off = ", interrupted" if run.interrupted else ""
    name = f"{run.preset or UNNAMED}, {run.id} of {when}"
    return f"A past run is open: {name}; it took {formatting.duration(run.seconds)}{broken_off}."


def progress_line(session: AnySession) -> str:
    """Format the progress of the run; below it, that of its case: the step, and the rounds."""
    progress = session.record.progress
    if not session.active:
        return f"{session.phase_text} after {formatting.duration(session.elapsed_s)}"
    if session.phase == "stopping":
        return "stopping the engine; what was measured is kept"
    if progress is None:
        return "starting the engine"
    if session.building:
        return (
            f"compiling {session.building}, {formatting.duration(session.building_s)} so far; cached for the next run"
        )
    left = cost.remaining(session)
    done = left.done if left else 0.0
    filled = round(done * BAR)
    many = len(session.plan.cases)
    case = f" · case {(session.case_number or 0) + 1} of {many}" if many > 1 else ""
    bar = "█" * filled + "░" * (BAR - filled)
    within = f"{formatting.time_left(left.case_s)} in this case · " if many > 1 and left and left.case_s else ""
    return f"{bar} {done:>4.0%}  {left.words if left else UNTIMED}{case}\n{within}{_step(session, progress.now)}"


def _step(session: AnySession, now: str) -> str:
    """Return what runs now, and before the rounds, how far the implementation and the case are."""
    name, _, step = now.partition(": ")
    names = session.plan.ordered
    if name not in names or step not in STEPS:
        return now
    return f"{name}, {names.index(name) + 1} of {len(names)}: {step}, step {STEPS.index(step) + 1} of {len(STEPS)}"


def device_lines(session: AnySession) -> list[str]:
    """Return a line for each rank: its device, what it does, and its time, waiting and bytes in the latest calls."""
    record, index = session.record, session.case_number
    rows = record.cases[index].rows if index is not None else {}
    several = len({state.started.host for state in record.ranks.values() if state.started}) > 1
    lines = []
    for rank, state in sorted(record.ranks.items()):
        alive, started = state.alive, state.started
        running = alive.running if alive else None
        where = (
            f"{started.device} of {started.host}" if started and several else started.device if started else "starting"
        )
        found = rows[running].per_rank if running in rows else ()
        own = next((each for each in found if each.rank == rank), None)
        doing = f"{running}: {formatting.rank_words(own)}" if own else running or "waits"
        parts = [f"rank {rank}  {state.failed or doing}"]
        if alive and not state.failed:
            parts.append(f"{formatting.size(alive.active_bytes)} active")
        parts.append(where)
        lines.append(" · ".join(parts))
    return lines
