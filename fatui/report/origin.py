"""The study that fatui grew from beside what was measured, and where its 32x comes from."""

from collections.abc import Sequence

from attention.report import Case, Row
from fatui import figures
from fatui.report.document import Block, Finding, Missing, Paragraph, Table
from fatui.report.evidence import sound
from fatui.study import PRESET, Study, StudyRow, study

SHOWN = ("baseline", "practical", "demo")
RUN_STUDY = f"fatui bench {PRESET}"


def origin_blocks(cases: Sequence[Case]) -> list[Block]:
    """The study's rows that were measured here, and its cold start made visible."""
    told = study()
    pairs = [(row, case) for row in told.rows for case in cases if told.row_for(case.workload) is row]
    if not pairs:
        return [Missing("None of the study's shapes has been measured here.", RUN_STUDY)]
    about = f"The columns of the study are its own figures, from an {told.machine}; they were not measured here."
    return [Paragraph(about), _table(pairs), Paragraph(f"* {told.note}"), *cold_start(told, pairs)]


def _table(pairs: Sequence[tuple[StudyRow, Case]]) -> Table:
    rows = []
    for old, case in pairs:
        for name in SHOWN:
            today = next((row for row in sound(case) if row.implementation == name), None)
            mark = "*" if old.cold_start else ""
            shape = f"B={old.batch} L={old.seq} D={old.head_dim}"
            now = (_rate(today), figures.speedup_text(today.speedup if today else None))
            rows.append((shape, name, _exact(old.tokens_per_second(name)) + mark, _times(old, name) + mark, *now))
    heads = ("shape", "implementation", "study tokens/s", "study speedup", "tokens/s here", "speedup here")
    return Table("The study's table beside this machine", heads, tuple(rows), frozenset({"implementation"}))


def _rate(row: Row | None) -> str:
    return figures.tokens_per_second(row.tokens_per_second if row else None)


def _exact(value: float | None) -> str:
    return figures.UNKNOWN if value is None else f"{value:,.0f}"


def _times(row: StudyRow, name: str) -> str:
    value = row.speedup(name)
    return "1" if name == "baseline" else figures.UNKNOWN if value is None else f"{value:g}x"


def cold_start(told: Study, pairs: Sequence[tuple[StudyRow, Case]]) -> list[Block]:
    """What a table would show here that set the baseline's first call against another's steady ones."""
    for old, case in pairs:
        rows = {row.implementation: row for row in sound(case)}
        base, other = rows.get("baseline"), rows.get("practical")
        if not old.cold_start or base is None or other is None:
            continue
        if base.first_call_s and base.call_s and other.call_s and other.speedup:
            return [_cold(old, case, (base, base.first_call_s), other)]
    missing = (
        "The study's cold start cannot be shown: its first row, with baseline and practical, has not been measured."
    )
    return [Missing(missing, RUN_STUDY)]


def _cold(old: StudyRow, case: Case, base: tuple[Row, float], other: Row) -> Finding:
    row, first = base
    assert row.call_s and other.call_s
    steady, lean = row.call_s.median, other.call_s.median
    wrong = figures.three(first / lean)
    return Finding(
        f"The study's {old.practical_speedup}x ({case.workload.label}): here the baseline's first call took "
        f"{figures.seconds(first)}, {figures.three(first / steady)} times its steady {figures.seconds(steady)}. "
        f"Timing that one call against practical's steady {figures.seconds(lean)} would print {wrong}x; measured in "
        f"rounds, both warm, the speedup is {figures.speedup_text(other.speedup)}."
    )
