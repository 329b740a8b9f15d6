"""The rows of a run as lines of the comparison table: cells, order and stars."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from attention.core.results import AnyCase, Case, Row, Summary
from fatui import formatting
from fatui.report.document import counted


class TableColumn(Struct, frozen=True, kw_only=True):
    """One column; when two do not both fit, the one with the lower rank is shown."""

    name: str
    title: str
    rank: int = 0
    """0: always shown."""
    right: bool = True
    """Whether cells are right-aligned."""
    least: int = 0
    """Minimum width, so that the column does not grow while figures come in."""
    widest: int = 40
    narrowest: int | None = None
    """Width to which the column may shrink, cutting its texts, rather than leave the page; None: it keeps its width."""
    optional: bool = False
    """Whether the column is left out while all its cells are empty."""


class TableLine(Struct, frozen=True, kw_only=True):
    """A row, or the heading of a block of rows."""

    key: str | None = None
    """Identifies the line when chosen; None for a line that cannot be chosen."""
    cells: Mapping[str, str] = {}
    span: str | None = None
    """One text over the whole width, instead of cells."""
    tone: str = ""
    """"head", "dim", "good" or "bad"."""
    figures: Mapping[str, float | str | None] = {}
    """What orders the line, by column."""


SYMBOLS: Final = {
    "★": "best, or equal to it",
    "≈": "≈ 1 inside the noise floor",
    "?": "too uncertain to say",
    "!": "the machine slowed down",
    "~": "extrapolated",
    "…": "not known yet",
    "●": "marked",
}
"""The symbols in cells, for the legend."""
NAMES: Final = ("implementation", "path", "finding")
"""Columns whose texts are names or sentences, in which a symbol stands for itself."""


def legend(lines: Sequence[TableLine], columns: Sequence[str] | None = None) -> str:
    """Explain the symbols in the cells of some lines; `columns`: those that are visible, by default all."""
    text = "".join(
        cell
        for line in lines
        for name, cell in line.cells.items()
        if name not in NAMES and (columns is None or name in columns)
    )
    used = [(symbol, words) for symbol, words in SYMBOLS.items() if symbol in text]
    return " · ".join(words if words.startswith(symbol) else f"{symbol} {words}" for symbol, words in used)


def ordered(lines: Sequence[TableLine], by: str, descending: bool) -> list[TableLine]:
    """Order the lines of each block by a column; those without a figure come last in either order."""
    if not by:
        return list(lines)
    made: list[TableLine] = []
    block: list[TableLine] = []
    for line in [*lines, None]:
        if line is None or line.span is not None:
            known = [each for each in block if each.figures.get(by) is not None]
            known.sort(key=lambda each: each.figures[by] or 0, reverse=descending)
            made += [*known, *(each for each in block if each.figures.get(by) is None)]
            block = []
            made += [line] if line is not None else []
        else:
            block.append(line)
    return made


def filtered(lines: Sequence[TableLine], needle: str) -> list[TableLine]:
    """Return the lines with a text in them or in the heading of their block, case-insensitively, and the headings."""
    if not needle:
        return list(lines)
    made: list[TableLine] = []
    block, heads = "", list[TableLine]()
    for line in lines:
        if line.span is not None:
            block, heads = line.span, [line]
        elif any(needle.lower() in text.lower() for text in (*line.cells.values(), block)):
            made += [*heads, line]
            heads = []
    return made


STAR: Final = " ★"
NO_STAR: Final = "  "
COLUMNS: Final = (
    TableColumn(name="implementation", title="", right=False, least=9, widest=16),
    TableColumn(name="path", title="path", right=False, rank=6, least=18, widest=22, narrowest=10),
    TableColumn(name="tokens/s", title="tokens/s", rank=1, least=8),
    TableColumn(name="per call", title="per call", rank=5, least=7),
    TableColumn(name="speedup", title="speedup", rank=2, least=13),
    TableColumn(name="over dense", title="over dense", rank=4, least=11, optional=True),
    TableColumn(name="K/V speedup", title="K/V speedup", rank=4, least=11, optional=True),
    TableColumn(name="K/V error", title="K/V error", rank=4, optional=True),
    TableColumn(name="of ideal", title="of ideal", rank=4, least=11, optional=True),
    TableColumn(name="sent", title="sent", rank=4, optional=True),
    TableColumn(name="exposed", title="exposed", rank=4, optional=True),
    TableColumn(name="energy", title="J/token", rank=6, optional=True),
    TableColumn(name="efficiency", title="of peak", rank=7),
    TableColumn(name="verdict", title="verdict", right=False, rank=3, least=8, widest=19),
    TableColumn(name="memory", title="memory", rank=8),
    TableColumn(name="max error", title="max error", rank=9),
    TableColumn(name="interval", title="per call, 95 %", rank=10),
    TableColumn(name="FLOP/s", title="rate", rank=11),
    TableColumn(name="latency", title="latency", rank=12),
    TableColumn(name="first call", title="first call", rank=13),
    TableColumn(name="predicted", title="predicted", rank=14),
    TableColumn(name="rms error", title="rms error", rank=15),
    TableColumn(name="stopped by", title="stopped by", right=False, rank=16, widest=14),
)
SORT_FIGURES: Final[dict[str, Callable[[Row], float | str | None]]] = {
    "path": lambda row: row.path,
    "tokens/s": lambda row: row.tokens_per_second,
    "per call": lambda row: row.call_s.median if row.call_s else None,
    "interval": lambda row: row.call_s.relative_half_width if row.call_s else None,
    "speedup": lambda row: row.speedup.value if row.speedup else None,
    "over dense": lambda row: row.over_dense.value if row.over_dense else None,
    "K/V speedup": lambda row: row.over_unquantized.value if row.over_unquantized else None,
    "K/V error": lambda row: row.kv_error,
    "of ideal": lambda row: row.over_one_device.value if row.over_one_device else None,
    "sent": lambda row: row.sent_bytes,
    "exposed": lambda row: row.exposed_s,
    "energy": lambda row: row.joules_per_token,
    "efficiency": lambda row: row.efficiency,
    "verdict": lambda row: row.status,
    "memory": lambda row: row.peak_bytes,
    "max error": lambda row: row.max_error,
    "FLOP/s": lambda row: row.flops_per_s,
    "latency": lambda row: row.latency_s,
    "first call": lambda row: row.first_call_s,
    "predicted": lambda row: row.predicted_bytes,
    "rms error": lambda row: row.rms_error,
    "stopped by": lambda row: row.stopped_by,
}
SORTABLE: Final = ("", *SORT_FIGURES)


def row_key(case: int, implementation: str) -> str:
    """Return the key of a row's line."""
    return f"{case}:{implementation}"


