"""The details of one row: figures, samples, reason, and the command that reproduces it."""

from collections.abc import Sequence
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from attention.report import Case, Row
from fatui import figures
from fatui.ascii import literal
from fatui.histogram import histogram

ENDED_BY: Final = {
    "precision": "enough for the precision",
    "time": "until the time was up",
    "iterations": "all iterations",
    "interrupted": "until it was interrupted",
    "failed": "until it failed",
}
"""Why the rounds of a row ended, by its `stopped_by`."""


class RowDetails(ModalScreen[None]):
    """Dialog with the details of a row."""

    CSS_PATH: ClassVar = ["dialog.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="back"),
        Binding("q", "close", "Close", id="quit"),
        Binding("enter", "close", "Close"),
    ]

    def __init__(self, case: Case, row: Row, command: str) -> None:
        """Create the dialog for a row, its case, and the command that measures it again."""
        super().__init__()
        self._case, self._row, self._command = case, row, command
        self._notes = [note for note in figures.same_paths(case) if note.startswith(f"{row.implementation} ")]

    def compose(self) -> ComposeResult:
        """Yield the figures in two columns, the samples, and the notes."""
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = literal(f"{self._row.implementation} on {self._case.workload.label}")
            dialog.border_subtitle = "escape closes"
            yield Static("\n".join(figure_lines(self._row, self._case)), markup=False)
            if self._row.samples:
                yield Static("\n".join(sample_lines(self._row)), markup=False, classes="answers")
            yield Static("\n".join(sentences(self._row, self._command, self._notes)), markup=False, classes="answers")

    def action_close(self) -> None:
        """Close the dialog."""
        self.dismiss()


def figure_lines(row: Row, case: Case) -> list[str]:
    """Return one line per figure, with its name."""
    pairs = [
        ("path", f"{row.path or figures.UNKNOWN}{_fused(row)}"),
        ("verdict", figures.verdict(row, case)),
        ("tokens/s", figures.tokens_per_second(row.tokens_per_second)),
        ("per call", f"{figures.interval_text(row.call_s)}, the median and its 95 % interval"),
        ("speedup", f"{figures.speedup_text(row.speedup)} over {case.reference or figures.UNKNOWN}"),
        ("noise floor", figures.percent(case.noise_floor.floor if case.noise_floor else None)),
        ("rate", f"{figures.flops(row.flops_per_s)}/s, {figures.percent(row.efficiency)} of the best rate measured"),
        ("latency", f"{figures.seconds(row.latency_s)} for one synchronised call"),
        ("first call", f"{figures.seconds(row.first_call_s)}, including compilation"),
        ("memory", f"{figures.size(row.peak_bytes)} at the peak, {figures.size(row.predicted_bytes)} predicted"),
        ("error", f"{figures.error(row.max_error)} at most, {figures.error(row.rms_error)} rms, against float64"),
        ("samples", f"{len(row.samples)}, {ENDED_BY.get(row.stopped_by or '', row.stopped_by or figures.UNKNOWN)}"),
    ]
    return [f"{name:<12}{text}" for name, text in pairs]


def _fused(row: Row) -> str:
    return "" if row.fused is None or "fused" in (row.path or "") else ", fused" if row.fused else ", unfused"


def sample_lines(row: Row) -> list[str]:
    """Return the samples as a small histogram with its range."""
    low, high = min(row.samples), max(row.samples)
    left, right = figures.seconds(low), figures.seconds(high)
    bars = histogram(row.samples, width=56, height=4)
    return [*bars, f"{left}{'a call':^{max(6, 56 - len(left) - len(right))}}{right}"]


def sentences(row: Row, command: str, notes: Sequence[str] = ()) -> list[str]:
    """Return the reason for the path, further notes, one on throttling, and the command that measures it again."""
    lines = [row.reason, *notes] if row.reason else [*notes]
    if row.throttled:
        lines.append("The reference slowed down while this case ran: the machine throttles, or was busy.")
    return [*lines, "", command]
