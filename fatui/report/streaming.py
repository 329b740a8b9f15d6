"""The report's section on streams: what a token costs over position, memory, loss, and their curves."""

import math
from collections.abc import Sequence
from typing import Final

from attention.core.results import StreamCase
from attention.core.stream import FULL, RECOMPUTED, SLOW, STREAM_ROWS, STREAMING, WINDOW
from fatui import formatting
from fatui.report.charts import line_chart
from fatui.report.document import Block, Chart, Claim, MissingData, Table
from fatui.report.stream_curves import EXTRAPOLATED_WORDS, StreamChart, loss_chart, memory_chart, time_chart
from fatui.report.table import bare_text, growth_text, model_columns

RUN_STREAM: Final = "fatui stream --tokens 100000"
BEYOND: Final = f"{FULL}, {EXTRAPOLATED_WORDS}"
STYLES: Final = (*STREAM_ROWS, BEYOND)
SCALES: Final = {
    "time per token": (1e3, "ms per token"),
    "resident memory": (2**-20, "MiB"),
    "loss per token": (1, "nats"),
}
"""Factor and unit of the vertical axis of each chart."""


def stream_blocks(cases: Sequence[StreamCase]) -> list[Block]:
    """Return the findings on streams and their tables, or how to measure one."""
    if not cases:
        return [MissingData("No stream has been measured.", RUN_STREAM)]
    blocks: list[Block] = []
    for case in cases:
        blocks += [claim for claim in (_steady(case), _cost_of_full(case), _loss(case)) if claim]
        blocks.append(_table(case))
    return blocks


def _steady(case: StreamCase) -> Claim | None:
    row = formatting.stream_rows(case).get(STREAMING)
    if row is None or row.call_s is None:
        return None
    parts = [f"streaming takes {formatting.interval_text(row.call_s)} a token over {row.tokens:,} tokens"]
    if row.spread is not None:
        parts.append(f"its tenths differ from the first with a full window by at most {formatting.percent(row.spread)}")
    if row.start_bytes is not None:
        parts.append(f"resident memory is {growth_text(row.start_bytes, row.end_bytes)} since then")
    if row.slow_tokens is not None:
        steps = sum(block.count for block in row.blocks)
        slow = f"{row.slow_tokens:,} of {steps:,} steps took more than {SLOW:g} times the median"
        parts.append(f"{slow}{bare_text(row)}")
    if row.bound_share is not None:
        parts.append(f"reading what a token needs takes {formatting.percent(row.bound_share)} of its time")
    return Claim(f"{case.workload.label}: {'; '.join(parts)}.")


def _cost_of_full(case: StreamCase) -> Claim | None:
    rows = formatting.stream_rows(case)
    row, full = rows.get(STREAMING), rows.get(FULL)
    if row is None or row.call_s is None or full is None or full.end_s is None:
        return None
    how = f" (extrapolated from {full.tokens:,} keys)" if full.extrapolated else ""
    times = formatting.three(full.end_s / row.call_s.median)
    end = formatting.seconds(full.end_s)
    text = f"full attention takes {end} a token at the end{how}, {times} times as long as streaming"
    again = rows.get(RECOMPUTED)
    if again and again.call_s:
        text += f"; recomputing the window {formatting.three(again.call_s.median / row.call_s.median)} times as long"
    return Claim(f"{case.workload.label}: {text}.")


def _loss(case: StreamCase) -> Claim | None:
    rows = formatting.stream_rows(case)
    losses = {name: row.loss_beyond for name, row in rows.items() if row.loss_beyond is not None}
    own = losses.get(STREAMING)
    if own is None:
        return None
    words = {
        RECOMPUTED: "recomputed windows",
        WINDOW: "a window of as many tokens without the first",
        FULL: "full attention, as far as it was measured,",
    }
    others = [f"{words[name]} {losses[name]:.3f} ({losses[name] / own - 1:+.1%})" for name in words if name in losses]
    beside = f", that of {', of '.join(others)}" if others else ""
    return Claim(f"{case.workload.label}: the loss beyond the window is {own:.3f} nats a token with streaming{beside}.")


def _table(case: StreamCase) -> Table:
    columns = model_columns(case)
    rows = tuple(zip(*(column.cells for column in columns), strict=True))
    return Table(
        case.workload.label, ("", *(column.head for column in columns[1:])), rows, frozenset({"path", "verdict"})
    )


def stream_charts(cases: Sequence[StreamCase]) -> list[Chart]:
    """Return the curves of each stream over position: time, resident memory, and a model's loss."""
    charts = [
        (case, chart)
        for case in cases
        for chart in (time_chart(case), memory_chart(case), loss_chart(case))
        if chart.curves
    ]
    return [Chart(f"{chart.title}, {case.workload.label}", _drawn(chart)) for case, chart in charts]


def _drawn(chart: StreamChart) -> str:
    factor, unit = SCALES[chart.title]
    edge = chart.high if chart.title == "time per token" else math.inf  # beyond it are moments of a busy machine
    series = {curve.name: [(x, *(min(y, edge) * factor,) * 3) for x, y in curve.points] for curve in chart.curves}
    for curve in chart.curves:
        if curve.extrapolated:
            series[BEYOND] = [(x, *(y * factor,) * 3) for x, y in curve.extrapolated]
    return line_chart(series, "tokens", unit, STYLES, logarithmic=False)
