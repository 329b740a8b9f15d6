"""Formatting of figures and rows: three significant figures with a unit, and n/a for unknown values."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from attention.core.errors import NoBackendError, Remedy
from attention.core.events import CaseTimeEstimated, RunRefused
from attention.core.results import (
    AnyCase,
    Case,
    Interval,
    ModelRow,
    RankFigures,
    Ratio,
    Row,
    Share,
    StreamCase,
    StreamRow,
)
from attention.core.route import Route
from attention.core.stream import FULL, RECOMPUTED, STREAMING, WINDOW
from attention.core.workload import COUNTERPARTS, Counterpart, Workload

UNKNOWN: Final = "n/a"
CPU_DTYPE_REASON: Final = (
    "models on a CPU run in float32 by default: MLX multiplies 16-bit matrices there by loops of its own, many times "
    "slower than a BLAS"
)
INSTALL_BACKEND: Final = "pip install 'fatui[cpu]', 'fatui[cuda12]' or 'fatui[cuda13]' on Linux, 'fatui' on macOS"
REMEDIES: Final = {
    None: "",
    Remedy.INSTALL_BACKEND: f"; install one: {INSTALL_BACKEND}",
    Remedy.INSTALL_MLX_LM: ": pip install 'fatui[models]'",
}
"""How each remedy of the engine continues what is wrong."""
STAR: Final = "★"
TUNED: Final = "tuned: "
"""Begins the path of an implementation that chose another one."""
OK: Final = "ok"
WIDE: Final = 0.25
"""Relative half width of an interval, above which its ends are shown instead of ±, and it gets no star."""
DECIMAL: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"), (1.0, ""))
BINARY: Final = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
ENERGIES: Final = ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ"))
TIMES: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def problem_text(problem: NoBackendError | RunRefused) -> str:
    """Return what is wrong, what to do about it, and the cause."""
    what = problem.reason if isinstance(problem, RunRefused) else problem.what
    return f"{what}{REMEDIES[problem.remedy]}" + (f" ({problem.why})" if problem.why else "")


def three(value: float) -> str:
    """Format three significant figures without an exponent: "0.0148", "1.40", "36.2", "412"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{decimals(value)}f}"


def decimals(value: float) -> int:
    """Return the decimals that show three significant figures of a value, after rounding."""
    if value == 0:
        return 2
    exponent = int(f"{abs(value):.2e}".partition("e")[2])
    return max(0, 2 - exponent)


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """Return factor and name of the largest unit in which a value is at least 1, after rounding."""
    for factor, unit in units:
        if float(f"{abs(value) / factor:.2e}") >= 1:
            return factor, unit
    return units[-1]


def rate(value: float | None) -> str:
    """Format a rate with a decimal prefix and no unit: "1.40 M"."""
    if value is None:
        return UNKNOWN
    factor, unit = _scaled(value, DECIMAL)
    return f"{three(value / factor)} {unit}".rstrip()


def tokens_per_second(value: float | None) -> str:
    """Format tokens/s: "28.0 K", "1.40 M"."""
    return rate(value)


def flops(value: float | None) -> str:
    """Format floating-point operations: "268 MFLOP"; with "/s" appended by the caller, a rate."""
    return UNKNOWN if value is None else _with_unit(rate(value), "FLOP")


def bytes_per_second(value: float | None) -> str:
    """Format memory traffic with decimal prefixes, as data sheets do: "38.1 GB/s"."""
    return UNKNOWN if value is None else _with_unit(rate(value), "B/s")


def _with_unit(text: str, unit: str) -> str:
    return f"{text}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def per(value: float | None, unit: float) -> str:
    """Format a value in the unit that its column names, as a bare number: "0.0148"."""
    return UNKNOWN if value is None else three(value / unit)


def seconds(value: float | None) -> str:
    """Format a time: "36.2 ms", "1.21 s"."""
    if value is None:
        return UNKNOWN
    factor, unit = _scaled(value, TIMES)
    return f"{three(value / factor)} {unit}"


def energy(value: float) -> str:
    """Format an energy: "6.00 mJ"."""
    factor, unit = _scaled(value, ENERGIES)
    return f"{three(value / factor)} {unit}"


