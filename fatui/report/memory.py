"""Memory above the inputs and relative to the reference, from the separate memory passes."""

from collections.abc import Sequence
from typing import Final

from attention.report import AnyCase, Case
from fatui import figures
from fatui.report.document import Block, Finding, Missing, Table, counted
from fatui.report.evidence import Line, sound

MIN_SHARE: Final = 0.05
"""Minimum difference worth reporting, as a share of the reference's peak."""


def memory_table(cases: Sequence[Case], names: Sequence[str]) -> Table:
    """Build the table of peaks above the inputs, outputs included, with their ratio to the inputs."""
    rows = []
    for case in cases:
        peaks = {row.implementation: row.peak_bytes for row in sound(case)}
        held = case.workload.input_bytes
        cells = [_peak(peaks.get(name), held) for name in names]
        rows.append((case.workload.label, figures.size(held), figures.size(case.workload.output_bytes), *cells))
    caption = "Peak above the inputs while one call runs, outputs included; in brackets as a multiple of the inputs"
    return Table(caption, ("case", "inputs", "outputs", *names), tuple(rows))


def _peak(peak: int | None, inputs: int) -> str:
    return figures.UNKNOWN if peak is None else f"{figures.size(peak)} ({figures.three(peak / inputs)}x)"


def savings(cases: Sequence[AnyCase], name: str) -> Finding | None:
    """Return how much less memory than the reference an implementation takes, or None if next to nothing."""
    found = [(saved, line, whole) for case in cases for saved, line, whole in _saved(case, name)]
    if not found:
        return None
    most, line, whole = max(found, key=lambda each: each[0])
    least, worst, _ = min(found, key=lambda each: each[0])
    if most < MIN_SHARE:
        return None
    peak = f"{figures.size(line.row.peak_bytes)} instead of {line.case.reference}'s {figures.size(whole)}"
    text = f"{name} takes {'up to ' if len(found) > 1 else ''}{_less(most)}: {peak} ({line.case.workload.label})"
    if least <= -MIN_SHARE:
        text += f"; on {worst.case.workload.label} it takes {_more(-least)}"
    elif len(found) > 1 and least >= MIN_SHARE:
        text += f"; at least {_less(least)} in each of {counted(len(found), 'case')}"
    return Finding(f"{text}.")


def _less(share: float) -> str:
    """Format a saved share: a percentage, or a factor above 2."""
    if share >= 1:
        return "no measurable memory"
    return f"{f'{figures.three(1 / (1 - share))} times' if share > 0.5 else figures.percent(share)} less memory"


def _more(share: float) -> str:
    """Format an additional share: a percentage, or a factor above 2."""
    return f"{figures.three(1 + share)} times as much" if share > 1 else f"{figures.percent(share)} more"


def _saved(case: AnyCase, name: str) -> list[tuple[float, Line, int]]:
    peaks = {row.implementation: row.peak_bytes for row in sound(case)}
    whole = peaks.get(case.reference) if case.reference and case.reference != name else None
    return [
        (1 - row.peak_bytes / whole, Line(case, row), whole)
        for row in sound(case)
        if row.implementation == name and row.peak_bytes is not None and whole
    ]


def largest_saving(cases: Sequence[AnyCase], names: Sequence[str]) -> Finding | None:
    """Return the memory finding of the implementation with the largest saving on one case."""
    most = {name: max((saved for case in cases for saved, _, _ in _saved(case, name)), default=0.0) for name in names}
    best = max(most, key=lambda name: most[name], default=None)
    return savings(cases, best) if best else None


def memory_blocks(cases: Sequence[Case], names: Sequence[str]) -> list[Block]:
    """Return the memory table and its findings."""
    if not any(row.peak_bytes is not None for case in cases for row in sound(case)):
        return [Missing("No run has measured memory.", "fatui bench seed-table")]
    found = [finding for name in names if (finding := savings(cases, name))]
    return [*found, memory_table(cases, names)]
