"""A report as tables for a terminal: they fit in 100 columns; a narrower one drops columns, with a note."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from msgspec import Struct
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from attention.core.kv_format import DENSE
from attention.core.results import (
    AnyCase,
    Case,
    FineTuningCase,
    FineTuningRow,
    ModelCase,
    ModelRow,
    Report,
    Row,
    StreamCase,
    StreamRow,
)
from attention.core.route import FALLS_BACK
from attention.core.stream import FULL, SLOW, STREAMING, merged_bins, slow_steps
from attention.engine.record import NEVER_CALLED
from fatui import formatting
from fatui.report.stream_curves import loss_chart, step_histograms, text_chart, time_chart
from fatui.report.study import SHOWN, Study, StudyRow, rate_text, times_text
from fatui.trust import trust, trust_line, worst
from fatui.untrusted_text import escape_all
from fatui.verdict import confidence_text, finding, headline, loss_lines, verdicts

MIN_PROSE_WIDTH: Final = 24


class FittedTable(Table):
    """A table that leaves out columns for which a terminal has no room, with a note, so that no figure is cut.

    Columns with `no_wrap` keep their width; the others wrap. If the columns that stay are too wide, all wrap.
    """

    def __init__(
        self,
        *heads: str,
        dropped_first: Sequence[str] = (),
        gap: int = 2,
        show_header: bool = True,
        prose_width: int = MIN_PROSE_WIDTH,
    ) -> None:
        """Create it without borders.

        Args:
            heads: heads of columns that do not wrap.
            dropped_first: heads of the columns that are left out, in this order.
            gap: blanks between columns.
            show_header: whether the heads are shown.
            prose_width: width of a column that wraps, below which other columns are left out.
        """
        super().__init__(box=None, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False, show_header=show_header)
        self.header_style = "dim"
        self._dropped_first, self._gap, self._prose_width = dropped_first, gap, prose_width
        for head in heads:
            self.add_column(head, no_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the columns that fit."""
        columns, kept = self.columns, [*self.columns]
        least = {id(column): self._least(console, options, column) for column in columns}

        def spare() -> int:
            return options.max_width - sum(least[id(column)] for column in kept) - self._gap * (len(kept) - 1)

        dropped = []
        for head in self._dropped_first:
            if spare() < 0:
                dropped += [head for column in kept if column.header == head]
                kept = [column for column in kept if column.header != head]
        self.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
        for column in self.columns if spare() < 0 else []:
            column.no_wrap, column.overflow = False, "fold"
        try:
            lines = [*super().__rich_console__(console, options)]
        finally:
            self.columns = columns
        yield from lines
        if dropped:
            heads = ", ".join(head.replace("\n", " ") for head in dropped)
            yield Text(f"no room for {heads}: widen the terminal", style="dim")

    def _least(self, console: Console, options: ConsoleOptions, column: Column) -> int:
        """Return the width of a column's widest text, of one that wraps at most that of prose."""
        texts = [*column.cells, *([column.header] if self.show_header else [])]
        unbounded = options.update_width(10_000)
        widest = max(Measurement.get(console, unbounded, text).maximum for text in texts)
        return min(widest, column.max_width or widest) if column.no_wrap else min(widest, self._prose_width)


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
            formatting.tokens_per_second(line.tokens_per_second if line else None),
            formatting.speedup_text(line.speedup if line else None),
        )


KV_ERROR: Final = "K/V error"
ENERGY: Final = "J/token"
DIVERGENCE: Final = "KL"
SENT: Final = "sent"
EXPOSED: Final = "exposed"
"""Heading of the time of communication that computing did not hide."""
MAX_NAME_LENGTH: Final = 14
IMPLEMENTATION: Final = ""
"""The heading of the first column."""


class TextColumn(Struct):
    """One column, with its cells as text."""

    head: str
    cells: list[str]
    width: int = 0
    """Width without wrapping, in this case and in those above it in the same table."""

    def __post_init__(self) -> None:
        """Default the width to that of the widest text."""
        self.width = self.width or max(cell_len(text) for text in (self.head, *self.cells))


def starred(row: Row, best: Sequence[str]) -> str:
    """Format tokens/s, with a star if it is the best."""
    mark = f"{formatting.STAR} " if row.implementation in best else ""
    return mark + formatting.tokens_per_second(row.tokens_per_second)


def short_name(name: str) -> str:
    """Shorten an implementation's name to its column."""
    return formatting.short_name(name, MAX_NAME_LENGTH)


