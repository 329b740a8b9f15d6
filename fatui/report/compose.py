"""Composition of the report: one part per machine, made of its own rows only, which begins with a summary.

The summary is the verdict card, and a chart of the speedups with their intervals.
"""

from collections.abc import Sequence
from typing import Final

from attention.core.results import AnyCase, Ratio, Report
from fatui import formatting
from fatui.report import charts
from fatui.report.charts import density_charts, format_charts, loss_charts, sweep_charts
from fatui.report.comparison import machine_key, machine_names
from fatui.report.counterparts import quantized_blocks, sparse_blocks
from fatui.report.document import (
    Block,
    Card,
    Chart,
    Claim,
    Document,
    MissingData,
    Paragraph,
    Section,
    Table,
    counted,
    joined,
    section,
)
from fatui.report.evidence import Evidence, cpu_cores, gather, sound_rows, unsound, unsound_rows
from fatui.report.scaling import effects
from fatui.report.sections import (
    RUN_BENCH,
    adopt,
    approach,
    choices,
    extremes,
    largest_saving,
    leanest,
    mean_finding,
    memory_blocks,
    model_blocks,
    peak_line,
    speedup_table,
    throughput_table,
    tuning_blocks,
)
from fatui.report.streaming import stream_blocks, stream_charts
from fatui.report.study import origin_blocks
from fatui.trust import TrustFinding, of_cases, of_machine, ranked
from fatui.untrusted_text import escape_all, html
from fatui.verdict import Verdict, confidence_text, group_verdicts, headline, loss_lines, mean_speedup


def compose(reports: Sequence[Report]) -> Document:
    """Compose the document of some runs; different machines or versions are separate parts, never compared."""
    parts = gather([escape_all(report) for report in reports])
    known = [next(filter(cpu_cores, evidence.runs), evidence.runs[0]) for evidence in parts]
    names = machine_names(known)
    sections: list[Section] = []
    for evidence, one in zip(parts, known, strict=True):
        prefix = f"{names[machine_key(one)]}: " if len(parts) > 1 else ""
        edited = [run.run.id for run in evidence.runs if run.edited]
        if edited:
            are = "was" if len(edited) == 1 else "were"
            text = f"{joined(edited)} {are} edited after the measurement was written; its rows are those of the file."
            sections.append(Section(f"{prefix}Edited runs", (Paragraph(text),)))
        sections += [Section(f"{prefix}{each.title}", each.blocks) for each in _sections(evidence)]
    return Document("Attention implementations, measured", tuple(sections))


def _sections(evidence: Evidence) -> list[Section]:
    cases, names = evidence.cases, evidence.implementations
    return [
        section("Verdict", summary_blocks(evidence, RUN_BENCH)),
        section("Summary", _where(evidence), _summary(evidence)),
        *(section(f"Approach: {name}", approach(cases, name)) for name in names if cases),
        section("Speedups", _speedups(evidence)),
        section("Head dim, length and batch", effects(evidence.runs, names), _drawn(evidence)),
        section("Sparse patterns", sparse_blocks(cases, names), _densities(evidence)),
        section("Quantized attention", quantized_blocks(cases, evidence.models, names), _formats(evidence)),
        section("Memory", memory_blocks(cases, names)),
        section("Models", model_blocks(evidence.models)),
        section("Fine-tuning", tuning_blocks(evidence.fine_tunings), _losses(evidence)),
        section("Streaming", stream_blocks(evidence.streams), _curves(evidence)),
        section("Where it pays, and where it does not", _conditions(evidence)),
        section("Which to choose, and how to adopt it", _advice(evidence)),
        section("Beside the study", origin_blocks(evidence)),
        section("What is not claimed", unsound_rows(_everything(evidence))),
        section("Every row, and the runs", _rows(evidence)),
    ]


def _everything(evidence: Evidence) -> tuple[AnyCase, ...]:
    return (*evidence.cases, *evidence.models, *evidence.fine_tunings, *evidence.streams)


def _where(evidence: Evidence) -> Paragraph:
    where = evidence.environment
    known = [where.machine, where.backend, where.mlx and f"MLX {where.mlx}", where.blas, where.os]
    sentence = f"Measured on {', '.join(part for part in known if part) or 'an unknown machine'}."
    kept = counted(len(_everything(evidence)), "case")
    older = (
        f"; {counted(evidence.repeated, 'older case')} measured again later and left out" if evidence.repeated else ""
    )
    return Paragraph(f"{sentence} {kept} from {counted(len(evidence.runs), 'run')}{older}.")


