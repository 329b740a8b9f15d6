"""A report as tables for a terminal: they fit in 100 columns; a narrower one drops columns, with a note."""

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attention.report import AnyCase, Case, Report
from fatui import figures
from fatui.columns import IMPLEMENTATION, Column, shortened, starred
from fatui.foreign_text import cleaned
from fatui.model_columns import model_columns, model_notes
from fatui.study import Study

WIDTH: Final = 100
NARROWEST_PATH: Final = 8
SMALL_RATE: Final = 1e12
"""Rates below this many FLOP/s are shown in GFLOP/s, since they would be mostly zeros in TFLOP/s."""
DROPPED_FIRST: Final = (
    *(("TFLOP/s", "GFLOP/s"), ("error", "off"), ("eff.", "loss"), ("path",)),
    *(("per call", "to 1st token", "per token", "per iteration"), ("memory",)),
)
TEXTS: Final = (IMPLEMENTATION, "path", "verdict")
STYLES: Final = {"fastest": "bold green", "faster": "green", "slower": "yellow", "same": "", "base": "", "ok": ""}


def report_table(report: Report, study: Study | None = None, width: int = WIDTH) -> RenderableType:
    """Render all cases of a report, their geometric means, the study's figures if given, and the finding."""
    report = cleaned(report)
    cases, count = report.all_cases, len(report.all_cases)
    parts: list[RenderableType] = []
    unit = _rate_unit(cases)
    layouts = [_columns(case, unit) if isinstance(case, Case) else model_columns(case) for case in cases]
    for aligned in zip(*layouts, strict=True):
        widest = max(column.width for column in aligned)
        for column in aligned:
            column.width = widest
    for number, (case, columns) in enumerate(zip(cases, layouts, strict=True), start=1):
        parts += [_case(case, columns, number if count > 1 else None, count, width), Text()]
    if len(report.cases) > 1:
        parts += [summary_table(report), Text()]
    if study:
        from fatui.study_table import study_table

        parts += [study_table(study, report), Text()]
    return Group(*parts, _footer(report))


def _case(case: AnyCase, columns: list[Column], number: int | None, count: int, width: int) -> RenderableType:
    chosen, gap = _fitted(columns, width)
    dropped = [column.head for column in columns if column.head not in {kept.head for kept in chosen}]
    parts: list[RenderableType] = [_title(case, number, count), _grid(chosen, gap, case, width)]
    notes = [*([] if isinstance(case, Case) else model_notes(case)), *_notes(case, dropped)]
    parts += [Text(f"  {note}", style="dim") for note in notes]
    return Group(*parts)


def _columns(case: Case, rate_unit: tuple[float, str]) -> list[Column]:
    rows, (factor, unit) = case.rows, rate_unit
    best = figures.best_of(case)
    if len(best) == sum(row.status == figures.OK for row in rows):
        best = ()  # a star on every row would say nothing
    return [
        Column(IMPLEMENTATION, [shortened(row.implementation) for row in rows]),
        Column("path", [row.path or figures.UNKNOWN for row in rows]),
        Column("tokens/s", [starred(row, best) for row in rows]),
        Column("per call", [figures.interval_text(row.call_s) for row in rows]),
        Column("speedup", [figures.speedup_text(row.speedup) for row in rows]),
        Column(unit, [figures.per(row.flops_per_s, factor) for row in rows]),
        Column("eff.", [figures.percent(row.efficiency) for row in rows]),
        Column("memory", [figures.size(row.peak_bytes) for row in rows]),
        Column("error", [figures.error(row.max_error) for row in rows]),
        Column("verdict", [figures.word(row, case) for row in rows]),
    ]


def _rate_unit(cases: Sequence[AnyCase]) -> tuple[float, str]:
    """Return the unit of rates: TFLOP/s, or GFLOP/s if all are small."""
    largest = max((row.flops_per_s or 0.0 for case in cases for row in case.rows), default=0.0)
    return (1e9, "GFLOP/s") if 0 < largest < SMALL_RATE else (1e12, "TFLOP/s")