STEPS: Final = {"prefill": "to 1st token", "decode": "per token"}
BARS: Final = "▁▂▃▄▅▆▇█"
CURVE_WIDTH: Final = 40


def has_divergence(case: AnyCase) -> bool:
    """Return whether a model's cache is quantized, so that its rows diverge from those with an unquantized one."""
    return isinstance(case, ModelCase) and case.workload.kv_format != DENSE


ColumnCase = ModelCase | FineTuningCase | StreamCase


FurtherColumns = dict[str, Callable[[Row], str]]


def further_columns(cases: Sequence[AnyCase]) -> FurtherColumns:
    """Return the columns that only masked, quantized or divided cases have, each with what formats a cell."""
    counterparts = formatting.counterparts_of(cases)
    diverge = any(map(has_divergence, cases))
    columns: FurtherColumns = {
        head: partial(formatting.over_text, counterpart=counterpart)
        for counterpart, head in formatting.OVER.items()
        if counterpart in counterparts or (diverge and counterpart == "unquantized")
    }
    if formatting.over_ranks(cases):
        columns[SENT] = formatting.sent_text
        if any(row.exposed_s is not None for case in cases for row in case.rows):  # not in models
            columns[EXPOSED] = formatting.exposed_text
    if formatting.has_kv_error(cases):
        columns[KV_ERROR] = formatting.kv_error_text
    if diverge:
        columns[DIVERGENCE] = formatting.divergence_text
    if any(row.joules_per_token is not None for case in cases for row in case.rows):
        columns[ENERGY] = formatting.energy_text
    return columns


def _text_columns(further: FurtherColumns, rows: Sequence[Row]) -> list[TextColumn]:
    return [TextColumn(head, [cell(row) for row in rows]) for head, cell in further.items()]


def model_columns(case: ColumnCase, further: FurtherColumns | None = None) -> list[TextColumn]:
    """Return the columns of a case; `further`: those of `further_columns`, by default of the case alone."""
    if isinstance(case, FineTuningCase):
        return _fine_tuning(case)
    if isinstance(case, StreamCase):
        return _stream(case)
    return _generation(case, further_columns([case]) if further is None else further)


def _path_column(case: Case | ModelCase) -> TextColumn:
    """Return the column of paths, without the number of ranks, which the title says."""
    ranks = f"x{case.workload.ranks} "
    return TextColumn("path", [(row.path or formatting.UNKNOWN).removeprefix(ranks) for row in case.rows])


def _generation(case: ModelCase, further: FurtherColumns) -> list[TextColumn]:
    rows, best = case.rows, _stars(case)
    return [
        TextColumn(IMPLEMENTATION, [short_name(row.implementation) for row in rows]),
        _path_column(case),
        TextColumn("tokens/s", [starred(row, best) for row in rows]),
        TextColumn(STEPS[case.workload.phase], [formatting.interval_text(row.call_s) for row in rows]),
        TextColumn("speedup", [formatting.speedup_text(row.speedup) for row in rows]),
        TextColumn("attention", [formatting.share_text(row.attention_share) for row in rows]),
        TextColumn("memory", [formatting.size(row.peak_bytes) for row in rows]),
        TextColumn("off", [formatting.error(row.logits_error) for row in rows]),
        *_text_columns(further, rows),
        TextColumn("verdict", [formatting.word(row, case) for row in rows]),
    ]


def _fine_tuning(case: FineTuningCase) -> list[TextColumn]:
    rows, best = case.rows, _stars(case)
    return [
        TextColumn(IMPLEMENTATION, [short_name(row.implementation) for row in rows]),
        TextColumn("path", [row.path or formatting.UNKNOWN for row in rows]),
        TextColumn("it/s", [formatting.rate(row.iterations_per_second) for row in rows]),
        TextColumn("tokens/s", [starred(row, best) for row in rows]),
        TextColumn("per iteration", [formatting.interval_text(row.call_s) for row in rows]),
        TextColumn("speedup", [formatting.speedup_text(row.speedup) for row in rows]),
        TextColumn("memory", [formatting.size(row.peak_bytes) for row in rows]),
        TextColumn("loss", [loss_text(row) for row in rows]),
        TextColumn("off", [formatting.error(row.loss_difference) for row in rows]),
        TextColumn("verdict", [formatting.word(row, case) for row in rows]),
    ]