def energy_text(row: Row) -> str:
    """Format the energy of a token."""
    return UNKNOWN if row.joules_per_token is None else energy(row.joules_per_token)


def duration(value: float) -> str:
    """Format a time to wait, rounded up so that it changes at most once a second: "9 s", "2 min 05 s", "1 h 02 min"."""
    whole = math.ceil(max(value, 0.0))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def short_name(name: str, longest: int) -> str:
    """Shorten an implementation's name; of "folder/mine.py:Fast" keep "mine.py:Fast", or of that the end: "…Fast"."""
    short = name.rpartition("/")[2]
    return short if len(short) <= longest else "…" + short.rpartition(":")[2][1 - longest :]


def started_text(started: str) -> str:
    """Format the ISO time at which a run started, to the minute: "2026-01-31 09:05"."""
    return started[:16].replace("T", " ")


def time_left(value: float) -> str:
    """Format the seconds to the estimated end: "9 s left", or if negative, "5 s over the estimate"."""
    return f"{duration(value)} left" if value >= 0 else f"{duration(-value)} over the estimate"


def estimate_text(event: CaseTimeEstimated, noun: str = "implementation") -> str:
    """Format an estimate: "about 4 min 20 s for 5 implementations"; `noun`: what is timed."""
    count = event.implementations
    return f"about {duration(event.seconds)} for {count} {noun}{'s' if count > 1 else ''}"


def size(value: float | None) -> str:
    """Format bytes with binary prefixes, round numbers without decimals: "41 MiB", "1.25 GiB"."""
    if value is None:
        return UNKNOWN
    factor, unit = next(((f, u) for f, u in BINARY if abs(value) >= 1000 * f / 1024), BINARY[-1])
    text = three(value / factor)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


AT_MOST: Final = "≤"


def predicted_size(route: Route) -> str:
    """Format the memory that a route predicts, after "≤" an upper bound."""
    known = route.predicted_bytes is not None
    return f"{AT_MOST if known and route.at_most else ''}{size(route.predicted_bytes)}"


def size_instead(taken: float, reference: float) -> str:
    """Format a size beside the reference's: "310 KiB instead of 2.0 GiB"; one alone where both read the same.

    The unit stands once if it is the same: "0.51 instead of 5.0 MiB".
    """
    text, other = size(taken), size(reference)
    if text == other:
        return text
    number, _, unit = text.partition(" ")
    return f"{number if other.endswith(f' {unit}') else text} instead of {other}"


def percent(value: float | None) -> str:
    """Format a fraction as a percentage: "62 %", "0.8 %", "0.04 %"; "<0.001 %" below that."""
    if value is None:
        return UNKNOWN
    shown = 100 * value
    if 0 < shown < 0.001:
        return "<0.001 %"
    if abs(shown) >= 9.95 or shown == 0:
        return f"{shown:.0f} %"
    return f"{shown:.1f} %" if abs(shown) >= 0.95 else f"{float(f'{shown:.1g}'):g} %"


def share_text(share: Share | None) -> str:
    """Format a share of time with its interval: "31 ±2 %"; "< 3 %" if the interval includes 0.

    "n/a" if the interval spans 0 to 1.
    """
    if share is None or (share.low <= 0 and share.high >= 1):
        return UNKNOWN
    if share.low <= 0:
        return f"< {max(100 * share.high, 0.1):.2g} %"
    half = 100 * max(share.high - share.value, share.value - share.low)
    places = 0 if half >= 1 else 1
    return f"{100 * share.value:.{places}f} ±{_outward(half, places)} %"


def error(value: float | None) -> str:
    """Format a numerical error: "1.2e-3"; "0" for none."""
    if value is None:
        return UNKNOWN
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent and value else f"{value:g}"


def row_error(row: Row) -> str:
    """Format a row's largest error, with its arithmetic if that is approximate: "1.2e-2 fp8"."""
    return f"{error(row.max_error)} {row.approximate}" if row.approximate else error(row.max_error)