def _fitted(columns: list[Column], width: int) -> tuple[list[Column], int]:
    """Return the columns that fit, and their gap; first the gap narrows, then the path wraps, then columns go."""
    for dropped in range(len(DROPPED_FIRST) + 1):
        gone = [head for heads in DROPPED_FIRST[:dropped] for head in heads]
        kept = [column for column in columns if column.head not in gone]
        for gap in (2, 1):
            spare = width - sum(column.width for column in kept) - gap * (len(kept) - 1)
            path = next((column for column in kept if column.head == "path"), None)
            least = min(path.width, NARROWEST_PATH) if path else 0
            if spare >= 0 or (path and gap == 1 and path.width + spare >= least):
                return kept, gap
    return kept, 1


def _grid(columns: list[Column], gap: int, case: AnyCase, width: int) -> Table:
    table = Table(
        box=None, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False, header_style="dim", collapse_padding=True
    )
    spare = width - sum(column.width for column in columns) - gap * (len(columns) - 1)
    for column in columns:
        room = column.width + min(spare, 0) if column.head == "path" else column.width
        text = column.head in TEXTS
        table.add_column(
            column.head, justify="left" if text else "right", width=room, no_wrap=column.head != "path", overflow="fold"
        )
    for index, row in enumerate(case.rows):
        style = STYLES.get(figures.word(row, case), "red" if row.status in ("failed", "inaccurate") else "dim")
        table.add_row(*(Text(column.cells[index]) for column in columns), style=style)
    return table


def _title(case: AnyCase, number: int | None, count: int) -> Text:
    title = Text(case.workload.label, style="bold")
    if number is not None:
        title = Text(f"{number} of {count} · ", style="dim").append_text(title)
    if case.reference:
        floor = f", noise floor {figures.percent(case.noise_floor.floor)}" if case.noise_floor else ", no noise floor"
        title.append(f" · speedup over {case.reference}{floor}", style="not bold dim")
    return title


def _notes(case: AnyCase, dropped: Sequence[str]) -> list[str]:
    """Return the notes below a table: rows without figures, drift, shortened names, and dropped columns."""
    notes = [
        f"{row.implementation}: {figures.verdict(row, case)}"
        for row in case.rows
        if row.status not in ("ok", "inaccurate")
    ]
    notes += [f"{row.implementation}: inaccurate: {row.reason}" for row in case.rows if row.status == "inaccurate"]
    notes += [
        f"{shortened(row.implementation)} is {row.implementation}"
        for row in case.rows
        if row.status in ("ok", "inaccurate") and shortened(row.implementation) != row.implementation
    ]
    if change := figures.reference_change(case):
        notes.insert(0, change)
    notes += figures.same_paths(case)
    if any(row.throttled for row in case.rows):
        notes.append(f"throttled: {case.reference} slowed down during the rounds by more than the noise floor")
    if any(row.stopped_by == "interrupted" for row in case.rows):
        notes.append("interrupted: measured until then")
    if dropped:
        notes.append(f"no room for {', '.join(dropped)}: widen the terminal, or export with --markdown")
    return notes


def summary_table(report: Report) -> RenderableType:
    """Build the table of geometric means of speedups, over the cases that each implementation ran accurately."""
    title = Text(f"geometric mean over {len(report.cases)} cases", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("")
    for head in ("speedup", "cases", "not ok"):
        table.add_column(head, justify="right")
    for line in report.summary:
        name = shortened(line.implementation)
        table.add_row(Text(name), figures.speedup_text(line.speedup), str(line.cases), str(line.not_ok or "-"))
    return Group(title, table)


def _footer(report: Report) -> RenderableType:
    where, peaks = report.environment, report.peaks
    known = [where.device, where.backend, where.mlx and f"MLX {where.mlx}", where.blas]
    parts = [part for part in known if part]
    if peaks.flops_per_s:
        parts.append(f"best rate measured {figures.flops(peaks.flops_per_s)}/s = 100 %")
    lines: list[RenderableType] = [Text(figures.finding(report), style="bold")]
    if parts:
        lines.append(Text(" · ".join(parts), style="dim"))
    state = ", interrupted" if report.run.interrupted else ""
    lines.append(Text(f"run {report.run.id}{state}: {report.run.command}", style="dim", overflow="fold"))
    return Group(*lines)
