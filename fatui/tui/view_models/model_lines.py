"""The rows of models, fine-tunings and streams as lines of a table, with their notes below each case."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Final

from attention.core.results import AnyCase, FineTuningCase, ModelCase, Report, StreamCase, StreamRow
from fatui import formatting
from fatui.report.comparison import rebased_report
from fatui.report.table import (
    DIVERGENCE,
    IMPLEMENTATION,
    TextColumn,
    further_columns,
    model_columns,
    model_notes,
    rank_notes,
    stream_charts,
)
from fatui.tui.view_models import table_lines
from fatui.tui.view_models.table_lines import TableColumn, TableLine

AnyModelCase = ModelCase | FineTuningCase | StreamCase
NAME: Final = "implementation"
CALL: Final = "call"
CALLS: Final = ("to 1st token", "per token", "per iteration", "time per token")
"""Headings of the time of one call, by kind of case; they share a column."""
AT_THE_END: Final = "times"
"""How many times as fast a row of a stream is at its end as the row made the reference."""
BY_RANK: Final = (
    *("tokens/s", AT_THE_END, CALL, "speedup", "verdict", "at the end", "it/s", "flat within", "memory", "attention"),
    *("loss", "loss inside", "beyond", *formatting.OVER.values(), DIVERGENCE, "sent", "99 %", "path", "of bound"),
    *("tokens", "off"),
)
"""The columns in the order in which they are given up where room is short, the last first."""
TEXTS: Final = (NAME, "path", "verdict")
Figure = float | str | None
FIGURES: Final[dict[str, Callable[[Any], Figure]]] = {
    **{name: table_lines.SORT_FIGURES[name] for name in ("path", "tokens/s", "speedup", "memory", "verdict", "sent")},
    **{name: table_lines.SORT_FIGURES[name] for name in formatting.OVER.values()},
    NAME: lambda row: row.implementation,
    CALL: lambda row: row.call_s.median if row.call_s else None,
    "it/s": lambda row: row.iterations_per_second,
    "attention": lambda row: row.attention_share.value if row.attention_share else None,
    "off": lambda row: row.loss_difference if hasattr(row, "loss_difference") else row.logits_error,
    DIVERGENCE: lambda row: row.kl_divergence,
    "loss": lambda row: next((loss for loss in reversed(row.losses) if loss is not None), None),
    "tokens": lambda row: row.tokens,
    "99 %": lambda row: row.p99_s,
    "flat within": lambda row: row.spread,
    "at the end": lambda row: row.end_s,
    "of bound": lambda row: row.bound_share,
    "loss inside": lambda row: row.loss_inside,
    "beyond": lambda row: row.loss_beyond,
}
"""What orders the rows, by column."""


def cases_of(report: Report, reference: str | None) -> list[AnyModelCase]:
    """Return the cases of a report, with speedups over an implementation; None: over the reference of each."""
    shown = report if reference is None else rebased_report(report, reference)
    return [*shown.models, *shown.fine_tunings, *shown.streams]


def columns_of(cases: Sequence[AnyModelCase]) -> tuple[TableColumn, ...]:
    """Return the columns that the cases have, in the order of the first that has each."""
    further = further_columns(cases)
    titles: dict[str, dict[str, None]] = {}
    for case in cases:
        for column in model_columns(case, further):
            titles.setdefault(_name(column), {})[column.head] = None
        if isinstance(case, StreamCase):
            titles[AT_THE_END] = {"end, times": None}
    made = []
    for name, heads in titles.items():
        rank = 0 if name == NAME else 1 + BY_RANK.index(name) if name in BY_RANK else len(BY_RANK)
        made.append(
            TableColumn(
                name=name,
                title=next(iter(heads)) if len(heads) == 1 else "time",
                rank=rank,
                right=name not in TEXTS,
                least=9 if name == NAME else 0,
                widest=22 if name == "path" else 40,
                narrowest=10 if name == "path" else None,
                optional=name not in (NAME, "tokens/s", CALL),
            )
        )
    return tuple(made)


def _name(column: TextColumn) -> str:
    """Return the name of a column of the report's table."""
    return NAME if column.head == IMPLEMENTATION else CALL if column.head in CALLS else column.head


def lines_of(report: Report, reference: str | None, width: int, *, curves: bool = False) -> list[TableLine]:
    """Return the heading, the rows and the notes of each case.

    Args:
        report: the run.
        reference: the implementation that speedups are shown over; None: that of each case.
        width: columns of text for the notes.
        curves: whether the curves of a stream are drawn below its rows.
    """
    cases = cases_of(report, reference)
    further = further_columns(cases)
    columns = [model_columns(case, further) for case in cases]
    calls = [next(column.head for column in each if column.head in CALLS) for each in columns]
    several = len(set(calls)) > 1
    lines: list[TableLine] = []
    for index, case in enumerate(cases):
        if len(cases) > 1:
            lines.append(table_lines.block_head(index, case, f" · {calls[index]}" if several else ""))
        lines += _case_lines(index, case, columns[index], reference)
        notes = [*model_notes(case), *rank_notes(case), *formatting.same_paths(case), *_reasons(case)]
        lines += [_note(line) for note in notes for line in textwrap.wrap(note, max(width - 2, 20))]
        if curves and isinstance(case, StreamCase):
            lines += [_note(line) for line in stream_charts(case, width - 2)]
    return lines


def _reasons(case: AnyCase) -> list[str]:
    """Return why rows have no figures, or wrong ones."""
    return [
        f"{row.implementation}: {formatting.verdict(row, case)}"
        for row in case.rows
        if row.status != formatting.OK and row.reason
    ]


def _note(text: str) -> TableLine:
    return TableLine(span=f"  {text}", tone="dim")


def _case_lines(index: int, case: AnyModelCase, texts: Sequence[TextColumn], reference: str | None) -> list[TableLine]:
    columns = [(_name(column), column.cells) for column in texts]
    best = formatting.best_of(case) if not isinstance(case, StreamCase) else ()
    against = _at_the_end(case, reference) if isinstance(case, StreamCase) else {}
    made = []
    for number, row in enumerate(case.rows):
        cells = {name: column[number] for name, column in columns}
        cells["verdict"] += " !" if row.throttled else ""
        figures = {name: FIGURES[name](row) for name, _ in columns if name in FIGURES}
        if row.implementation in against:
            cells[AT_THE_END], figures[AT_THE_END] = against[row.implementation]
        key = table_lines.row_key(index, row.implementation)
        tone = table_lines.tone_of(row, row.implementation in best and len(best) < len(case.rows))
        made.append(TableLine(key=key, cells=cells, tone=tone, figures=figures))
    return made


def _at_the_end(case: StreamCase, reference: str | None) -> dict[str, tuple[str, Figure]]:
    """Return how many times as fast each row is at the end of the stream as a row; marked where one is extrapolated."""
    rows: dict[str, StreamRow] = {row.implementation: row for row in case.rows if row.end_s}
    base = rows.get(reference or "")
    if base is None or not base.end_s:
        return {}
    made: dict[str, tuple[str, Figure]] = {}
    for name, row in rows.items():
        if row.end_s and row is base:
            made[name] = "1", 1.0
        elif row.end_s:
            times = base.end_s / row.end_s
            mark = "~ " if row.extrapolated or base.extrapolated else ""
            made[name] = f"{mark}{formatting.three(times)}x", times
    return made
