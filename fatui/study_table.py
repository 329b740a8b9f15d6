"""A table of the study's figures beside the measured ones."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attention.report import Case, Report
from fatui import figures
from fatui.study import SHOWN, Study, StudyRow, rate_text, times_text


def study_table(study: Study, report: Report) -> RenderableType:
    """Build a block per case of the study: its tokens/s and speedup, then the measured ones, per implementation."""
    title = Text(study.title, style="bold").append(f" · {study.machine} · not measured here", style="not bold dim")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("")
    for head in ("implementation", "study tokens/s", "study speedup", "today tokens/s", "today speedup"):
        table.add_column(head, justify="left" if head == "implementation" else "right", no_wrap=True)
    for case in report.cases:
        row = study.row_for(case.workload)
        if row:
            _add(table, row, case)
    return Group(title, table, Text(f"  * {study.note}", style="dim"))


def _add(table: Table, row: StudyRow, case: Case) -> None:
    today = {line.implementation: line for line in case.rows}
    shape = f"B={row.batch} L={row.seq} D={row.head_dim}"
    for name in SHOWN:
        line = today.get(name)
        gap = "" if row.cold_start else " "  # the width of the star, so that figures align
        table.add_row(
            shape if name == SHOWN[0] else "",
            name,
            rate_text(row, name) + gap,
            times_text(row, name) + gap,
            figures.tokens_per_second(line.tokens_per_second if line else None),
            figures.speedup_text(line.speedup if line else None),
        )
