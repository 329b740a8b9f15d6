"""Runs of several machines side by side: speedups within each machine, ratios of times between them marked as such."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from attention.core import statistics
from attention.core.results import AnyCase, Ratio, Report, Row
from fatui import formatting
from fatui.report.comparison import AnyWorkload
from fatui.untrusted_text import markdown_cell

ACROSS: Final = "across"
NOTE: Final = (
    "Speedups are each machine's own, over its reference in the same rounds. A ratio marked 'across' compares times of "
    "different machines: it includes all that differs between them."
)


class MachineRow(Struct, frozen=True, kw_only=True):
    """One implementation on one machine."""

    machine: int
    """Number of the machine, from 0."""
    case: AnyCase
    row: Row
    across: Ratio | None
    """Time on the first machine that has the row over the time here; above 1 is faster here. None on that machine."""


class MachineTable(Struct, frozen=True, kw_only=True):
    """The rows of several machines."""

    machines: tuple[str, ...]
    """Device and backend of each."""
    rows: dict[tuple[AnyWorkload, str], tuple[MachineRow, ...]]
    """By workload and implementation; of repeated cases those of the latest run."""
    notes: tuple[str, ...]


def by_machine(reports: Sequence[Report]) -> MachineTable:
    """Put the rows of runs side by side, those of one device and backend together."""
    machines: dict[str, int] = {}
    found: dict[tuple[AnyWorkload, str], dict[int, tuple[AnyCase, Row]]] = {}
    versions: dict[str, dict[str, None]] = {}
    for report in sorted(reports, key=lambda each: each.run.started):
        name = machine_name(report)
        number = machines.setdefault(name, len(machines))
        versions.setdefault(name, {})[f"fatui {report.environment.fatui}, MLX {report.environment.mlx}"] = None
        for case in report.all_cases:
            for row in case.rows:
                before = found.setdefault((case.workload, row.implementation), {})
                if number not in before or row.call_s:
                    before[number] = case, row
    notes = [
        f"{name}: runs of different versions: {'; '.join(each)}" for name, each in versions.items() if len(each) > 1
    ]
    notes += [f"{report.run.id}: edited since it was written" for report in reports if report.edited]
    return MachineTable(
        machines=tuple(machines),
        rows={key: _beside(each) for key, each in found.items()},
        notes=tuple(notes),
    )


def machine_name(report: Report) -> str:
    """Return the device and the backend of a run."""
    where = report.environment
    return f"{where.machine or 'unknown device'}, {where.backend or 'unknown backend'}"


def _beside(found: dict[int, tuple[AnyCase, Row]]) -> tuple[MachineRow, ...]:
    first = next((found[number] for number in sorted(found) if found[number][1].call_s), None)
    return tuple(
        MachineRow(machine=number, case=case, row=row, across=_across(first, (case, row)))
        for number, (case, row) in sorted(found.items())
    )


def _across(first: tuple[AnyCase, Row] | None, here: tuple[AnyCase, Row]) -> Ratio | None:
    if first is None or first[1] is here[1] or first[1].call_s is None or here[1].call_s is None:
        return None
    floor = statistics.repeated_floor([case.noise_floor for case, _ in (first, here) if case.noise_floor])
    return statistics.ratio_of_medians(first[1].call_s, here[1].call_s, floor)


HEADS: Final = ("implementation", "machine", "per call", "tokens/s", "speedup", ACROSS, "memory", "status")


def cells(name: str, entry: MachineRow) -> tuple[str, ...]:
    """Return the texts of a row, in the order of HEADS."""
    row = entry.row
    reference = entry.case.reference
    speedup = "reference" if name == reference else formatting.speedup_text(row.speedup)
    return (
        name,
        f"[{entry.machine + 1}]",
        formatting.interval_text(row.call_s),
        formatting.tokens_per_second(row.tokens_per_second),
        speedup,
        f"{ACROSS} {formatting.speedup_text(entry.across)}" if entry.across else "",
        formatting.size(row.peak_bytes),
        row.status,
    )


def labels(table: MachineTable) -> dict[str, list[tuple[str, MachineRow]]]:
    """Return the rows by the label of their workload."""
    groups: dict[str, list[tuple[str, MachineRow]]] = {}
    for (workload, name), entries in table.rows.items():
        groups.setdefault(workload.label, []).extend((name, entry) for entry in entries)
    return groups


def to_markdown(table: MachineTable) -> str:
    """Format the rows of several machines as Markdown."""
    lines = [f"{number}. {markdown_cell(name)}" for number, name in enumerate(table.machines, 1)]
    for label, rows in labels(table).items():
        lines += ["", f"### {markdown_cell(label)}", "", f"| {' | '.join(HEADS)} |", f"|{' --- |' * len(HEADS)}"]
        lines += [f"| {' | '.join(map(markdown_cell, cells(name, entry)))} |" for name, entry in rows]
    lines += ["", NOTE, *(f"- {markdown_cell(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"
