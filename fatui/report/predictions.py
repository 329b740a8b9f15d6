"""Predictions as text: a table of a case, apart from measured rows and marked as predicted."""

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attention.chips.prediction import Prediction, predict
from attention.chips.table import Chip
from attention.core.results import Report
from fatui import formatting
from fatui.report.table import FittedTable
from fatui.untrusted_text import markdown_cell

PREDICTED: Final = "predicted"
MIN_LIMIT_WIDTH: Final = 8
"""Width of what limits a call, which may wrap after each word."""


def range_text(prediction: Prediction) -> str:
    """Format the interval of a predicted time: "36.2 to 44.1 µs"."""
    if prediction.low_s is None or prediction.high_s is None:
        return formatting.UNKNOWN
    low, high = formatting.seconds(prediction.low_s), formatting.seconds(prediction.high_s)
    number, _, unit = low.rpartition(" ")
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"


def chip_line(chip: Chip) -> str:
    """Describe a chip by its figures: "NVIDIA H200 SXM: 132 cores, 989 TFLOP/s in 16 bits, 4.80 TB/s"."""
    parts = []
    if chip.cores:
        parts.append(f"{chip.cores:,.0f} cores")
    rate = chip.matrix16_flops or chip.vector32_flops
    parts.append(f"{formatting.flops(rate)}/s" if rate else "rate unknown")
    parts.append(formatting.bytes_per_second(chip.bytes_per_s) if chip.bytes_per_s else "bandwidth unknown")
    changed = f"; changed: {', '.join(chip.changed)}" if chip.changed else ""
    return f"{chip.name}: {', '.join(parts)}{changed}"


def predictions_table(case: str, made: Sequence[Prediction]) -> RenderableType:
    """Build the table of one case: a row for each chip and implementation, with what limits it."""
    title = Text(f"{case} · ").append(PREDICTED, style="bold italic").append(", not measured", style="dim")
    table = FittedTable(dropped_first=("tokens/s", "path", "limited by"), gap=1, prose_width=MIN_LIMIT_WIDTH)
    call, limit = f"{PREDICTED}\ncall", "limited by"
    for head in ("chip", "", "path", "tokens/s", call, "90 % interval", limit):
        right = head in ("tokens/s", call, "90 % interval")
        table.add_column(head, justify="right" if right else "left", no_wrap=head != limit)
    previous = ""
    for each in made:
        chip = "" if each.chip == previous else each.chip
        previous = each.chip
        table.add_row(
            chip,
            each.implementation,
            each.path or "",
            formatting.tokens_per_second(each.tokens_per_second),
            formatting.seconds(each.predicted_s),
            range_text(each),
            each.limit or "",
            style="dim" if each.predicted_s is None else "italic",
        )
    return Group(title, table, *(Text(line, style="dim") for line in _unknown_lines(made)))


def _unknown_lines(made: Sequence[Prediction]) -> list[str]:
    """Say why some times are not predicted, a line for each reason."""
    why: dict[tuple[str, str], list[str]] = {}
    for each in made:
        if each.predicted_s is None and each.reason:
            why.setdefault((each.chip, each.reason), []).append(each.implementation)
    return [f"{chip}, {', '.join(names)}: {reason}" for (chip, reason), names in why.items()]


def basis_lines(made: Sequence[Prediction], chips: Sequence[Chip]) -> list[str]:
    """Describe the chips, and what their predictions were calibrated on, a line for each chip."""
    return [
        " ".join([f"{chip_line(chip)}.", *basis_texts([each for each in made if each.chip == chip.key])])
        for chip in chips
    ]


def basis_texts(made: Sequence[Prediction]) -> list[str]:
    """Say what the predictions for a chip were calibrated on, a sentence for each chip of the calibration."""
    rows: dict[tuple[str, str], dict[tuple[str, str | None, str, str], int]] = {}
    for each in made:
        if each.calibrated_on:
            family = (each.implementation, each.path, each.workload.dtype, each.workload.pass_)
            rows.setdefault((each.calibrated_on, each.like or ""), {})[family] = each.calibrated_rows
    return [f"Calibrated on {sum(own.values())} rows on {name}: {like}." for (name, like), own in rows.items()]


def predictions_of(report: Report, chips: Sequence[Chip]) -> list[Prediction]:
    """Predict each row of a run on some chips."""
    return [
        predict(case.workload, row.implementation, chip) for case in report.cases for row in case.rows for chip in chips
    ]


def beside_table(report: Report, chips: Sequence[Chip], made: Sequence[Prediction]) -> RenderableType:
    """Build the table of calls measured here beside those predicted on chips."""
    title = Text("Beside this machine: ").append(PREDICTED, style="bold italic").append(", not measured", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("case", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("here, measured", justify="right")
    table.add_column("│")
    for chip in chips:
        table.add_column(f"{chip.key}, {PREDICTED}", justify="right", style="italic", no_wrap=True)
    found = {(each.workload, each.implementation, each.chip): each for each in made}
    for case in report.cases:
        for number, row in enumerate(case.rows):
            there = [found[case.workload, row.implementation, chip.key] for chip in chips]
            here = formatting.seconds(row.call_s.median if row.call_s else None)
            table.add_row(
                "" if number else case.workload.label,
                row.implementation,
                here,
                "│",
                *(formatting.UNKNOWN if each.predicted_s is None else _call_text(each) for each in there),
            )
    return Group(title, table)


def _call_text(prediction: Prediction) -> str:
    return f"{formatting.seconds(prediction.predicted_s)} ({range_text(prediction)})"


def to_markdown(made: Sequence[Prediction]) -> str:
    """Return predictions as a Markdown table."""
    heads = ("case", "chip", "implementation", "path", f"{PREDICTED} call", "90 % interval", "limited by")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for each in made:
        call = formatting.seconds(each.predicted_s)
        cells = (each.workload.label, each.chip, each.implementation, each.path or "", call, range_text(each))
        lines.append(f"| {' | '.join(map(markdown_cell, cells))} | {each.limit or each.reason or ''} |")
    return "\n".join(lines) + "\n"
