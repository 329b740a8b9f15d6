"""Curves of a stream over the position of its tokens, and their drawing in a grid of characters."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Final

from msgspec import Struct, structs

from attention.core.results import StreamCase, StreamRow
from attention.core.stream import FULL, STREAMING, StreamBlock, bin_top_s, fitted_line
from fatui import formatting

MARKS: Final = {FULL: "●", "recomputed": "▲", "window": "◆", STREAMING: "━"}
EXTRAPOLATED: Final = "·"
"""The mark of what was not measured."""
EXTRAPOLATED_WORDS: Final = "extrapolated"
MAX_DRAWN: Final = 120
"""Maximum points of a curve in a chart: neighbours are averaged."""
EXTRAPOLATED_POINTS: Final = 24
LOSS_ROOM: Final = 1.3
"""Losses are drawn up to this multiple of the highest besides full attention's, which may explode."""
TYPICAL: Final = 0.95
"""Share of a curve's points that the axis of times reaches: a moment in which the machine was busy does not set it."""
LOSS_POINTS: Final = 24
"""Points of a curve of losses, which differ much from token to token."""
Points = tuple[tuple[float, float], ...]


class Curve(Struct, frozen=True):
    """A figure of one row over the position of the tokens."""

    name: str
    points: Points
    extrapolated: Points = ()
    """Points beyond those measured; the first one is the last of these."""


class StreamChart(Struct, frozen=True):
    """Curves on common axes."""

    title: str
    curves: tuple[Curve, ...]
    tokens: int
    low: float
    high: float
    format: Callable[[float], str]
    """Formats the ends of the vertical axis."""


def time_chart(case: StreamCase) -> StreamChart:
    """Return the time of a token over position, from zero; the cost of full attention continues as extrapolated."""
    curves = []
    for row in measured_rows(case):
        points = thinned(row.blocks, lambda block: block.seconds)
        curves.append(Curve(row.implementation, points, _extrapolated(row, case.workload.tokens)))
    highest = max(map(_typical_high, curves), default=0.0)
    return StreamChart("time per token", tuple(curves), case.workload.tokens, 0.0, 1.05 * highest, formatting.seconds)


def _typical_high(curve: Curve) -> float:
    """Return the height that nearly all points of a curve keep to, and its extrapolated end."""
    ordered = sorted(y for _, y in curve.points)
    return max(ordered[int(TYPICAL * (len(ordered) - 1))], *(y for _, y in curve.extrapolated), ordered[0])


def memory_chart(case: StreamCase) -> StreamChart:
    """Return the resident memory of the process over position, from zero."""
    bounded = structs.replace(case, rows=tuple(row for row in case.rows if row.implementation != FULL))
    return _chart(bounded, "resident memory", lambda block: block.resident_bytes, formatting.size)


def loss_chart(case: StreamCase) -> StreamChart:
    """Return the loss of a token over position, from zero; what explodes is cut off."""
    drawn = _chart(case, "loss per token", lambda block: block.loss, lambda value: f"{value:.2f}", LOSS_POINTS)
    bounded = [y for curve in drawn.curves if curve.name != FULL for _, y in curve.points]
    high = min(drawn.high, LOSS_ROOM * max(bounded)) if bounded else drawn.high
    return structs.replace(drawn, high=high)


def _chart(
    case: StreamCase,
    title: str,
    value: Callable[[StreamBlock], float | None],
    say: Callable[[float], str],
    most: int = MAX_DRAWN,
) -> StreamChart:
    curves = tuple(
        Curve(row.implementation, points) for row in measured_rows(case) if (points := thinned(row.blocks, value, most))
    )
    highest = max((y for curve in curves for _, y in curve.points), default=0.0)
    return StreamChart(title, curves, case.workload.tokens, 0.0, highest * 1.05, say)


def measured_rows(case: StreamCase) -> list[StreamRow]:
    """Return the rows with blocks, in their order."""
    return [row for row in case.rows if row.blocks]


def thinned(
    blocks: Sequence[StreamBlock], value: Callable[[StreamBlock], float | None], most: int = MAX_DRAWN
) -> Points:
    """Return the position and a figure of the blocks that have it; medians of neighbours if they are too many."""
    known = [(float(block.end), float(found)) for block in blocks if (found := value(block)) is not None]
    size = math.ceil(len(known) / most) or 1
    groups = [known[index : index + size] for index in range(0, len(known), size)]
    return tuple((group[-1][0], median(y for _, y in group)) for group in groups)


def _extrapolated(row: StreamRow, tokens: int) -> Points:
    line = fitted_line(row.blocks) if row.implementation == FULL else None
    last = row.blocks[-1]
    if line is None or last.end >= tokens:
        return ()
    step = (tokens - last.end) / EXTRAPOLATED_POINTS
    beyond = (last.end + step * (index + 1) for index in range(EXTRAPOLATED_POINTS))
    return (float(last.end), last.seconds), *((end, line.at(end)) for end in beyond)


