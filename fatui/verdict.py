"""The verdict of a run: which implementation to use, how sure that is, and why not the others."""

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Final, Literal

from msgspec import Struct

from attention.core import statistics
from attention.core.results import AnyCase, Case, FineTuningCase, ModelCase, Ratio, Report, Row
from attention.core.workload import PHASES, Workload, short_name, swept_axes
from fatui import formatting
from fatui.formatting import OK

Confidence = Literal["none", "low", "high"]
MAX_FLOOR: Final = 0.10
"""Noise floor above which nothing is ranked unless a difference is clear of it."""
MIN_LEAD_FLOORS: Final = 3.0
"""A lead of fewer noise floors is of low confidence."""
SAFE_LEAD: Final = 1.0
"""A lead of this much, twice as fast, outlasts a machine that throttles."""
MIN_SURE_ROUNDS: Final = 12
"""With fewer rounds the interval of a median rests on its extremes."""
SMALL_FACTOR: Final = 1.5
"""Factors below it are written as a percentage."""
MAX_NAMED: Final = 3
AXIS_WORDS: Final = {
    "batch": "B",
    "seq": "L",
    "kv_seq": "keys",
    "heads": "H",
    "kv_heads": "K/V heads",
    "head_dim": "D",
    "ranks": "ranks",
    "dtype": "",
    "kv_format": "K/V",
    "mask": "mask",
    "pass_": "",
}


class Loss(Struct, frozen=True, kw_only=True):
    """Why an implementation is not the one to use."""

    implementation: str
    text: str
    """"33.1x as long", "tied", "refused: needs 41 GiB of 22"."""
    why: str = ""
    """As far as its path says: "unfused: blocks 256 x 512, MLX would build 33 MiB of scores"."""


class Verdict(Struct, frozen=True, kw_only=True):
    """What a group of cases supports: those of attention shapes, or of one phase of a model."""

    title: str = ""
    """What was measured, if a report may have several verdicts: "tinyllama-1.1b prefill"."""
    winner: str | None = None
    """The implementation to use; None if the rows support none."""
    reference: str | None = None
    reference_off: int = 0
    """Number of cases in which the reference is inaccurate."""
    speedup: Ratio | None = None
    """Of the winner over the reference; over several cases the geometric mean. None if it is the reference."""
    span: tuple[float, float] | None = None
    """The smallest and the largest speedup of several cases."""
    cases: int = 1
    """Number of cases that the speedup is of."""
    kv_formats: int = 1
    """Number of formats of keys and values among them; unquantized counts as one."""
    peak_bytes: int | None = None
    """The winner's memory, on the case in which it takes most."""
    reference_bytes: int | None = None
    """The reference's on the same case."""
    accuracy: str = ""
    """"accurate", "accurate by the tolerance of fp8", "accurate for the dequantized K/V"."""
    where: str = ""
    """In which of several cases it is the fastest: "fastest at L 64 to 512"."""
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    """Further findings: the gain of quantized keys and values."""
    confidence: Confidence = "none"
    doubts: tuple[str, ...] = ()
    """Why the confidence is not higher."""
    too_noisy: bool = False
    """Whether the noise floor is too large to rank anything."""
    reason: str = ""
    """Why there is no winner."""


def is_sound(row: Row) -> bool:
    """Return whether a row can support a claim: accurate, and with enough rounds."""
    return row.status == OK and row.call_s is not None and not row.collecting


def speedups(cases: Sequence[AnyCase], name: str) -> list[tuple[AnyCase, Ratio]]:
    """Return an implementation's sound speedups with their cases, without those in which it is the reference."""
    return [
        (case, row.speedup)
        for case in cases
        for row in case.rows
        if row.implementation == name and is_sound(row) and row.speedup is not None and name != case.reference
    ]


def mean_speedup(cases: Sequence[AnyCase], name: str) -> Ratio | None:
    """Return the geometric mean of an implementation's speedups, or its only one; None if the references differ."""
    found = speedups(cases, name)
    if len({case.reference for case, _ in found}) != 1:
        return None
    return found[0][1] if len(found) == 1 else statistics.geometric_mean([ratio for _, ratio in found])