def _stream(case: StreamCase) -> list[TextColumn]:
    rows = case.rows
    losses = [
        TextColumn("loss inside", [_loss(row.loss_inside) for row in rows]),
        TextColumn("beyond", [_loss(row.loss_beyond) for row in rows]),
    ]
    return [
        TextColumn(IMPLEMENTATION, [row.implementation for row in rows]),
        TextColumn("path", [row.path or formatting.UNKNOWN for row in rows]),
        TextColumn("tokens", [f"{row.tokens:,}" for row in rows]),
        TextColumn("time per token", [formatting.interval_text(row.call_s) for row in rows]),
        TextColumn("99 %", [formatting.seconds(row.p99_s) for row in rows]),
        TextColumn("flat within", [formatting.percent(row.spread) for row in rows]),
        TextColumn("at the end", [end_text(row) for row in rows]),
        TextColumn("memory", [growth_text(row.start_bytes, row.end_bytes) for row in rows]),
        TextColumn("of bound", [formatting.percent(row.bound_share) for row in rows]),
        *(losses if any(row.loss_inside is not None or row.loss_beyond is not None for row in rows) else []),
        TextColumn("verdict", [formatting.word(row, case) for row in rows]),
    ]


def _loss(value: float | None) -> str:
    return formatting.UNKNOWN if value is None else f"{value:.3f}"


def end_text(row: StreamRow) -> str:
    """Format the time of a token at the end of a stream, with a tilde if it is extrapolated."""
    return f"~ {formatting.seconds(row.end_s)}" if row.extrapolated else formatting.seconds(row.end_s)


def growth_text(start: int | None, end: int | None) -> str:
    """Format memory at the end of a stream with its growth since the window was full: "310 MiB +4 KiB"."""
    if start is None or end is None:
        return formatting.UNKNOWN
    change = end - start
    return f"{formatting.size(end)} {'-' if change < 0 else '+'}{formatting.size(abs(change))}"


def _stream_notes(case: StreamCase) -> list[str]:
    """Return the notes below the table of a stream."""
    notes = []
    for row in case.rows:
        if row.implementation == FULL and row.extrapolated:
            notes.append(f"~ extrapolated: full attention was measured up to {row.tokens:,} keys")
        if row.implementation != STREAMING:
            continue
        if row.slow_tokens is not None and row.slowest_s is not None:
            steps = sum(block.count for block in row.blocks)
            slowest = formatting.seconds(row.slowest_s)
            notes.append(
                f"{row.implementation}: {row.slow_tokens:,} of {steps:,} steps took over {SLOW:g} times the median, "
                f"the slowest {slowest}{bare_text(row)}"
            )
        if row.device_start_bytes is not None:
            notes.append(
                f"{row.implementation}: MLX's memory {growth_text(row.device_start_bytes, row.device_end_bytes)}"
                " since the window was full"
            )
        if row.bound_s is not None:
            what = "weights, keys and values" if case.workload.model else "keys and values"
            notes.append(f"bound: the {what} that a token needs are read in {formatting.seconds(row.bound_s)}")
    return notes


def bare_text(row: StreamRow) -> str:
    """Format how many steps of a loop that does nothing were as slow; empty if that was not measured."""
    steps = sum(row.bare_bins.values())
    if not steps or row.call_s is None:
        return ""
    return f"; a loop that does nothing for as long: {slow_steps(row.bare_bins, row.call_s.median):,} of {steps:,}"


def _histograms(case: StreamCase, width: int) -> list[str]:
    """Return the histograms of the steps of `streaming` and of a loop that does nothing, if that was measured."""
    row = next((row for row in case.rows if row.implementation == STREAMING and row.bare_bins), None)
    if row is None:
        return []
    drawn = step_histograms({STREAMING: merged_bins(row.blocks), "bare loop": row.bare_bins}, width)
    return ["", "times of steps, on logarithmic axes", *drawn]


def stream_charts(case: StreamCase, width: int) -> list[str]:
    """Return the curves of a stream as lines of text."""
    charts = [chart for chart in (time_chart(case), loss_chart(case)) if chart.curves]
    width = min(width, CHART_WIDTH)
    lines = [line for chart in charts for line in ("", *text_chart(chart, width, CHART_HEIGHT))]
    return [*lines, *_histograms(case, width - 12)]


CHART_WIDTH: Final = 78
CHART_HEIGHT: Final = 8


def _stars(case: ModelCase | FineTuningCase) -> tuple[str, ...]:
    best = formatting.best_of(case)
    return () if len(best) == sum(row.status == formatting.OK for row in case.rows) else best