def interval_text(interval: Interval | None) -> str:
    """Format a time with its interval in the same unit: "36.2 ±0.3 ms".

    "61 to 143 ms" if the interval is too wide for ±; only the median if there is no interval.
    """
    if interval is None:
        return UNKNOWN
    factor, unit = _scaled(interval.median, TIMES)
    middle, half = interval.median / factor, interval.relative_half_width
    if half is None or interval.low is None or interval.high is None:
        return f"{three(middle)} {unit}"
    if half > WIDE:
        return f"{span(interval.low / factor, interval.high / factor)} {unit}"
    return f"{three(middle)} ±{_outward(half * middle, decimals(middle))} {unit}"


def span(low: float, high: float) -> str:
    """Format the ends of an interval, rounded outward to two significant figures: "0.43 to 1.9"."""
    return f"{_rounded(low, math.floor)[1]} to {_rounded(high, math.ceil)[1]}"


def ratio_span(low: float, high: float) -> str:
    """Format the ends of a ratio's interval as `span` does, with up to four figures if it takes them to exclude 1."""
    for figures in (2, 3, 4):
        (least, low_text), (most, high_text) = _rounded(low, math.floor, figures), _rounded(high, math.ceil, figures)
        if not (low > 1 >= least) and not (high < 1 <= most):
            break
    return f"{low_text} to {high_text}"


def _rounded(value: float, towards: Callable[[float], int], figures: int = 2) -> tuple[float, str]:
    """Round to significant figures; return the number and its text."""
    if value <= 0 or not math.isfinite(value):
        return value, f"{value:g}"
    places = max(0, figures - 1 - math.floor(math.log10(value)))
    step = 10.0**places
    rounded = towards(round(value * step, 6)) / step
    return rounded, f"{rounded:,.{places}f}"


def _outward(half: float, places: int) -> str:
    """Format half an interval's width, rounded up to the given decimals."""
    step = 10.0**places
    return f"{math.ceil(round(half * step, 6)) / step:,.{places}f}"


def half_width(ratio: Ratio) -> float:
    """Return the larger distance from a ratio to an end of its interval."""
    return max(ratio.high - ratio.value, ratio.value - ratio.low)


def is_clear(ratio: Ratio) -> bool:
    """Whether a ratio is conclusive: significant, or with a narrow interval around 1 and a known noise floor."""
    return ratio.significant or (ratio.significant is not None and half_width(ratio) <= WIDE * ratio.value)


def speedup_text(ratio: Ratio | None) -> str:
    """Format a speedup with its interval; "≈ 1" inside the noise floor, "1" for the reference itself.

    A wide interval is shown by its ends, "30 to 52x"; if it is too wide to separate faster from slower, a question mark
    follows: "0.6 to 1.9x?".
    """
    if ratio is None:
        return UNKNOWN
    if ratio.value == ratio.low == ratio.high == 1:
        return "1"
    if not ratio.significant and is_clear(ratio):
        return "≈ 1"
    half = half_width(ratio)
    if half > WIDE * ratio.value:
        text = f"{ratio_span(ratio.low, ratio.high)}x"
    else:
        text = f"{three(ratio.value)} ±{_outward(half, decimals(ratio.value))}x"
    return text if ratio.significant else f"{text}?"


def best_of(case: AnyCase) -> tuple[str, ...]:
    """Return the fastest accurate implementations: the one with the best median and all that equal it.

    A row equals the best if their medians differ by at most the noise floor, or if its interval, which is not wide,
    reaches the best one's.
    None is best while a row has too few rounds, if the best interval is wide, or if all are equal and none differs
    significantly from the reference. A row that ran another row's implementation is best along with it.
    """
    rows = [row for row in case.rows if row.status == OK and row.call_s]
    if not rows or any(row.collecting for row in rows):
        return ()
    best = min(rows, key=lambda row: row.call_s.median if row.call_s else 0.0)
    if not _is_narrow(best):
        return ()
    equal = {row.implementation for row in rows if equals(row, best, case)}
    for row in rows:
        chosen = chosen_row(row, case)
        if chosen and {row.implementation, chosen.implementation} & equal:
            equal |= {row.implementation, chosen.implementation}
    names = tuple(row.implementation for row in rows if row.implementation in equal)
    apart = any(row.speedup and row.speedup.significant for row in rows)
    return names if apart or len(names) < len(rows) else ()