def agreed_speedup(cases: Sequence[AnyCase], name: str) -> Ratio | None:
    """Return the mean speedup if it is significant and most of its cases agree, each beyond its own noise floor."""
    mean, found = mean_speedup(cases, name), speedups(cases, name)
    if mean is None or not mean.significant:
        return None
    agreeing = sum(bool(ratio.significant) and (ratio.value > 1) == (mean.value > 1) for _, ratio in found)
    return mean if 2 * agreeing > len(found) else None


def verdicts(report: Report) -> tuple[Verdict, ...]:
    """Return the verdict of each group of cases that can be ranked; streams have none."""
    interrupted = report.run.interrupted
    groups = group_verdicts(report.cases, report.models, report.fine_tunings, interrupted=interrupted)
    return tuple(verdict for _, verdict in groups)


def group_verdicts(
    cases: Sequence[Case], models: Sequence[ModelCase], tunings: Sequence[FineTuningCase], *, interrupted: bool = False
) -> list[tuple[Sequence[AnyCase], Verdict]]:
    """Return each group of cases that can be ranked together, with its verdict."""
    by_phase = {phase: [case for case in models if case.workload.phase == phase] for phase in PHASES}
    groups: list[tuple[str, Sequence[AnyCase]]] = [
        ("", cases),
        *((f"{_models_of(group)} {phase}", group) for phase, group in by_phase.items()),
        (f"{_models_of(tunings)} fine-tuning", tunings),
    ]
    return [(group, verdict_of(group, title, interrupted=interrupted)) for title, group in groups if group]


def _models_of(cases: Sequence[ModelCase | FineTuningCase]) -> str:
    """Name the models of cases, in full where short names are alike, or count them if they are many."""
    models = list(dict.fromkeys(case.workload.model for case in cases))
    if len(models) > MAX_NAMED:
        return f"{len(models)} models'"
    names = list(map(short_name, models))
    return ", ".join(names if len(set(names)) == len(names) else models)


def verdict_of(cases: Sequence[AnyCase], title: str = "", *, interrupted: bool = False) -> Verdict:
    """Return the verdict of some cases that are ranked together.

    Cases that are too noisy to be ranked do not decide: where they favour another implementation than the others do,
    they are left out of its speedup, and if there are no others, nothing is ranked.

    Args:
        cases: the cases; several are summarised by the geometric means of their speedups.
        title: what they are, in words.
        interrupted: whether their run was.
    """
    names = tuple(dict.fromkeys(row.implementation for case in cases for row in case.rows))
    comparable = _with_common_reference(cases)
    reference = comparable[0].reference if comparable else None
    clear = [case for case in comparable if not _is_unclear(case)]
    winner, ranked = _winner(comparable, names, reference), comparable
    within_noise = winner is not None and not clear
    if clear and len(clear) < len(comparable) and (decided := _winner(clear, names, reference)) != winner:
        winner, ranked = decided, clear
    if within_noise:
        winner = None
    notes = tuple(formatting.quantized_finding([case for case in cases if isinstance(case, Case)]))
    noisy = [case for case in comparable if case.noise_floor and case.noise_floor.floor > MAX_FLOOR]
    if winner is None:
        return Verdict(
            title=title,
            reference=reference,
            reference_off=_off(comparable),
            losses=_losses(cases, cases, names, None),
            notes=notes,
            too_noisy=within_noise or (len(names) > 1 and 2 * len(noisy) > len(comparable) > 0),
            reason=_noise_reason(comparable) if within_noise else _reason(comparable, _named(comparable, reference)),
        )
    doubts = _doubts(cases, comparable, winner, interrupted)
    peak, reference_peak = _peaks(cases, winner)
    found = speedups(ranked, winner)
    ratios = [ratio.value for _, ratio in found]
    return Verdict(
        title=title,
        winner=winner,
        reference=reference,
        reference_off=_off(comparable),
        speedup=mean_speedup(ranked, winner),
        span=(min(ratios), max(ratios)) if len(ratios) > 1 else None,
        cases=len(found),
        kv_formats=len({getattr(case.workload, "kv_format", "") for case, _ in found}),
        peak_bytes=peak,
        reference_bytes=reference_peak,
        accuracy=_accuracy(cases, winner),
        where=where_fastest(cases, winner),
        losses=_losses(cases, ranked, names, winner),
        notes=notes,
        confidence="low" if doubts else "high",
        doubts=doubts,
    )