def split_key(key: str) -> tuple[int, str]:
    """Return the case and the implementation of a key."""
    case, _, implementation = key.partition(":")
    return int(case), implementation


def case_lines(index: int, case: Case) -> list[TableLine]:
    """Return the lines of one case's rows."""
    fastest = formatting.best_of(case)
    leanest = _leanest(case)
    return [
        TableLine(
            key=row_key(index, row.implementation),
            cells=_cells(row, case, row.implementation in fastest, row.implementation in leanest),
            tone=tone_of(row, row.implementation in fastest),
            figures={name: figure(row) for name, figure in SORT_FIGURES.items()},
        )
        for row in case.rows
    ]


def tone_of(row: Row, fastest: bool) -> str:
    """Return the tone of a row's line."""
    if row.status in ("failed", "inaccurate"):
        return "bad"
    return "dim" if row.status != "ok" else "good" if fastest else ""


def _leanest(case: Case) -> tuple[str, ...]:
    """Return the rows with the least memory, or within 1 % of it; none if all are alike, or with too few rounds."""
    if any(row.collecting for row in case.rows):
        return ()
    peaks = {row.implementation: row.peak_bytes for row in case.rows if row.status == "ok" and row.peak_bytes}
    if not peaks:
        return ()
    edge = min(peaks.values()) * 1.01
    names = tuple(name for name, peak in peaks.items() if peak <= edge)
    return names if len(names) < len(peaks) else ()


