"""The rows that a report may use: those of one machine, each case once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from msgspec import Struct

from attention.core.results import (
    AnyCase,
    Case,
    Environment,
    FineTuningCase,
    ModelCase,
    Report,
    Row,
    StreamCase,
    in_order,
)
from fatui import formatting
from fatui.report.document import Block, Paragraph, Table, counted, joined
from fatui.verdict import is_sound

C = TypeVar("C", Case, ModelCase, FineTuningCase, StreamCase)


class EvidenceRow(Struct, frozen=True):
    """A row with its case."""

    case: AnyCase
    row: Row


class Evidence(Struct, frozen=True):
    """The measurements of one machine with one set of versions, newest run last.

    Speedups are the paired ones, within a case of one run; nothing is compared across runs.
    """

    environment: Environment
    runs: tuple[Report, ...]
    cases: tuple[Case, ...]
    models: tuple[ModelCase, ...]
    fine_tunings: tuple[FineTuningCase, ...]
    streams: tuple[StreamCase, ...]
    repeated: int
    """Number of cases left out because a later run measured them again."""

    @property
    def implementations(self) -> tuple[str, ...]:
        """All implementations, in the order of their first appearance."""
        everything: tuple[AnyCase, ...] = (*self.cases, *self.models, *self.fine_tunings)
        return tuple(dict.fromkeys(row.implementation for case in everything for row in case.rows))


def gather(reports: Sequence[Report]) -> tuple[Evidence, ...]:
    """Group reports by machine and versions, in the order of their first run.

    On a CPU another number of cores is another machine. A run stopped in its first case does not know its cores: it is
    apart only from runs of several numbers of them.
    """
    counts: dict[Environment, set[int]] = {}
    for report in reports:
        if cores := cpu_cores(report):
            counts.setdefault(report.environment, set()).add(cores)
    groups: dict[tuple[Environment, int | None], list[Report]] = {}
    for report in in_order(reports):
        several = len(counts.get(report.environment, ())) > 1
        groups.setdefault((report.environment, cpu_cores(report) if several else None), []).append(report)
    return tuple(_evidence(where, runs) for (where, _), runs in groups.items())


def cpu_cores(report: Report) -> int | None:
    """Return the number of cores that a run on a CPU could use; None if it is not known, and on a GPU."""
    return report.conditions.cores if report.conditions and report.environment.backend == "cpu" else None


def _evidence(environment: Environment, runs: Sequence[Report]) -> Evidence:
    cases = newest(case for run in runs for case in run.cases)
    models = newest(case for run in runs for case in run.models)
    tunings = newest(case for run in runs for case in run.fine_tunings)
    streams = newest(case for run in runs for case in run.streams)
    kept = len(cases) + len(models) + len(tunings) + len(streams)
    return Evidence(
        environment=environment,
        runs=tuple(runs),
        cases=cases,
        models=models,
        fine_tunings=tunings,
        streams=streams,
        repeated=sum(len(run.all_cases) for run in runs) - kept,
    )


def newest(cases: Iterable[C]) -> tuple[C, ...]:
    """Return each workload once, as its latest case that has figures, or its latest."""
    found: dict[object, C] = {}
    for case in cases:
        if case.workload not in found or any(row.call_s for row in case.rows):
            found[case.workload] = case
    return tuple(found.values())


def sound_rows(case: AnyCase) -> Iterator[Row]:
    """Yield the rows that can support a claim: accurate, and with enough rounds."""
    return filter(is_sound, case.rows)


def evidence_rows(cases: Sequence[AnyCase], name: str) -> list[EvidenceRow]:
    """Return an implementation's sound rows."""
    return [EvidenceRow(case, row) for case in cases for row in sound_rows(case) if row.implementation == name]


def unsound(cases: Sequence[AnyCase]) -> list[EvidenceRow]:
    """Return the rows that support no claim: failed, refused, unsupported, inaccurate, or with too few rounds."""
    return [EvidenceRow(case, row) for case in cases for row in case.rows if row.status != "ok" or row.collecting]


def unsound_rows(cases: Sequence[AnyCase]) -> list[Block]:
    """Count the rows that are not sound, and list them."""
    found = unsound(cases)
    total = sum(len(case.rows) for case in cases)
    if not found:
        return [Paragraph(f"All of {counted(total, 'row')} ran and passed the accuracy check.")]
    counts = Counter("with too few rounds" if line.row.collecting else line.row.status for line in found)
    statuses = joined([f"{count} {status}" for status, count in counts.most_common()])
    rows = tuple(
        (line.case.workload.label, line.row.implementation, formatting.verdict(line.row, line.case)) for line in found
    )
    table = Table(
        "Rows without a claim", ("case", "implementation", "verdict"), rows, frozenset({"implementation", "verdict"})
    )
    return [Paragraph(f"Of {counted(total, 'row')}: {statuses}. Nothing in this report is claimed from them."), table]