def _off(cases: Sequence[AnyCase]) -> int:
    """Return in how many cases the reference is inaccurate."""
    return sum(
        row.implementation == case.reference and row.status == "inaccurate" for case in cases for row in case.rows
    )


def _named(cases: Sequence[AnyCase], reference: str | None) -> str | None:
    """Name the reference, and whether it is inaccurate."""
    off = _off(cases)
    if not off or reference is None:
        return reference
    return f"{reference}, which is inaccurate{f' in {off} of {len(cases)} cases' if len(cases) > 1 else ''}"


def _with_common_reference(cases: Sequence[AnyCase]) -> list[AnyCase]:
    """Return the cases with figures whose reference is that of most."""
    found = [case for case in cases if case.reference and any(row.call_s for row in case.rows)]
    references = [case.reference for case in found]
    common = max(dict.fromkeys(references), key=references.count, default=None)
    return [case for case in found if case.reference == common]


def _winner(cases: Sequence[AnyCase], names: Sequence[str], reference: str | None) -> str | None:
    """Return the fastest by mean speedup among those that ran in the most cases, the reference if all are slower."""
    means = {name: mean for name in names if (mean := agreed_speedup(cases, name))}
    gains = {name: mean for name, mean in means.items() if mean.value > 1}
    if gains:
        ran = {name: len(speedups(cases, name)) for name in gains}
        best = max(gains, key=lambda name: (ran[name], gains[name].value))
        return _chosen_by(cases, best)
    others = [name for name in names if name != reference and speedups(cases, name)]
    if reference and others and all(name in means for name in others):
        return reference
    return None


def _chosen_by(cases: Sequence[AnyCase], name: str) -> str:
    """Return the implementation that an autotuned winner ran in all cases, if it has rows of its own, or the winner."""
    ran = {formatting.chosen_row(row, case) for case in cases for row in case.rows if row.implementation == name}
    chosen = {row.implementation if row else name for row in ran}
    return chosen.pop() if len(chosen) == 1 else name


def _reason(cases: Sequence[AnyCase], reference: str | None) -> str:
    rows = [(case, row) for case in cases for row in case.rows if row.status == OK]
    few = [row.collecting for _, row in rows if row.collecting]
    if few and not any(is_sound(row) for _, row in rows):
        return f"too few rounds for a verdict: {few[0]}"
    others = [(case, row) for case, row in rows if row.implementation != case.reference]
    if reference is None or not others:
        off = any(row.status == "inaccurate" for case in cases for row in case.rows)
        return "nothing was compared" if rows else "nothing is accurate" if off else "nothing was measured"
    unclear = few or any(formatting.word(row, case) == "unclear" for case, row in others)
    gains = any(row.speedup and row.speedup.significant and row.speedup.value > 1 for _, row in others)
    if gains:
        return f"nothing is faster than {reference} in most cases"
    return f"nothing is {'clearly ' if unclear else ''}faster than {reference}"


def _noise_reason(cases: Sequence[AnyCase]) -> str:
    """Return why cases whose speedups agree are not ranked all the same."""
    floors = [case.noise_floor.floor for case in cases if case.noise_floor]
    most = f"{'at most ' if len(floors) > 1 else ''}{formatting.percent(max(floors))}"
    return f"no lead is {MIN_LEAD_FLOORS:.0f} times its noise floor, which is {most}"


