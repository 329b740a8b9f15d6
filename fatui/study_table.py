"""The study's figures beside today's, marked as the study's."""

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attention.report import Case, Report
from fatui import figures
from fatui.study import Study, StudyRow

SHOWN: Final = ("baseline", "practical", "demo")


def study_table(study: Study, report: Report) -> RenderableType:
    """A line for each case that the study has: its tokens/s and speedup, then today's, for each implementation."""
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
        line, speedup = today.get(name), row.speedup(name)
        mark = "*" if row.cold_start else " "
        table.add_row(
            shape if name == SHOWN[0] else "",
            name,
            _exactly(row.tokens_per_second(name)) + mark,
            _times(speedup, name) + mark,
            figures.tokens_per_second(line.tokens_per_second if line else None),
            figures.speedup_text(line.speedup if line else None),
        )


def _exactly(value: float | None) -> str:
    """A figure as the study prints it, not rounded again."""
    return figures.UNKNOWN if value is None else f"{value:,.0f}"


def _times(value: float | None, name: str) -> str:
    if value is None:
        return "1" if name == SHOWN[0] else figures.UNKNOWN
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"
