"""The details of a row as lines of text, for its dialog and its pane."""

from typing import Final

from attention.core.results import Case, Row
from attention.core.workload import COUNTERPARTS
from fatui import formatting

ENDED_BY: Final = {
    "precision": "enough for the precision",
    "time": "until the time was up",
    "iterations": "all iterations",
    "interrupted": "until it was interrupted",
    "failed": "until it failed",
}
"""Why the rounds of a row ended, by its `stopped_by`."""


def figure_lines(row: Row, case: Case) -> list[str]:
    """Return one line per figure, with its name."""
    pairs = [
        ("path", f"{row.path or formatting.UNKNOWN}{_fused(row)}"),
        ("verdict", formatting.verdict(row, case)),
        ("tokens/s", formatting.tokens_per_second(row.tokens_per_second)),
        ("per call", f"{formatting.interval_text(row.call_s)}, the median and its 95 % interval"),
        ("speedup", f"{formatting.speedup_text(row.speedup)} over {case.reference or formatting.UNKNOWN}"),
        *_counterparts(row),
        ("noise floor", formatting.percent(case.noise_floor.floor if case.noise_floor else None)),
        (
            "rate",
            f"{formatting.flops(row.flops_per_s)}/s, {formatting.percent(row.efficiency)} of the best rate measured",
        ),
        ("latency", f"{formatting.seconds(row.latency_s)} for one synchronised call"),
        ("first call", f"{formatting.seconds(row.first_call_s)}, including compilation"),
        ("memory", f"{formatting.size(row.peak_bytes)} at the peak, {formatting.size(row.predicted_bytes)} predicted"),
        ("error", f"{formatting.row_error(row)} at most, {formatting.error(row.rms_error)} rms, against float64"),
        *_quantization(row, case),
        *_ranks(row),
        ("samples", f"{len(row.samples)}, {ENDED_BY.get(row.stopped_by or '', row.stopped_by or formatting.UNKNOWN)}"),
    ]
    return [f"{name:<12}{text}" for name, text in pairs]


def _counterparts(row: Row) -> list[tuple[str, str]]:
    return [
        (
            formatting.OVER[name],
            f"{formatting.over_text(row, name)}, {name.replace('_', ' ')} {formatting.interval_text(call)} per call",
        )
        for name in COUNTERPARTS
        if (call := getattr(row, f"{name}_s"))
    ]


def _ranks(row: Row) -> list[tuple[str, str]]:
    if not row.per_rank:
        return []
    hidden = f"{formatting.exposed_text(row)} of communication not hidden by computing"
    lines = [(f"rank {each.rank}", formatting.rank_words(each)) for each in row.per_rank]
    return [("link", f"{formatting.sent_text(row)} sent per call, {hidden}"), *lines]


def _quantization(row: Row, case: Case) -> list[tuple[str, str]]:
    sizes = formatting.kv_sizes(case.workload)
    if sizes is None:
        return []
    return [
        ("K/V error", f"{formatting.kv_error_text(row)} rms of the output, against unquantized K and V"),
        ("K/V", sizes),
    ]


def _fused(row: Row) -> str:
    return "" if row.fused is None or "fused" in (row.path or "") else ", fused" if row.fused else ", unfused"


def sample_lines(row: Row) -> list[str]:
    """Return the samples as a small histogram with its range."""
    low, high = min(row.samples), max(row.samples)
    left, right = formatting.seconds(low), formatting.seconds(high)
    bars = formatting.histogram(row.samples, width=56, height=4)
    return [*bars, f"{left}{'a call':^{max(6, 56 - len(left) - len(right))}}{right}"]


def sentences(row: Row, case: Case, command: str) -> list[str]:
    """Return the reason for the path, what an autotuned row ran, throttling, and the command that measures it again."""
    lines = [row.reason] if row.reason else []
    lines += [note for note in formatting.same_paths(case) if note.startswith(f"{row.implementation} ")]
    if row.throttled:
        lines.append("The reference slowed down while this case ran: the machine throttles, or was busy.")
    return [*lines, "", command]