def _summary(evidence: Evidence) -> list[Block]:
    cases, names = evidence.cases, evidence.implementations
    found: list[Claim | None] = [mean_finding(cases, name) for name in names]
    found += [_throughput(evidence), largest_saving(cases, names)]
    for phase, where in (("prefill", "Prompts of models: "), ("decode", "Decoding in models: ")):
        models = [case for case in evidence.models if case.workload.phase == phase]
        found += [mean_finding(models, name, where) for name in names]
    found += [mean_finding(evidence.fine_tunings, name, "Fine-tuning: ") for name in names]
    blocks: list[Block] = [finding for finding in found if finding]
    refused = len(unsound(_everything(evidence)))
    if refused:
        support = "supports" if refused == 1 else "support"
        blocks.append(
            Paragraph(f"{counted(refused, 'row')} of these runs {support} no claim; see “What is not claimed”.")
        )
    return blocks or [MissingData("No claim is supported by these rows.", RUN_BENCH)]


def _throughput(evidence: Evidence) -> Claim | None:
    """Return the highest throughput of all, and the implementations that reached it or its interval."""
    lines = [line for name in evidence.implementations if (line := peak_line(evidence.cases, name))]
    if not lines:
        return None
    top = max(lines, key=lambda each: each.row.tokens_per_second or 0.0)
    names = formatting.best_of(top.case) or tuple(
        row.implementation for row in sound_rows(top.case) if formatting.equals(row, top.row, top.case)
    )
    rate = f"{formatting.tokens_per_second(top.row.tokens_per_second)} tokens/s on {top.case.workload.label}"
    return Claim(f"Highest throughput: {rate}, by {joined(names)}.")


def _speedups(evidence: Evidence) -> list[Block]:
    if not evidence.cases:
        return [MissingData("No attention shape has been measured.", RUN_BENCH)]
    found = [finding for name in evidence.implementations if (finding := mean_finding(evidence.cases, name))]
    shown = [
        name
        for name in evidence.implementations
        if any(row.implementation == name for case in evidence.cases for row in case.rows)
    ]
    return [*found, speedup_table(evidence.cases, shown)]


def _drawn(evidence: Evidence) -> Sequence[Block]:
    return sweep_charts(evidence.runs, evidence.implementations) if charts.available() else [_no_charts()]


def _formats(evidence: Evidence) -> Sequence[Block]:
    drawn: Sequence[Chart] = format_charts(evidence.cases, evidence.implementations) if charts.available() else ()
    return drawn


def _densities(evidence: Evidence) -> Sequence[Block]:
    drawn: Sequence[Chart] = density_charts(evidence.cases, evidence.implementations) if charts.available() else ()
    return drawn


def _losses(evidence: Evidence) -> Sequence[Block]:
    drawn: Sequence[Chart] = loss_charts(evidence.fine_tunings, evidence.implementations) if charts.available() else ()
    return drawn


def _curves(evidence: Evidence) -> Sequence[Block]:
    drawn: Sequence[Chart] = stream_charts(evidence.streams) if charts.available() else ()
    return drawn


def _no_charts() -> MissingData:
    return MissingData("The charts need matplotlib.", charts.HOW_TO_GET)


def _conditions(evidence: Evidence) -> list[Block]:
    found = [block for name in evidence.implementations for block in extremes(evidence.cases, name)]
    return found or [MissingData("No speedup is clear of its noise.", f"{RUN_BENCH} --seconds 20")]


def _advice(evidence: Evidence) -> list[Block]:
    cases, names = evidence.cases, evidence.implementations
    ranked = [(mean.value, name) for name in names if (mean := mean_speedup(cases, name)) and mean.significant]
    best = max(ranked, default=(1.0, "practical"))
    lean = leanest(cases, names)
    name = best[1] if best[0] > 1 else "practical"
    return [*choices(cases, names), *([lean] if lean else []), *adopt(name)]


def _rows(evidence: Evidence) -> list[Block]:
    made: list[Block] = [throughput_table(evidence.cases, evidence.implementations)] if evidence.cases else []
    runs = tuple(
        (
            run.run.id,
            run.run.started[:16],
            formatting.duration(run.run.seconds),
            run.run.command + (" (interrupted)" if run.run.interrupted else ""),
        )
        for run in evidence.runs
    )
    return [
        *made,
        Table(
            "The runs, and the commands that reproduce them",
            ("run", "started", "took", "command"),
            runs,
            frozenset({"started", "command"}),
        ),
    ]