def _doubts(cases: Sequence[AnyCase], comparable: Sequence[AnyCase], winner: str, interrupted: bool) -> tuple[str, ...]:
    """Return why a verdict is of low confidence; none if it is of high."""
    found = []
    leads = _leads(comparable, winner)
    lead = min((each for each, _ in leads), default=None)
    unclear = [case for case in comparable if _is_unclear(case)]
    judged = [(each, floor) for each, floor in leads if len(cases) == 1 or floor <= MAX_FLOOR]
    rounds = min((len(row.samples) for case in cases for row in case.rows if is_sound(row)), default=0)
    if rounds < MIN_SURE_ROUNDS:
        found.append(f"only {rounds} rounds")
    if not any(case.noise_floor for case in comparable):
        found.append("no noise floor")
    elif short := [(each, floor) for each, floor in judged if each < MIN_LEAD_FLOORS * floor]:
        least, floor = min(short, key=lambda pair: pair[0] / pair[1])
        found.append(f"it leads by {formatting.percent(least)}, with a noise floor of {formatting.percent(floor)}")
    if unclear and len(cases) > 1:
        floors = formatting.percent(max(case.noise_floor.floor for case in unclear if case.noise_floor))
        found.append(f"too noisy {places(unclear, cases)}, with a noise floor of {floors}")
    if not any(winner in formatting.best_of(case) for case in comparable):
        found.append("its time is too uncertain to call it the fastest")
    if any(row.throttled for case in cases for row in case.rows) and (lead is None or lead < SAFE_LEAD):
        found.append("the machine slowed down")
    if _off(comparable):
        found.append(_named(comparable, comparable[0].reference) or "")
    if len(comparable) < len(cases):
        found.append(f"{comparable[0].reference} is the reference in {len(comparable)} of {len(cases)} cases")
    if interrupted:
        found.append("interrupted")
    return tuple(found)


def _is_unclear(case: AnyCase) -> bool:
    """Return whether a case is too noisy to be ranked: its fastest do not lead by several of its noise floors."""
    floor = case.noise_floor.floor if case.noise_floor else 0.0
    if floor <= MAX_FLOOR:
        return False
    names = formatting.best_of(case) or [row.implementation for row in case.rows if is_sound(row)]
    leads = [lead for name in names if (lead := _lead(case, name)) is not None]
    return max(leads, default=0.0) < MIN_LEAD_FLOORS * floor


def _leads(cases: Sequence[AnyCase], winner: str) -> list[tuple[float, float]]:
    """Return, of each case in which the winner leads, by how much the next one takes longer, and the noise floor."""
    floors = [(case, case.noise_floor.floor if case.noise_floor else 0.0) for case in cases]
    found = [(_lead(case, winner), floor) for case, floor in floors if winner in formatting.best_of(case)]
    return [(lead, floor) for lead, floor in found if lead is not None]


def _lead(case: AnyCase, name: str) -> float | None:
    """Return by how much the next one takes longer than an implementation; ties are left out, None without others."""
    best = formatting.best_of(case)
    slower = (row.implementation for row in case.rows if row.implementation not in (*best, name))
    known = [
        factor for each in slower if not formatting.are_tied(case, each, name) and (factor := _factor(case, each, name))
    ]
    return min(known) - 1 if known else None


def _call_s(case: AnyCase, name: str) -> float | None:
    row = next((row for row in case.rows if row.implementation == name and is_sound(row)), None)
    return row.call_s.median if row and row.call_s else None


def _peaks(cases: Sequence[AnyCase], winner: str) -> tuple[int | None, int | None]:
    """Return the winner's largest peak, and the reference's in the same case."""
    peaks = [
        (row.peak_bytes, case) for case in cases for row in case.rows if row.implementation == winner and row.peak_bytes
    ]
    if not peaks:
        return None, None
    most, case = max(peaks, key=lambda each: each[0])
    others = (row.peak_bytes for row in case.rows if row.implementation == case.reference != winner)
    return most, next(others, None)


def _accuracy(cases: Sequence[AnyCase], winner: str) -> str:
    rows = [row for case in cases for row in case.rows if row.implementation == winner and row.status == OK]
    coarse = dict.fromkeys(row.approximate for row in rows if row.approximate)
    checked = all(type(row) is not Row or row.max_error is not None for row in rows)
    if not coarse and not checked:
        return "accuracy not checked"
    text = f"accurate by the tolerance of {', '.join(coarse)}" if coarse else "accurate"
    return f"{text} for the dequantized K/V" if any(row.kv_error is not None for row in rows) else text


def where_fastest(cases: Sequence[AnyCase], name: str) -> str:
    """Return where an implementation is among the fastest of several cases: "fastest at L 64 to 512".

    Empty for one case, and if it is the fastest nowhere.
    """
    won = [case for case in cases if name in formatting.best_of(case)]
    if len(cases) < 2 or not won:
        return ""
    return f"fastest {places(won, cases)}"