def _cells(row: Row, case: Case, fastest: bool, leanest: bool) -> dict[str, str]:
    if row.status not in ("ok", "inaccurate"):
        return {"implementation": row.implementation, "path": row.path or "-", "verdict": row.status}
    return {
        "implementation": row.implementation,
        "path": row.path or formatting.UNKNOWN,
        "tokens/s": formatting.tokens_per_second(row.tokens_per_second) + (STAR if fastest else NO_STAR),
        "per call": formatting.seconds(row.call_s.median if row.call_s else None),
        "speedup": formatting.speedup_text(row.speedup) if row.speedup else "…",
        **{
            head: formatting.over_text(row, name) if formatting.over(row, name) else ""
            for name, head in formatting.OVER.items()
        },
        "K/V error": "" if row.kv_error is None else formatting.kv_error_text(row),
        "sent": formatting.sent_text(row) if row.per_rank else "",
        "exposed": formatting.exposed_text(row) if row.per_rank else "",
        "energy": "" if row.joules_per_token is None else formatting.energy_text(row),
        "efficiency": formatting.percent(row.efficiency),
        "verdict": formatting.word(row, case) + (" !" if row.throttled else ""),
        "memory": formatting.size(row.peak_bytes) + (STAR if leanest else NO_STAR),
        "max error": formatting.row_error(row),
        "interval": formatting.interval_text(row.call_s),
        "FLOP/s": formatting.UNKNOWN if row.flops_per_s is None else f"{formatting.flops(row.flops_per_s)}/s",
        "latency": formatting.seconds(row.latency_s),
        "first call": formatting.seconds(row.first_call_s),
        "predicted": formatting.size(row.predicted_bytes),
        "rms error": formatting.error(row.rms_error),
        "stopped by": row.stopped_by or "",
    }


def block_head(index: int, case: AnyCase, words: str = "") -> TableLine:
    """Return the heading of one case in a run of several; `words` follow its name."""
    return TableLine(span=f"{index + 1}. {case.workload.label}{words}{notes(case)}", tone="head")


def notes(case: AnyCase) -> str:
    """Format the reference, unless it is the baseline, and the noise floor, if known."""
    floor, change = case.noise_floor, formatting.reference_change(case)
    text = f" · {change}" if change else ""
    return f"{text} · noise floor {formatting.percent(floor.floor)}" if floor and math.isfinite(floor.floor) else text


def step_text(step: str) -> str:
    """Format the current step of an implementation."""
    return "compiling" if step == "build" else step


def waiting_lines(index: int, names: list[tuple[str, str]]) -> list[TableLine]:
    """Return the lines of implementations that have no row yet, with their current step."""
    return [
        TableLine(
            key=row_key(index, name),
            cells={"implementation": name, "verdict": step_text(step) or "waiting"},
            tone="dim",
        )
        for name, step in names
    ]


def summary_lines(summary: tuple[Summary, ...], cases: Sequence[AnyCase], of: int | None = None) -> list[TableLine]:
    """Return the geometric mean of each implementation over complete cases; `of`: how many there are, if not all."""
    if not summary:
        return []
    total, references = len(cases), {case.reference for case in cases}
    over = f" over {references.pop()}" if len(references) == 1 and None not in references else ""
    many = counted(total, "complete case")
    many = many if of in (None, total) else f"{total} of {counted(of, 'complete case')}"
    head = TableLine(span=f"Speedups{over}, geometric mean of {many}", tone="head")
    return [head, *(_summary_line(line, total) for line in summary)]


def _summary_line(line: Summary, total: int) -> TableLine:
    count = counted(total, "case")
    count = count if line.cases == total else f"{line.cases} of {count}"
    bad = f"{line.not_ok} not ok" if line.not_ok else ""
    cells = {"implementation": line.implementation, "path": count, "speedup": formatting.speedup_text(line.speedup)}
    return TableLine(cells={**cells, "verdict": bad})
