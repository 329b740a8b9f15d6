"""The rows that support no claim, and why."""

from collections import Counter
from collections.abc import Sequence

from attention.report import AnyCase
from fatui import figures
from fatui.report.document import Block, Paragraph, Table, counted, joined
from fatui.report.evidence import unsound


def trouble(cases: Sequence[AnyCase]) -> list[Block]:
    """Count the rows that are not sound, and list them."""
    found = unsound(cases)
    total = sum(len(case.rows) for case in cases)
    if not found:
        return [Paragraph(f"All of {counted(total, 'row')} ran and passed the accuracy check.")]
    counts = Counter("with too few rounds" if line.row.collecting else line.row.status for line in found)
    told = joined([f"{count} {status}" for status, count in counts.most_common()])
    rows = tuple(
        (line.case.workload.label, line.row.implementation, figures.verdict(line.row, line.case)) for line in found
    )
    table = Table(
        "Rows without a claim", ("case", "implementation", "verdict"), rows, frozenset({"implementation", "verdict"})
    )
    return [Paragraph(f"Of {counted(total, 'row')}: {told}. Nothing in this report is claimed from them."), table]