def places(some: Sequence[AnyCase], cases: Sequence[AnyCase]) -> str:
    """Format which of several cases some are: "at L 64 to 512", "in 2 of 6 cases"."""
    if len(some) == len(cases):
        return f"in all {len(cases)} cases"
    shapes = [case.workload for case in cases if isinstance(case, Case)]
    if len(shapes) == len(cases):
        for axis in swept_axes(shapes):
            values = {getattr(case.workload, axis) for case in some}
            if len(some) == sum(getattr(shape, axis) in values for shape in shapes):
                return f"at {_range(axis, values, shapes)}"
    return f"in {len(some)} of {len(cases)} cases"


def _range(axis: str, values: set[int | str], shapes: Sequence[Workload]) -> str:
    """Format values of an axis: "L 64 to 512" if no other value lies between, else "L 64, 512, 2048, 2 more"."""
    order = sorted({getattr(shape, axis) for shape in shapes}, key=lambda each: (isinstance(each, str), each))
    places = [place for place, value in enumerate(order) if value in values]
    between = places[-1] - places[0] + 1 == len(places)
    if len(places) > 2 and between and not isinstance(order[0], str):
        text = f"{order[places[0]]} to {order[places[-1]]}"
    else:
        named = [str(order[place]) for place in places[:MAX_NAMED]]
        more = len(places) - len(named)
        text = ", ".join([*named, *([f"{more} more"] if more else [])])
    return f"{AXIS_WORDS[axis]} {text}".strip()


def _losses(
    cases: Sequence[AnyCase], ranked: Sequence[AnyCase], names: Sequence[str], winner: str | None
) -> tuple[Loss, ...]:
    """Return why each other implementation is not the one to use, the fastest first.

    Times are those of the ranked cases, as the winner's speedup is; of all cases if both ran in no ranked one.
    """
    if winner is None:
        return tuple(loss for name in names if (loss := _obstacle(cases, name)))
    others = [name for name in names if name != winner]
    factors = {name: _factors(ranked, name, winner) or _factors(cases, name, winner) for name in others}
    slower = {name: geometric_mean(factor for _, factor in found) for name, found in factors.items() if found}
    order = sorted(others, key=lambda name: slower.get(name, float("inf")))
    return tuple(
        _loss(cases, [case for case, _ in factors[name]], name, winner, slower.get(name, 0.0)) for name in order
    )


def _factors(cases: Sequence[AnyCase], name: str, winner: str) -> list[tuple[AnyCase, float]]:
    """Return the cases that both ran, each with an implementation's time over the winner's."""
    return [(case, factor) for case in cases if (factor := _factor(case, name, winner))]


def _factor(case: AnyCase, name: str, winner: str) -> float | None:
    """Return how many times as long as the winner an implementation takes on a case, from the same rounds as the
    speedups are, with which it has to agree; else from the medians of their times.
    """
    own, best = _call_s(case, name), _call_s(case, winner)
    if not own or not best:
        return None
    paired = [_over_reference(case, each) for each in (name, winner)]
    return paired[1] / paired[0] if paired[0] and paired[1] else own / best


def _over_reference(case: AnyCase, name: str) -> float | None:
    if name == case.reference:
        return 1.0
    row = next((row for row in case.rows if row.implementation == name), None)
    return row.speedup.value if row is not None and row.speedup is not None else None


def _loss(cases: Sequence[AnyCase], timed: Sequence[AnyCase], name: str, winner: str, slower: float) -> Loss:
    """Return why an implementation loses, `timed` being the cases of which its mean time over the winner's is."""
    obstacle = _obstacle(cases, name)
    if not timed:
        return obstacle or Loss(implementation=name, text="not measured")
    rows = [(case, row) for case in timed for row in case.rows if row.implementation == name]
    chosen = [formatting.chosen_row(row, case) for case, row in rows]
    same = all(each is not None and each.implementation == winner for each in chosen)
    tied = same or all(formatting.are_tied(case, name, winner) for case in timed)
    if tied:
        words = [f"tied, it ran {winner}" if same else "tied"]
    else:
        average = " on average" if len(timed) > 1 else ""
        words = [f"{_longer(slower)}{average}"]
        if where := where_fastest(cases, name):
            words.append(where)
    if obstacle:
        words.append(obstacle.text)
    return Loss(implementation=name, text=", ".join(words), why="" if tied else _path([row for _, row in rows]))