def chosen_row(row: Row, case: AnyCase) -> Row | None:
    """Return the row of the implementation that an autotuned row ran; None if there is none."""
    if row.status != OK or not (row.path or "").startswith(TUNED):
        return None
    name = (row.path or "").removeprefix(TUNED)
    return next((other for other in case.rows if other.implementation == name and other.status == OK), None)


def counterparts_of(cases: Sequence[AnyCase]) -> tuple[Counterpart, ...]:
    """Return the counterparts beside which a row was timed: tables have a column "over dense" or so for each."""
    rows: list[Row] = [row for case in cases for row in case.rows]
    return tuple(name for name in COUNTERPARTS if any(over(row, name) for row in rows))


OVER: Final[dict[Counterpart, str]] = {
    "dense": "over dense",
    "unquantized": "K/V speedup",
    "one_device": "of ideal",
}
"""Headings of the speedups over the counterparts of a case."""


def over(row: Row, counterpart: Counterpart) -> Ratio | None:
    """Return the speedup over the implementation's own time on a counterpart of the case."""
    ratio: Ratio | None = getattr(row, f"over_{counterpart}")
    return ratio


def over_text(row: Row, counterpart: Counterpart) -> str:
    """Format the speedup over the implementation's own time on a counterpart; "-" if that was not measured.

    The speedup over one device is a share of the number of ranks, which would be ideal: "93.4 ±0.6 %".
    """
    if counterpart == "one_device":
        return ideal_text(row.share_of_ideal)
    ratio = over(row, counterpart)
    return speedup_text(ratio) if ratio else "-"


def ideal_text(share: Ratio | None) -> str:
    """Format the share of ideal with its interval: "93.4 ±0.6 %", "61 to 98 %"; "-" if it was not measured."""
    if share is None:
        return "-"
    if half_width(share) > WIDE * share.value:
        return f"{span(100 * share.low, 100 * share.high)} %"
    return f"{100 * share.value:.1f} ±{_outward(100 * half_width(share), 1)} %"


def over_ranks(cases: Sequence[AnyCase]) -> bool:
    """Return whether a row ran on several ranks, so that tables have columns for what they sent."""
    return any(row.per_rank for case in cases for row in case.rows)


def sent_text(row: Row) -> str:
    """Format the bytes that all ranks send in one call."""
    return "-" if row.sent_bytes is None else size(row.sent_bytes)


def exposed_text(row: Row) -> str:
    """Format the time of communication in one call that computing did not hide."""
    return "-" if row.exposed_s is None else seconds(row.exposed_s)


def rank_notes(row: Row) -> list[str]:
    """Format a line for each rank: "rank 1: 3.12 ms per call, 0.21 ms of it waiting, 33.6 MiB sent"."""
    return [f"rank {each.rank}: {rank_words(each)}" for each in row.per_rank]


def rank_words(rank: RankFigures) -> str:
    """Format a rank's figures: "3.12 ms per call, 0.21 ms of it waiting, 33.6 MiB sent"."""
    words = [f"{seconds(rank.call_s)} per call"]
    if rank.waiting_s is not None:
        words.append(f"{seconds(rank.waiting_s)} of it waiting")
    if rank.sent_bytes is not None:
        words.append(f"{size(rank.sent_bytes)} sent")
    if rank.peak_bytes is not None:
        words.append(f"{size(rank.peak_bytes)} of memory")
    return ", ".join(words)


def has_kv_error(cases: Sequence[AnyCase]) -> bool:
    """Return whether a row has an error of quantized keys and values, so that tables have a column for it."""
    return any(row.kv_error is not None for case in cases for row in case.rows)


def kv_error_text(row: Row) -> str:
    """Format the error of quantized keys and values, relative to the unquantized output: "6.3 %"."""
    return "-" if row.kv_error is None else percent(row.kv_error)


def divergence_text(row: Row) -> str:
    """Format how far a model's next token is distributed from that with an unquantized cache, in nats."""
    return error(row.kl_divergence) if isinstance(row, ModelRow) else "-"


