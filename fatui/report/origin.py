"""The original study's figures beside the measured ones, and where its 32x comes from."""

from collections.abc import Sequence

from attention.core.results import AnyCase, Case, Row
from fatui import formatting
from fatui.report.document import Block, Claim, MissingData, Paragraph, Table
from fatui.report.evidence import Evidence, is_sound
from fatui.report.study import PRESET, SHOWN, Study, StudyRow, rate_text, study, times_text

RUN_STUDY = f"fatui bench {PRESET}"


def origin_blocks(evidence: Evidence) -> list[Block]:
    """Return the study's figures beside those measured here, and its cold start."""
    paper = study()
    about = f"The study's figures are its own, from an {paper.machine}; they were not measured here."
    return [Paragraph(about), *_shapes(paper, evidence.cases), *_models(paper, evidence), *_tunings(paper, evidence)]


def _shapes(paper: Study, cases: Sequence[Case]) -> list[Block]:
    pairs = [(row, case) for row in paper.rows for case in cases if paper.row_for(case.workload) is row]
    if not pairs:
        return [MissingData("None of the study's shapes has been measured here.", RUN_STUDY)]
    return [_table(pairs), Paragraph(f"* {paper.note}"), *cold_start(pairs)]


def _models(paper: Study, evidence: Evidence) -> list[Block]:
    """Compare the study's models with prefill here; the study says only "tokens a second"."""
    rows = [
        (old.model, name, f"about {formatting.rate(getattr(old, name))}", case.workload.label, _rate(_row(case, name)))
        for old in paper.models
        for case in evidence.models
        if case.workload.model == old.model and case.workload.phase == "prefill"
        for name in SHOWN
    ]
    heads = ("model", "implementation", "study tokens/s", "case here", "tokens/s here")
    words = frozenset({"implementation", "case here"})
    return [Table("The study's models beside those measured here", heads, tuple(rows), words)] if rows else []


def _tunings(paper: Study, evidence: Evidence) -> list[Block]:
    """Compare the study's fine-tunings by the time of the same number of iterations."""
    rows = []
    for old in paper.fine_tunings:
        for case in evidence.fine_tunings:
            for name in SHOWN if case.workload.model == old.model else ():
                row = _row(case, name)
                here = formatting.seconds(row.call_s.median * old.iterations if row and row.call_s else None)
                rows.append((old.model, name, f"about {getattr(old, name):g} s", case.workload.label, here))
    heads = ("model", "implementation", "study, 100 iterations", "case here", "100 iterations here")
    words = frozenset({"implementation", "case here"})
    return [Table("The study's fine-tunings beside those measured here", heads, tuple(rows), words)] if rows else []


def _row(case: AnyCase, name: str) -> Row | None:
    return next((row for row in is_sound(case) if row.implementation == name), None)


def _table(pairs: Sequence[tuple[StudyRow, Case]]) -> Table:
    rows = []
    for old, case in pairs:
        for name in SHOWN:
            today = _row(case, name)
            shape = f"B={old.batch} L={old.seq} D={old.head_dim}"
            now = (_rate(today), formatting.speedup_text(today.speedup if today else None))
            rows.append((shape, name, rate_text(old, name), times_text(old, name), *now))
    heads = ("shape", "implementation", "study tokens/s", "study speedup", "tokens/s here", "speedup here")
    return Table("The study's table beside this machine", heads, tuple(rows), frozenset({"implementation"}))


def _rate(row: Row | None) -> str:
    return formatting.tokens_per_second(row.tokens_per_second if row else None)


def cold_start(pairs: Sequence[tuple[StudyRow, Case]]) -> list[Block]:
    """Return the speedup that would result from timing the baseline's first call against steady calls."""
    for old, case in pairs:
        rows = {row.implementation: row for row in is_sound(case)}
        base, other = rows.get("baseline"), rows.get("practical")
        if not old.cold_start or base is None or other is None:
            continue
        if base.first_call_s and base.call_s and other.call_s and other.speedup:
            return [_cold(old, case, (base, base.first_call_s), other)]
    missing = (
        "The study's cold start cannot be shown: its first row, with baseline and practical, has not been measured."
    )
    return [MissingData(missing, RUN_STUDY)]


def _cold(old: StudyRow, case: Case, base: tuple[Row, float], other: Row) -> Claim:
    row, first = base
    assert row.call_s and other.call_s
    steady, lean = row.call_s.median, other.call_s.median
    wrong = formatting.three(first / lean)
    return Claim(
        f"The study's {old.practical_speedup}x ({case.workload.label}): here the baseline's first call took "
        f"{formatting.seconds(first)}, {formatting.three(first / steady)} times its steady "
        f"{formatting.seconds(steady)}. "
        f"Timing that one call against practical's steady {formatting.seconds(lean)} would print {wrong}x; measured in "
        f"rounds, both warm, the speedup is {formatting.speedup_text(other.speedup)}."
    )