def _longer(factor: float) -> str:
    """Format the time over the winner's: "1.3 % slower", "45.2x as long"."""
    if factor < SMALL_FACTOR:
        return f"{formatting.percent(factor - 1)} slower" if factor > 1 else "as fast"
    return f"{formatting.three(factor)}x as long"


def _path(rows: Sequence[Row]) -> str:
    """Format why rows are slow, as far as their paths say: not fused, which path instead, and of one row why."""
    unfused = [row for row in rows if row.fused is False]
    if not unfused:
        return ""
    path = unfused[-1].path or ""
    why = f", {unfused[-1].reason}" if len(rows) == 1 and unfused[-1].reason else ""
    return path + why if "unfused" in path else f"unfused: {path}{why}"


def _obstacle(cases: Sequence[AnyCase], name: str) -> Loss | None:
    """Return what kept an implementation from being measured, if anything did."""
    rows = [(case, row) for case in cases for row in case.rows if row.implementation == name]
    bad = [(case, row) for case, row in rows if not is_sound(row)]
    if not bad:
        return None
    case, row = bad[-1]
    words = formatting.verdict(row, case)
    count = f" in {len(bad)} of {len(rows)} cases" if len(rows) > 1 else ""
    head, _, reason = words.partition(": ")
    return Loss(implementation=name, text=f"{head}{count}{f': {reason}' if reason else ''}")


def headline(verdict: Verdict) -> str:
    """Format the verdict in one line: "Use poc · 36.2x baseline (95 %: 35 to 37) · accurate"."""
    begin = f"{verdict.title}: " if verdict.title else ""
    if verdict.winner is None:
        what = "Too noisy to rank" if verdict.too_noisy else "No winner"
        return f"{begin}{what} · {verdict.reason}"
    parts = [f"Use {verdict.winner}", _gain(verdict), _memory(verdict), verdict.accuracy, verdict.where]
    return begin + " · ".join(part for part in parts if part)


def _gain(verdict: Verdict) -> str:
    if verdict.speedup is None or verdict.winner == verdict.reference:
        return "the others are slower"
    mean = verdict.speedup
    how = " on average" if verdict.span else ""
    how += ", which is inaccurate" if verdict.reference_off else ""
    if verdict.span:
        formats = f" of {verdict.kv_formats} K/V formats" if verdict.kv_formats > 1 else ""
        within = f"{verdict.cases} cases{formats}: {formatting.ratio_span(*verdict.span)}"
    else:
        within = f"{statistics.CONFIDENCE:.0%}: {formatting.ratio_span(mean.low, mean.high)}".replace("%", " %")
    return f"{formatting.three(mean.value)}x {verdict.reference}{how} ({within})"


def _memory(verdict: Verdict) -> str:
    if verdict.peak_bytes is None:
        return ""
    if verdict.reference_bytes is None:
        return formatting.size(verdict.peak_bytes)
    return formatting.size_instead(verdict.peak_bytes, verdict.reference_bytes)


def confidence_text(verdict: Verdict) -> str:
    """Format the confidence with its reasons: "confidence low: only 8 rounds, interrupted"."""
    why = f": {', '.join(verdict.doubts)}" if verdict.doubts else ""
    return f"confidence {verdict.confidence}{why}"


def loss_lines(verdict: Verdict, *, brief: bool = False) -> list[str]:
    """Format why the others lose, a line for each: "practical: 33.1x as long; unfused: blocks 256 x 512".

    `brief`: without what their paths say.
    """
    return [
        f"{loss.implementation}: {loss.text}{f'; {loss.why}' if loss.why and not brief else ''}"
        for loss in verdict.losses
    ]


def finding(report: Report) -> str:
    """Summarise a run in one line, for lists: its headlines, and how many rows failed."""
    if report.streams:
        return "; ".join([*(formatting.stream_finding(case) for case in report.streams), *_problems(report)])
    lines = [text for verdict in verdicts(report) for text in (headline(verdict), *verdict.notes)]
    return "; ".join([*(lines or ["nothing was measured"]), *_problems(report)])


def _problems(report: Report) -> list[str]:
    rows: list[Row] = [row for case in report.all_cases for row in case.rows]
    counts = {
        status: sum(row.status == status for row in rows)
        for status in ("inaccurate", "failed", "refused", "unsupported")
    }
    found = [f"{count} {status}" for status, count in counts.items() if count]
    return [", ".join(found)] if found else []