def loss_text(row: FineTuningRow) -> str:
    """Format the first and the last loss."""
    known = [loss for loss in row.losses if loss is not None]
    return f"{known[0]:.3f} → {known[-1]:.3f}" if known else formatting.UNKNOWN


def model_notes(case: ColumnCase) -> list[str]:
    """Return the notes below the table: estimates, call counts, and loss curves."""
    notes = []
    if isinstance(case, StreamCase):
        return _stream_notes(case)
    if case.weights_bytes:
        notes.append(f"weights {formatting.size(case.weights_bytes)}; memory is on top of them")
    if isinstance(case, ModelCase):
        if case.cache_bytes is not None and case.kv_token_bytes is not None:
            each = formatting.size(case.kv_token_bytes)
            notes.append(f"K/V cache {formatting.size(case.cache_bytes)} after the prompt, {each} per token")
        if case.shared_passes:
            notes.append("implementations shared passes: a time is that of its own attention and of the common rest")
        notes += _layer_notes(case)
    counted = [row for row in case.rows if row.replaced_calls]
    if counted:
        computed = ", ".join(f"{short_name(row.implementation)} {row.replaced_calls:,}" for row in counted)
        notes.append(f"attention calls that reached it: {computed}")
    for row in case.rows:
        if row.path == NEVER_CALLED:
            notes.append(f"{short_name(row.implementation)}: no call reached it; the model computes attention itself")
        if row.passed_on_calls:
            total = row.passed_on_calls + (row.replaced_calls or 0)
            notes.append(f"{short_name(row.implementation)}: {row.passed_on_calls} of {total} calls went to MLX's own")
    if isinstance(case, FineTuningCase):
        width = max((len(short_name(row.implementation)) for row in case.rows), default=0)
        notes += [f"{short_name(row.implementation):<{width}} {curve(row)}" for row in case.rows if row.losses]
    return notes


def _layer_notes(case: ModelCase) -> list[str]:
    """Return the time of one layer and of the rest, if the whole model was estimated from them."""
    known = [row for row in case.rows if row.layer_s is not None and row.fixed_s is not None]
    if not known:
        return []
    layers = ", ".join(f"{short_name(row.implementation)} {formatting.seconds(row.layer_s)}" for row in known)
    rests = ", ".join(f"{short_name(row.implementation)} {_rest(row)}" for row in known)
    part = f"{case.workload.running_layers} of {case.workload.layers} layers ran"
    return [f"{part}; a layer takes: {layers}", f"the rest takes: {rests}"]


def _rest(row: ModelRow) -> str:
    return formatting.seconds(row.fixed_s) if row.fixed_s and row.fixed_s > 0 else "too little to measure"