CHART_WIDTH: Final = 640
LABEL_WIDTH: Final = 130
VALUES_WIDTH: Final = 150
ROW_HEIGHT: Final = 26
TEXT_BAR: Final = 40
"""Characters of the longest bar in Markdown."""


def summary_blocks(evidence: Evidence, command: str) -> list[Block]:
    """Return a card for each verdict, each followed by its chart, or how to measure something.

    Args:
        evidence: the rows.
        command: what to run if they support no verdict.
    """
    interrupted = any(run.run.interrupted for run in evidence.runs)
    groups = group_verdicts(evidence.cases, evidence.models, evidence.fine_tunings, interrupted=interrupted)
    machine = _worst(evidence)
    blocks: list[Block] = []
    for cases, verdict in groups:
        blocks.append(_card(verdict, ranked([*of_cases(cases), *machine])))
        if chart := speedup_chart(cases, verdict):
            blocks.append(chart)
    return blocks or [MissingData("No implementations were compared.", command)]


def _worst(evidence: Evidence) -> list[TrustFinding]:
    """Return what the machine and settings of all runs say, of each topic the most serious."""
    found: dict[str, TrustFinding] = {}
    for run in evidence.runs:
        for each in of_machine(run):
            before = found.get(each.topic)
            if before is None or each.rank >= before.rank:
                found[each.topic] = each
    return list(found.values())


def _card(verdict: Verdict, found: Sequence[TrustFinding]) -> Card:
    sure = [confidence_text(verdict)] if verdict.winner else []
    return Card(
        headline(verdict),
        (*verdict.notes, *loss_lines(verdict)),
        (*sure, *(each.text for each in found)),
        cautious=verdict.confidence != "high" or any(each.severity != "note" for each in found),
    )


def speedup_chart(cases: Sequence[AnyCase], verdict: Verdict) -> Chart | None:
    """Draw the mean speedup of each implementation over the verdict's reference as bars with their intervals."""
    names = tuple(dict.fromkeys(row.implementation for case in cases for row in case.rows))
    shared = [case for case in cases if case.reference == verdict.reference]
    bars = [(name, ratio) for name in names if (ratio := mean_speedup(shared, name))]
    if not bars or verdict.reference is None:
        return None
    unity = Ratio(value=1.0, low=1.0, high=1.0)
    bars = sorted([(verdict.reference, unity), *bars], key=lambda each: -each[1].value)
    what = f"geometric means of {len(shared)} cases" if len(shared) > 1 else shared[0].workload.label
    title = f"Speedup over {verdict.reference}, {what}"
    return Chart(title, _bars_svg(bars, verdict.winner), _bars_text(bars))


def _bars_svg(bars: Sequence[tuple[str, Ratio]], winner: str | None) -> str:
    room = CHART_WIDTH - LABEL_WIDTH - VALUES_WIDTH
    top = max(ratio.high for _, ratio in bars)
    parts = []
    for index, (name, ratio) in enumerate(bars):
        y = index * ROW_HEIGHT
        colour = "var(--series-3)" if name == winner else "var(--series-6)"
        low, value, high = (LABEL_WIDTH + room * each / top for each in (ratio.low, ratio.value, ratio.high))
        middle = y + ROW_HEIGHT / 2
        parts += [
            f'<text x="{LABEL_WIDTH - 8}" y="{middle + 5:.1f}" text-anchor="end">{html(name[-16:])}</text>',
            f'<rect x="{LABEL_WIDTH}" y="{y + 5}" width="{value - LABEL_WIDTH:.1f}" height="{ROW_HEIGHT - 10}" '
            f'fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
            'stroke="currentColor" fill="none"/>',
            f'<text x="{CHART_WIDTH - VALUES_WIDTH + 10}" y="{middle + 5:.1f}">'
            f"{html(formatting.speedup_text(ratio))}</text>",
        ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CHART_WIDTH} {ROW_HEIGHT * len(bars)}"'
    return f'{head} font-size="13" fill="currentColor">{"".join(parts)}</svg>'


def _bars_text(bars: Sequence[tuple[str, Ratio]]) -> str:
    top = max(ratio.value for _, ratio in bars)
    width = max(len(name) for name, _ in bars)
    texts = [formatting.speedup_text(ratio) for _, ratio in bars]
    figures = max(map(len, texts))
    return "\n".join(
        f"{name:<{width}}  {text:>{figures}}  {'█' * max(1, round(TEXT_BAR * ratio.value / top))}"
        for (name, ratio), text in zip(bars, texts, strict=True)
    )