def kv_sizes(workload: Workload) -> str | None:
    """Format the bytes of quantized keys and values: "1.12 KiB a token, 2.25 MiB in all, 3.56x less".

    None if they are not quantized.
    """
    before = workload.counterparts.get("unquantized")
    if before is None:
        return None
    less = three(before.kv_token_bytes / workload.kv_token_bytes)
    return f"{size(workload.kv_token_bytes)} a token, {size(workload.key_value_bytes)} in all, {less}x less"


def same_paths(case: AnyCase) -> list[str]:
    """Format a note for each autotuned row whose implementation has a row with another median."""
    return [
        f"{row.implementation} ran {chosen.implementation}: the difference between their times is noise or dispatch"
        for row in case.rows
        if (chosen := chosen_row(row, case))
        if row.call_s and chosen.call_s and row.call_s.median != chosen.call_s.median
    ]


def reference_change(case: AnyCase) -> str | None:
    """Format why speedups are not relative to the first row, the baseline; None if they are."""
    first = case.rows[0] if case.rows else None
    if first is None or case.reference in (None, first.implementation) or first.status == OK:
        return None
    return f"{first.implementation} {first.status}: speedups are relative to {case.reference}"


def _is_narrow(row: Row) -> bool:
    half = row.call_s.relative_half_width if row.call_s else None
    return half is not None and half <= WIDE


def equals(row: Row, best: Row, case: AnyCase) -> bool:
    """Whether a row is as fast as a case's fastest: within the noise floor, or by its interval, which is not wide."""
    if _are_within_floor(row, best, case):
        return True  # however wide its interval: a lead inside the floor is none
    if row.call_s is None or best.call_s is None:
        return False
    low, high = row.call_s.low, best.call_s.high
    return _is_narrow(row) and low is not None and high is not None and low <= high


def are_tied(case: AnyCase, first: str, second: str) -> bool:
    """Whether two implementations are both among the fastest of a case, or their medians are within its noise floor."""
    if {first, second} <= set(best_of(case)):
        return True
    rows = [row for row in case.rows if row.implementation in (first, second)]
    return len(rows) == 2 and _are_within_floor(rows[0], rows[1], case)


def _are_within_floor(row: Row, other: Row, case: AnyCase) -> bool:
    """Whether the medians of two rows differ by at most the case's noise floor."""
    if row.call_s is None or other.call_s is None:
        return False
    less, more = sorted((row.call_s.median, other.call_s.median))
    return more <= less * (1 + (case.noise_floor.floor if case.noise_floor else 0.0))


def word(row: Row, case: AnyCase) -> str:
    """Return the verdict as a word or two, for a narrow column; "collecting 2 of 6" before there is one."""
    if row.status != OK:
        return row.status
    if row.collecting:
        return row.collecting
    if isinstance(row, StreamRow):
        return _climb(row)
    ratio = row.speedup
    fastest = row.implementation in best_of(case)
    if row.implementation == case.reference:
        return "fastest" if fastest and _beats_another(row, case) else "reference"
    if ratio is None or not is_clear(ratio):
        return "unclear"
    if not ratio.significant:
        return "same"
    return "slower" if ratio.value < 1 else "fastest" if fastest else "faster"


FLAT: Final = 0.02
"""Tenths of a stream that differ by less are flat."""


def _climb(row: StreamRow) -> str:
    """Return whether the time of a token stays the same over a stream: "flat", "varies", "climbs"; else "ok"."""
    if row.implementation == FULL:
        return "climbs" if row.end_s and row.blocks and row.end_s > row.blocks[0].seconds * (1 + FLAT) else OK
    if row.spread is None:
        return OK
    return "flat" if row.spread <= FLAT else "varies"


def _beats_another(row: Row, case: AnyCase) -> bool:
    others = [other for other in case.rows if other.status == OK and other is not row]
    return bool(others) and all(
        other.speedup and other.speedup.significant and other.speedup.value < 1 for other in others
    )