def curve(row: FineTuningRow, width: int = CURVE_WIDTH) -> str:
    """Draw the losses as bars, scaled from the smallest to the largest; a gap where one is not a number."""
    losses = row.losses
    picked = [losses[index * len(losses) // width] for index in range(width)] if len(losses) > width else losses
    known = [loss for loss in picked if loss is not None]
    if not known:
        return "no number"
    low, high = min(known), max(known)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(" " if loss is None else BARS[round((loss - low) / step)] for loss in picked)


WIDTH: Final = 100
MIN_PATH_WIDTH: Final = 8
MAX_PATH_LINES: Final = 2
SMALL_RATE: Final = 1e12
"""Rates below this many FLOP/s are shown in GFLOP/s, since they would be mostly zeros in TFLOP/s."""
DROPPED_FIRST: Final = (
    *(("TFLOP/s", "GFLOP/s"), (ENERGY,), ("error", "off"), ("of peak", "loss"), ("path",)),
    *(("of bound",), ("per call", "to 1st token", "per token", "per iteration"), ("99 %",), ("memory",)),
)
TEXTS: Final = (IMPLEMENTATION, "path", "verdict")
STYLES: Final = {
    "fastest": "bold green",
    "faster": "green",
    "slower": "yellow",
    "same": "",
    "reference": "",
    "ok": "",
    "flat": "green",
    "varies": "",
    "climbs": "yellow",
}


def report_table(
    report: Report, study: Study | None = None, width: int = WIDTH, *, curves: bool = True
) -> RenderableType:
    """Render all cases of a report, their geometric means, the study's figures if given, and the finding.

    `curves`: whether those of streams are drawn below their tables.
    """
    report = escape_all(report)
    cases, count = report.all_cases, len(report.all_cases)
    parts: list[RenderableType] = []
    unit = rate_unit(cases)
    further = further_columns(cases)
    layouts = [
        _columns(case, unit, further) if isinstance(case, Case) else model_columns(case, further) for case in cases
    ]
    for aligned in zip(*layouts, strict=True):
        widest = max(column.width for column in aligned)
        for column in aligned:
            column.width = widest
    for number, (case, columns) in enumerate(zip(cases, layouts, strict=True), start=1):
        parts.append(_case(case, columns, number if count > 1 else None, count, width))
        if curves and isinstance(case, StreamCase):
            parts += [Text(f"  {line}".rstrip(), no_wrap=True) for line in stream_charts(case, width - 2)]
        parts.append(Text())
    if len(report.cases) > 1:
        parts += [summary_table(report), Text()]
    if study:
        parts += [study_table(study, report), Text()]
    return Group(*parts, _footer(report))


def _case(case: AnyCase, columns: list[TextColumn], number: int | None, count: int, width: int) -> RenderableType:
    chosen, gap = _fitted(columns, width)
    dropped = [column.head for column in columns if column.head not in {kept.head for kept in chosen}]
    parts: list[RenderableType] = [_title(case, number, count), _grid(chosen, gap, case, width)]
    notes = [*(kv_notes(case) if isinstance(case, Case) else model_notes(case)), *rank_notes(case)]
    notes += _notes(case, dropped)
    parts += [Text(f"  {note}", style="dim") for note in notes]
    return Group(*parts)


def rank_notes(case: AnyCase) -> list[str]:
    """Return a note for each rank of each row."""
    return [f"{short_name(row.implementation)}, {note}" for row in case.rows for note in formatting.rank_notes(row)]


def kv_notes(case: Case) -> list[str]:
    """Return a note on the bytes of quantized keys and values."""
    sizes, work = formatting.kv_sizes(case.workload), case.workload
    return [f"K/V in {work.kv_format}: {sizes} than {work.dtype}"] if sizes else []


def _columns(case: Case, rate_unit: tuple[float, str], further: FurtherColumns) -> list[TextColumn]:
    rows, (factor, unit) = case.rows, rate_unit
    best = formatting.best_of(case)
    if len(best) == sum(row.status == formatting.OK for row in rows):
        best = ()  # a star on every row would say nothing
    return [
        TextColumn(IMPLEMENTATION, [short_name(row.implementation) for row in rows]),
        _path_column(case),
        TextColumn("tokens/s", [starred(row, best) for row in rows]),
        TextColumn("per call", [formatting.interval_text(row.call_s) for row in rows]),
        TextColumn("speedup", [formatting.speedup_text(row.speedup) for row in rows]),
        *_text_columns(further, rows),
        TextColumn(unit, [formatting.per(row.flops_per_s, factor) for row in rows]),
        TextColumn("of peak", [formatting.percent(row.efficiency) for row in rows]),
        TextColumn("memory", [formatting.size(row.peak_bytes) for row in rows]),
        TextColumn("error", [formatting.row_error(row) for row in rows]),
        TextColumn("verdict", [formatting.word(row, case) for row in rows]),
    ]


def rate_unit(cases: Sequence[AnyCase]) -> tuple[float, str]:
    """Return factor and name of the unit of rates: TFLOP/s, or GFLOP/s if all are small."""
    largest = max((row.flops_per_s or 0.0 for case in cases for row in case.rows), default=0.0)
    return (1e9, "GFLOP/s") if 0 < largest < SMALL_RATE else (1e12, "TFLOP/s")


def _fitted(columns: list[TextColumn], width: int) -> tuple[list[TextColumn], int]:
    """Return the columns that fit, and their gap; first the gap narrows, then the path wraps, then columns go."""
    for dropped in range(len(DROPPED_FIRST) + 1):
        gone = [head for heads in DROPPED_FIRST[:dropped] for head in heads]
        kept = [column for column in columns if column.head not in gone]
        for gap in (2, 1):
            spare = width - sum(column.width for column in kept) - gap * (len(kept) - 1)
            path = next((column for column in kept if column.head == "path"), None)
            least = _least_path_width(path) if path else 0
            if spare >= 0 or (path and gap == 1 and path.width + spare >= least):
                return kept, gap
    return kept, 1


def _least_path_width(path: TextColumn) -> int:
    """Return the least width at which every path wraps into at most MAX_PATH_LINES, between words."""
    for width in range(MIN_PATH_WIDTH, path.width):
        wrapped = [textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) for cell in path.cells]
        if all(len(lines) <= MAX_PATH_LINES and max(map(cell_len, lines), default=0) <= width for lines in wrapped):
            return width
    return path.width


def _grid(columns: list[TextColumn], gap: int, case: AnyCase, width: int) -> Table:
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
        style = STYLES.get(formatting.word(row, case), "red" if row.status in ("failed", "inaccurate") else "dim")
        table.add_row(*(Text(column.cells[index]) for column in columns), style=style)
    return table


def _title(case: AnyCase, number: int | None, count: int) -> Text:
    title = Text(case.workload.label, style="bold")
    if number is not None:
        title = Text(f"{number} of {count} · ", style="dim").append_text(title)
    if case.reference:
        floor = (
            f", noise floor {formatting.percent(case.noise_floor.floor)}" if case.noise_floor else ", no noise floor"
        )
        title.append(f" · speedup over {case.reference}{floor}", style="not bold dim")
    return title


def _notes(case: AnyCase, dropped: Sequence[str]) -> list[str]:
    """Return the notes below a table: rows without figures, fallbacks, drift, shortened names, and dropped columns."""
    notes = _failures(case)
    notes += [f"{row.implementation}: inaccurate: {row.reason}" for row in case.rows if row.status == "inaccurate"]
    notes += [
        f"{short_name(row.implementation)} is {row.implementation}"
        for row in case.rows
        if row.status in ("ok", "inaccurate") and short_name(row.implementation) != row.implementation
    ]
    notes += [
        f"{row.implementation}: {row.reason}"
        for row in case.rows
        if row.status == "ok" and (row.approximate or (row.path or "").startswith(FALLS_BACK))
    ]
    if change := formatting.reference_change(case):
        notes.insert(0, change)
    notes += formatting.same_paths(case)
    if any(row.throttled for row in case.rows):
        notes.append(f"throttled: {case.reference} slowed down during the rounds by more than the noise floor")
    if any(row.stopped_by == "interrupted" for row in case.rows):
        notes.append("interrupted: measured until then")
    if dropped:
        notes.append(f"no room for {', '.join(dropped)}: widen the terminal, or export with --markdown")
    return notes


def _failures(case: AnyCase) -> list[str]:
    """Return why rows have no figures, a line for each."""
    return [
        f"{row.implementation}: {formatting.verdict(row, case)}"
        for row in case.rows
        if row.status not in ("ok", "inaccurate")
    ]


def summary_table(report: Report) -> RenderableType:
    """Build the table of geometric means of speedups, over the cases that each implementation ran accurately."""
    title = Text(f"geometric mean over {len(report.cases)} cases", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("")
    for head in ("speedup", "cases", "not ok"):
        table.add_column(head, justify="right")
    for line in report.summary:
        name = short_name(line.implementation)
        table.add_row(Text(name), formatting.speedup_text(line.speedup), str(line.cases), str(line.not_ok or "-"))
    return Group(title, table)


TRUST_STYLES: Final = {"note": "dim", "warning": "yellow", "serious": "bold yellow"}


def _verdict_lines(report: Report) -> list[Text]:
    """Return the verdict, why the others lose, how sure it is, and what the figures depend on.

    What stands below a table already, such as how a row failed, is not repeated.
    """
    said = {line for case in report.all_cases for line in _failures(case)}
    lines = [Text(finding(report), style="bold")] if report.streams else []
    for verdict in verdicts(report):
        lines += [Text(text, style="bold") for text in (headline(verdict), *verdict.notes)]
        if verdict.winner is not None:
            lines += [Text(f"  {line}", style="dim") for line in loss_lines(verdict) if line not in said]
            lines.append(Text(f"  {confidence_text(verdict)}", style="" if verdict.confidence == "high" else "yellow"))
    findings = trust(report)
    return [*lines, *([Text(trust_line(findings), style=TRUST_STYLES[worst(findings)])] if findings else [])]


def _footer(report: Report) -> RenderableType:
    where, peaks = report.environment, report.peaks
    known = [where.machine, where.backend, where.mlx and f"MLX {where.mlx}", where.blas]
    parts = [part for part in known if part]
    if peaks.flops_per_s:
        parts.append(f"best rate measured {formatting.flops(peaks.flops_per_s)}/s = 100 %")
    lines: list[RenderableType] = [*_verdict_lines(report)]
    if parts:
        lines.append(Text(" · ".join(parts), style="dim"))
    state = ", interrupted" if report.run.interrupted else ""
    lines.append(Text(f"run {report.run.id}{state}: {report.run.command}", style="dim", overflow="fold"))
    return Group(*lines)