LEVELS: Final = " ▁▂▃▄▅▆▇█"


def step_histograms(counts: Mapping[str, Mapping[int, int]], width: int) -> list[str]:
    """Draw histograms of steps' times on one logarithmic axis, one line for each name, and a line with its ends.

    The heights are logarithmic too, so that a single step is visible beside a million.
    """
    bins = [number for each in counts.values() for number in each]
    if not bins:
        return []
    low, high = min(bins), max(bins)
    size = (high - low) // width + 1
    highest = max(math.log1p(count) for each in counts.values() for count in each.values())
    label = max(map(len, counts))
    lines = []
    for name, each in counts.items():
        columns = [0] * ((high - low) // size + 1)
        for number, count in each.items():
            columns[(number - low) // size] += count
        bars = (min(math.ceil(math.log1p(count) / highest * 8), 8) for count in columns)
        lines.append(f"{name:<{label}} {''.join(LEVELS[bar] for bar in bars)}")
    ends = formatting.seconds(bin_top_s(low)), formatting.seconds(bin_top_s(high))
    return [*lines, f"{'':<{label}} {ends[0]}{ends[1]:>{max(1, (high - low) // size + 1 - len(ends[0]))}}"]


Cells = list[list[tuple[str, int]]]
"""Rows of (character, number of the curve), -1 for none."""


def drawn(chart: StreamChart, width: int, height: int) -> Cells:
    """Draw the curves in a grid: what was measured with the mark of its row, what was not with dots.

    `streaming` is drawn last, over the others.
    """
    cells = [[(" ", -1)] * width for _ in range(height)]
    order = sorted(range(len(chart.curves)), key=lambda number: chart.curves[number].name == STREAMING)
    for number in order:
        curve = chart.curves[number]
        _draw(cells, chart, curve.extrapolated, EXTRAPOLATED, number)
        _draw(cells, chart, curve.points, MARKS.get(curve.name, "x"), number)
    return cells


def _draw(cells: Cells, chart: StreamChart, points: Points, mark: str, number: int) -> None:
    width, height = len(cells[0]), len(cells)
    span = chart.high - chart.low

    def place(x: float, y: float) -> tuple[int, float]:
        part = min(max((y - chart.low) / span, 0.0), 1.0) if span > 0 else 0.0
        return min(int(x / chart.tokens * width), width - 1), (1 - part) * (height - 1)

    before: tuple[int, float] | None = None
    for x, y in points:
        column, row = place(x, y)
        cells[round(row)][column] = mark, number
        if before is not None:
            for between in range(before[0] + 1, column):
                at = before[1] + (row - before[1]) * (between - before[0]) / (column - before[0])
                cells[round(at)][between] = mark, number
        before = column, row


def axis_words(chart: StreamChart, width: int) -> str:
    """Format the horizontal axis: 0 at its left end, the number of tokens at its right."""
    right = f"{chart.tokens:,} tokens"
    return f"0{right:>{max(1, width - 1)}}"


GAP: Final = "   "
"""Between the words of a legend."""


def legend(chart: StreamChart, width: int) -> list[list[tuple[str, int]]]:
    """Return the lines of words below a chart, each with the number of its curve."""
    lines: list[list[tuple[str, int]]] = [[]]
    for words, number in _legend_words(chart):
        taken = sum(len(each) + len(GAP) for each, _ in lines[-1])
        if lines[-1] and taken + len(words) > width:
            lines.append([])
        lines[-1].append((words, number))
    return lines


def _legend_words(chart: StreamChart) -> list[tuple[str, int]]:
    words = [
        (f"{MARKS.get(curve.name, 'x')} {curve.name} {chart.format(curve.points[-1][1])}", number)
        for number, curve in enumerate(chart.curves)
        if curve.points
    ]
    beyond = [
        (f"{EXTRAPOLATED} {curve.name}, {EXTRAPOLATED_WORDS}: {chart.format(curve.extrapolated[-1][1])}", number)
        for number, curve in enumerate(chart.curves)
        if curve.extrapolated
    ]
    return [*words, *beyond]


def text_chart(chart: StreamChart, width: int, height: int) -> list[str]:
    """Draw a chart as lines of text: title, grid with its vertical axis, horizontal axis, legend."""
    ends = chart.format(chart.high), chart.format(chart.low) if chart.low else "0"
    left = max(map(len, ends))
    rows = ["".join(character for character, _ in row).rstrip() for row in drawn(chart, width - left - 2, height)]
    heads = [f"{ends[0]:>{left}} ┤", *[" " * left + " │"] * (height - 2), f"{ends[1]:>{left}} ┤"]
    return [
        chart.title,
        *(f"{head}{row}" for head, row in zip(heads, rows, strict=True)),
        " " * (left + 2) + axis_words(chart, width - left - 2),
        *(" " * (left + 2) + GAP.join(words for words, _ in line) for line in legend(chart, width - left - 2)),
    ]
