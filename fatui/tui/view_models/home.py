"""What the app shows before a run: the last verdict on this machine and its trend, or what a first run will tell."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from attention.core.results import Case, Report
from attention.core.workload import Workload
from fatui import formatting
from fatui.draft import UNNAMED
from fatui.report.document import counted
from fatui.report.evidence import cpu_cores
from fatui.tui.view_models.plot import area
from fatui.untrusted_text import clip

if TYPE_CHECKING:
    from fatui.storage.history import RunHistory, RunSummary

MAX_RUNS: Final = 12
"""Maximum runs of a trend."""
MAX_READ: Final = 36
"""Maximum reports that are read to find them."""
MAX_OTHERS: Final = 12
"""Maximum runs that are listed below the latest."""
MAX_LOSSES: Final = 3
TREND_COLUMNS: Final = 24
NAME: Final = 20
"""Columns of the names of runs in their list, on narrow screens."""
FIRST: Final = """No run on {where} yet.

A first run of what is set up on the left tells
  which implementation is fastest here, and how sure that is,
  how much memory each one needs, predicted and measured,
  whether each is accurate, and which code path it took.

{run} starts it.   {presets} picks a preset.   {palette} has every action."""
KEYS: Final = "enter opens it   {again} runs it again   {run} runs what is set up"


class Past(Struct, frozen=True):
    """The latest run on a machine, and the earlier ones of the same cases, latest first."""

    report: Report
    earlier: tuple[Report, ...] = ()
    others: "tuple[RunSummary, ...]" = ()
    """Runs on the machine before the latest, of whatever cases."""


def find_past(device: str, history: "RunHistory | None" = None, *, cores: int | None = None) -> Past | None:
    """Read the latest complete run over attention shapes on a device, and those of the same cases before it.

    `cores`: those of a CPU that can be used; runs with another number are left out. None without a run, or if the
    history cannot be read. It is for a thread: reading takes a while.
    """
    from fatui.storage.history import HistoryError, RunHistory

    history = history or RunHistory()
    try:
        lines = [line for line in history.runs() if line.device == device and not line.interrupted]
        return _past(history, lines, cores)
    except HistoryError:
        return None


def _past(history: "RunHistory", lines: "Sequence[RunSummary]", cores: int | None) -> Past | None:
    latest: Report | None = None
    earlier: list[Report] = []
    for line in lines[:MAX_READ]:
        if latest is not None and line.cases != len(latest.cases):
            continue
        report = history.get(line.id)
        if not report.cases or (cores and cpu_cores(report) not in (None, cores)):
            continue
        if latest is None:
            latest = report
        elif [_compared(case) for case in report.cases] == [_compared(case) for case in latest.cases]:
            earlier.append(report)
        if len(earlier) == MAX_RUNS - 1:
            break
    if latest is None:
        return None
    before = [line for line in lines if line.id != latest.run.id]
    return Past(latest, tuple(earlier), tuple(before[:MAX_OTHERS]))


def _compared(case: Case) -> tuple[Workload, str | None]:
    """Return what speedups must share to stand in one trend: another reference gives other speedups."""
    return case.workload, case.reference


def trend(past: Past) -> tuple[str, list[float]]:
    """Return the winner of the latest run, if it has one, and its mean speedup in each run, oldest first."""
    from fatui.verdict import verdicts

    name = next((verdict.winner for verdict in verdicts(past.report)), None)
    found = []
    for report in (*reversed(past.earlier), past.report):
        line = next((line for line in report.summary if line.implementation == name and line.speedup), None)
        if line is not None and line.speedup is not None:
            found.append(line.speedup.value)
    return name or "", found


def home_text(past: Past | None, keys: dict[str, str], where: str = "this machine", width: int = 80) -> str:
    """Format the first screen; `where`: the machine that runs; `width`: of the lines of runs before the latest."""
    if past is None:
        return FIRST.format(where=where, run=keys["run"], presets=keys["presets"], palette="ctrl+p")
    from fatui.trust import trust, trust_line
    from fatui.verdict import confidence_text, headline, loss_lines, verdicts

    report, run = past.report, past.report.run
    cases = report.cases[0].workload.label if len(report.cases) == 1 else counted(len(report.cases), "case")
    found = verdicts(report)
    lines = [
        f"The last run on {where}: {f'{run.preset}, ' if run.preset else ''}{formatting.started_text(run.started)}",
        cases,
        "",
        *(headline(verdict) for verdict in found),
        *(line for verdict in found for line in loss_lines(verdict)[:MAX_LOSSES]),
        *(confidence_text(verdict) for verdict in found if verdict.winner),
        trust_line(trust(report)),
    ]
    name, values = trend(past)
    if len(values) > 1:
        top = max(values)
        (drawn,) = area(values, top, min(TREND_COLUMNS, 4 * len(values)), 1)
        span = f"{formatting.three(min(values))} to {formatting.three(top)}x"
        lines += ["", f"{name} over {len(values)} runs of the same cases  {drawn}  {span}"]
    lines += ["", KEYS.format(again=keys["run_again"], run=keys["run"])]
    if past.others:
        lines += ["", f"Before that; {keys['history']} lists all", *_lines(past.others, width)]
    return "\n".join(lines)


def _lines(runs: Sequence["RunSummary"], width: int) -> list[str]:
    """Format runs, a line for each: when, its name, as far as a third of the line has room for it, and its finding."""
    names = [run.preset or run.shape or UNNAMED for run in runs]
    column = max(NAME, min(max(map(len, names)), width // 3))
    lines = []
    for run, name in zip(runs, names, strict=True):
        finding = f"interrupted; {run.finding}" if run.interrupted else run.finding
        lines.append(clip(f"{formatting.started_text(run.started)}  {clip(name, column):<{column}}  {finding}", width))
    return lines
