"""Composition of the report: one part per machine, made of its own rows only."""

from collections.abc import Sequence

from attention.core.results import AnyCase, Report
from fatui import formatting
from fatui.report import charts
from fatui.report.charts import density_charts, format_charts, loss_charts, sweep_charts
from fatui.report.counterparts import quantized_blocks, sparse_blocks
from fatui.report.document import (
    Block,
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
from fatui.report.evidence import Evidence, gather, sound_rows, unsound, unsound_rows
from fatui.report.machines import machine_name
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
from fatui.report.summary import summary_blocks
from fatui.untrusted_text import escape_all
from fatui.verdict import mean_speedup


def compose(reports: Sequence[Report]) -> Document:
    """Compose the document of some runs; different machines or versions are separate parts, never compared."""
    parts = gather([escape_all(report) for report in reports])
    sections: list[Section] = []
    for evidence in parts:
        prefix = f"{machine_name(evidence.runs[0])}: " if len(parts) > 1 else ""
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
        blocks.append(
            Paragraph(f"{counted(refused, 'row')} of these runs support no claim; see “What is not claimed”.")
        )
    return blocks or [MissingData("No claim is supported by these rows.", RUN_BENCH)]


def _throughput(evidence: Evidence) -> Claim | None:
    """Return the highest throughput of all, and the implementations that reached it or its interval."""
    lines = [line for name in evidence.implementations if (line := peak_line(evidence.cases, name))]
    if not lines:
        return None
    top = max(lines, key=lambda each: each.row.tokens_per_second or 0.0)
    names = formatting.best_of(top.case) or tuple(row.implementation for row in sound_rows(top.case))
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
