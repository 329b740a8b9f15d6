"""What each implementation is, which paths it took, and the throughput it reached."""

import shlex
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from attention.implementations import CATALOGUE
from attention.report import Case
from fatui import figures
from fatui.report.document import Block, Finding, Missing, Paragraph, Table, counted, joined
from fatui.report.evidence import Line, lines
from fatui.report.speed import RUN_BENCH, peak_line


def approach(cases: Sequence[Case], name: str) -> list[Block]:
    """Describe one implementation with its figures."""
    entry = next((entry for entry in CATALOGUE if entry.name == name), None)
    about = f"{entry.title}: {entry.summary}." if entry else "A user-defined implementation."
    found = lines(cases, name)
    if not found:
        command = f"{RUN_BENCH} --impl {shlex.quote(name)}"
        return [Paragraph(about), Missing(f"{name} has no accurate row with figures.", command)]
    return [Paragraph(about), _paths(found, name), *_throughput(found, cases, name)]


def _paths(found: Sequence[Line], name: str) -> Finding:
    paths = Counter(line.row.path or "an unknown path" for line in found)
    told = [f"{path} in {counted(count, 'case')}" for path, count in paths.most_common()]
    return Finding(f"{name} took {joined(told)}.")


def _throughput(found: Sequence[Line], cases: Sequence[Case], name: str) -> list[Block]:
    rates = [line.row.tokens_per_second for line in found if line.row.tokens_per_second is not None]
    best = peak_line(cases, name)
    made: list[Block] = []
    if rates and best:
        peak = f"{figures.tokens_per_second(best.row.tokens_per_second)} tokens/s"
        at = f"at most {peak}, {figures.interval_text(best.row.call_s)} a call ({best.case.workload.label})"
        mean = f"{figures.tokens_per_second(fmean(rates))} tokens/s on average over {counted(len(rates), 'case')}, "
        made.append(Finding(f"{name} reached {mean if len(rates) > 1 else ''}{at}."))
    efficiencies = [line.row.efficiency for line in found if line.row.efficiency is not None]
    if efficiencies:
        mean = f"{figures.percent(fmean(efficiencies))} on average, " if len(efficiencies) > 1 else ""
        text = f"{mean}at most {figures.percent(max(efficiencies))} of the best rate measured in the same run"
        made.append(Finding(f"Efficiency of {name}: {text}, {counted(len(efficiencies), 'case')}."))
    return made


def throughput_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    """Build the table of tokens/s and time per call, one row per case and implementation."""
    rows = []
    for case in cases:
        for row in case.rows:
            if row.implementation in names:
                rate, call = figures.tokens_per_second(row.tokens_per_second), figures.interval_text(row.call_s)
                numbers = (rate, call, figures.percent(row.efficiency), figures.error(row.max_error))
                path = row.path or figures.UNKNOWN
                rows.append((case.workload.label, row.implementation, path, *numbers, figures.word(row, case)))
    heads = ("case", "implementation", "path", "tokens/s", "per call", "efficiency", "max error", "verdict")
    return Table("Every row", heads, tuple(rows), frozenset({"implementation", "path", "verdict"}))