def verdict(row: Row, case: AnyCase) -> str:
    """Return the verdict in a few words: "fastest", "1.9x faster", "same as baseline", "failed: killed by signal 9"."""
    if row.status == "inaccurate":
        return f"inaccurate: {error(row.max_error) if type(row) is Row else row.reason}"
    if row.status != OK:
        return f"{row.status}: {row.reason}" if row.reason else row.status
    text = _standing(row, case) + (f" in {row.approximate}" if row.approximate else "")
    return f"{text}, throttled" if row.throttled else text


def _standing(row: Row, case: AnyCase) -> str:
    short, ratio = word(row, case), row.speedup
    if row.collecting or isinstance(row, StreamRow):
        return short
    if short == "same":
        return f"same as {case.reference}"
    if short == "unclear" or ratio is None:
        return "too few rounds to say"
    if short == "faster":
        return f"{three(ratio.value)}x faster"
    if short == "slower":
        return f"{three(1 / ratio.value)}x slower"
    return short


def stream_rows(case: StreamCase) -> dict[str, StreamRow]:
    """Return the rows of a stream that have figures, by name."""
    return {row.implementation: row for row in case.rows if row.call_s is not None}


def stream_finding(case: StreamCase) -> str:
    """Format the cost of a token, how flat it stayed, and what full attention would cost at the end."""
    rows = stream_rows(case)
    row, full, again = rows.get(STREAMING), rows.get(FULL), rows.get(RECOMPUTED)
    if row is None or row.call_s is None:
        return "nothing of the stream was measured"
    flat = f", within {percent(row.spread)}" if row.spread is not None else ""
    parts = [f"streaming takes {seconds(row.call_s.median)} a token{flat} over {row.tokens:,} tokens"]
    if full and full.end_s:
        how = f" (extrapolated from {full.tokens:,})" if full.extrapolated else ""
        times = three(full.end_s / row.call_s.median)
        parts.append(f"full attention {seconds(full.end_s)} at the end{how}, {times} times as long")
    if again and again.call_s:
        parts.append(f"recomputing the window {three(again.call_s.median / row.call_s.median)} times as long")
    if row.loss_beyond is not None:
        parts.append(f"loss {row.loss_beyond:.3f} beyond the window, {_other_losses(rows)}")
    return "; ".join(parts)


def _other_losses(rows: Mapping[str, StreamRow]) -> str:
    """Format the losses beside that of the stream, as far as they were measured."""
    words = {RECOMPUTED: "recomputed", WINDOW: "without the first tokens", FULL: "with full attention"}
    losses = {name: rows[name].loss_beyond for name in words if name in rows}
    known = [f"{loss:.3f} {words[name]}" for name, loss in losses.items() if loss is not None]
    inside = rows[STREAMING].loss_inside
    return ", ".join(known) or ("" if inside is None else f"{inside:.3f} inside")


def quantized_finding(cases: Sequence[Case]) -> list[str]:
    """Format the largest speedup over unquantized keys and values, if one is significant."""
    gains = [
        (row.over_unquantized, row.implementation, case.workload.kv_format)
        for case in cases
        for row in case.rows
        if row.status == OK and row.over_unquantized and row.over_unquantized.significant
    ]
    best = max((each for each in gains if each[0].value > 1), key=lambda each: each[0].value, default=None)
    return [f"{best[1]} with K/V in {best[2]} is {speedup_text(best[0])} as fast as unquantized"] if best else []


BLOCKS: Final = " ▁▂▃▄▅▆▇█"


def histogram(samples: Sequence[float], *, width: int, height: int) -> list[str]:
    """Return rows of blocks from the top down; the fullest bin reaches the top, and no sample is invisible."""
    low, high = min(samples), max(samples)
    counts = [0] * width
    for sample in samples:
        place = (sample - low) / (high - low) if high > low else 0.5
        counts[min(int(place * width), width - 1)] += 1
    steps = height * (len(BLOCKS) - 1)
    filled = [-(-count * steps // max(counts)) for count in counts]
    rows = range(height - 1, -1, -1)
    return ["".join(BLOCKS[min(max(level - row * 8, 0), 8)] for level in filled).rstrip() for row in rows]
