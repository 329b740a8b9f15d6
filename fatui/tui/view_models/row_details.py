"""The details of a row as lines of text, for its dialog and its pane."""

import textwrap
from typing import Final

from attention.core.results import (
    AnyCase,
    Case,
    FineTuningRow,
    ModelCase,
    ModelRow,
    Row,
    StreamRow,
)
from attention.core.workload import COUNTERPARTS
from fatui import formatting
from fatui.report.table import curve, growth_text, loss_text

ENDED_BY: Final = {
    "precision": "enough for the precision",
    "time": "until the time was up",
    "iterations": "all iterations",
    "interrupted": "until it was interrupted",
    "failed": "until it failed",
}
"""Why the rounds of a row ended, by its `stopped_by`."""


CANDIDATES: Final = {
    " tall": "tall: in work items of 256 query rows, which read keys and values less often; there are fewer to share.",
    " compiled": "compiled: through mx.compile.",
    " MiB": "MiB: what the scores of its blocks may take.",
}
"""What the names of an autotuned row's candidates mean, by how they end."""
WIDTH: Final = 66
"""Columns of text in a dialog."""


def figure_lines(row: Row, case: AnyCase, width: int = WIDTH) -> list[str]:
    """Return one line per figure, with its name; one longer than the width goes on below its beginning."""
    pairs = _figures(row, case) if isinstance(case, Case) else _model_figures(row, case)
    return [hanging(name, text, 12, width) for name, text in pairs]


def hanging(name: str, text: str, indent: int, width: int = WIDTH) -> str:
    """Return a text after its name, whose further lines begin where it does."""
    lines = textwrap.wrap(text, max(width - indent, 20)) or [""]
    return f"\n{'':<{indent}}".join([f"{name:<{indent - 1}} {lines[0]}", *lines[1:]])


def _samples(row: Row) -> tuple[str, str]:
    if row.stopped_by is None:
        return "samples", f"{len(row.samples)} so far"
    ended = ENDED_BY.get(row.stopped_by, row.stopped_by)
    return "samples", f"{len(row.samples)}, {ended}"


def _model_figures(row: Row, case: AnyCase) -> list[tuple[str, str]]:
    """Return the name and the text of each figure of a row of a model, a fine-tuning or a stream."""
    pairs = [
        ("path", f"{row.path or formatting.UNKNOWN}{_fused(row)}"),
        ("verdict", formatting.verdict(row, case)),
    ]
    if isinstance(row, StreamRow):
        pairs += _stream_figures(row)
    else:
        what = "of an iteration" if isinstance(row, FineTuningRow) else "of a token"
        if isinstance(case, ModelCase) and case.workload.phase == "prefill":
            what = "to the first token"
        floor = case.noise_floor.floor if case.noise_floor else None
        pairs += [
            ("tokens/s", formatting.tokens_per_second(row.tokens_per_second)),
            ("time", f"{formatting.interval_text(row.call_s)} {what}, median with its 95 % interval"),
            ("speedup", f"{formatting.speedup_text(row.speedup)} over {case.reference or formatting.UNKNOWN}"),
            ("noise floor", formatting.percent(floor)),
            ("memory", f"{formatting.size(row.peak_bytes)} at the peak, without the weights"),
        ]
    if isinstance(row, ModelRow):
        pairs += _generation_figures(row)
    if isinstance(row, FineTuningRow):
        pairs += [
            ("loss", f"{loss_text(row)}  {curve(row)}"),
            ("off", f"{formatting.error(row.loss_difference)} at most, relative, from the losses of {case.reference}"),
        ]
    return [*pairs, *_calls(row), *_ranks(row), _samples(row)]


def _generation_figures(row: ModelRow) -> list[tuple[str, str]]:
    pairs = [
        ("attention", f"{formatting.share_text(row.attention_share)} of the model's time"),
        ("off", f"{formatting.error(row.logits_error)} rms of the last logits, relative to the reference's"),
        *_counterparts(row),
    ]
    if row.kl_divergence is not None:
        pairs.append(("KL", f"{formatting.divergence_text(row)} nats from the next token with an unquantized cache"))
    if row.layer_s is not None:
        layers = f"{formatting.seconds(row.layer_s)} each, {formatting.seconds(row.fixed_s)} for the rest"
        pairs.append(("layers", layers))
    return pairs


def _stream_figures(row: StreamRow) -> list[tuple[str, str]]:
    extrapolated, slowest = ", extrapolated" if row.extrapolated else "", formatting.seconds(row.slowest_s)
    pairs = [
        ("tokens", f"{row.tokens:,}"),
        ("time", f"{formatting.interval_text(row.call_s)} of a token, median with its 95 % interval"),
        ("99 %", f"of the tokens take at most {formatting.seconds(row.p99_s)}, the slowest {slowest}"),
        ("at the end", f"{formatting.seconds(row.end_s)} for a token{extrapolated}"),
        ("flat within", formatting.percent(row.spread)),
        ("memory", f"{growth_text(row.start_bytes, row.end_bytes)} since the window was full"),
        ("of bound", f"{formatting.percent(row.bound_share)}: reading what a token needs over its time"),
    ]
    if row.tenth_s:
        pairs.append(("tenths", ", ".join(formatting.seconds(each) for each in row.tenth_s)))
    losses = (("loss inside", row.loss_inside), ("beyond", row.loss_beyond))
    return pairs + [(name, f"{loss:.3f} nats") for name, loss in losses if loss is not None]


def _calls(row: Row) -> list[tuple[str, str]]:
    """Return how many attention calls of a model the implementation computed."""
    computed, passed = getattr(row, "replaced_calls", None), getattr(row, "passed_on_calls", None)
    if computed is None:
        return []
    return [("calls", f"{computed:,} of attention reached it" + (f", {passed:,} went to MLX's own" if passed else ""))]


def _figures(row: Row, case: Case) -> list[tuple[str, str]]:
    """Return the name and the text of each figure of a row over an attention shape."""
    return [
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
        *([("energy", f"{formatting.energy_text(row)} per token")] if row.joules_per_token is not None else []),
        ("latency", f"{formatting.seconds(row.latency_s)} for one synchronised call"),
        ("first call", f"{formatting.seconds(row.first_call_s)}, timed apart, with what the call itself compiles"),
        ("memory", f"{formatting.size(row.peak_bytes)} at the peak, {formatting.size(row.predicted_bytes)} predicted"),
        ("error", f"{formatting.row_error(row)} at most, {formatting.error(row.rms_error)} rms, {_against(case)}"),
        *_quantization(row, case),
        *_ranks(row),
        _samples(row),
    ]


def _against(case: Case) -> str:
    """Say what the error is measured against, which "accurate" refers to."""
    return f"against float64{' over the dequantized K and V' if case.workload.quantized else ''}"


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


def sentences(row: Row, case: AnyCase, command: str) -> list[str]:
    """Return the reason for the path, what an autotuned row ran, throttling, and the command that measures it again."""
    lines = [row.reason] if row.reason else []
    if row.path and row.path.startswith(formatting.TUNED):
        lines += [words for end, words in CANDIDATES.items() if row.path.endswith(end)]
    lines += [note for note in formatting.same_paths(case) if note.startswith(f"{row.implementation} ")]
    if row.throttled:
        lines.append("The reference slowed down while this case ran: the machine throttles, or was busy.")
    return [*lines, "", command]
