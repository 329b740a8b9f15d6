"""The original study's figures, shipped as data beside this file, next to the measured ones."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from attention.core.results import AnyCase, Case, Report, Row
from attention.core.workload import DType, Workload
from fatui import formatting
from fatui.report.document import Block, Claim, MissingData, Paragraph, Table
from fatui.report.evidence import Evidence, sound_rows

PRESET: Final = "seed-table"
"""The preset whose cases are the study's rows."""
SHOWN: Final = ("baseline", "practical", "demo")
"""The implementations with figures in the study."""


class StudyRow(Struct, frozen=True, kw_only=True):
    """One configuration: tokens/s and speedups over the study's baseline, as the study prints them."""

    batch: int
    seq: int
    head_dim: int
    baseline: float
    practical: float | None
    demo: float | None
    practical_speedup: float | None
    demo_speedup: float | None
    cold_start: bool
    """Whether the timing included the baseline's first call."""

    def tokens_per_second(self, implementation: str) -> float | None:
        """Return the study's tokens/s of an implementation, or None."""
        known = {"baseline": self.baseline, "practical": self.practical, "demo": self.demo}
        return known.get(implementation)

    def speedup(self, implementation: str) -> float | None:
        """Return the study's speedup of an implementation over its baseline, or None."""
        return {"practical": self.practical_speedup, "demo": self.demo_speedup}.get(implementation)


def rate_text(row: StudyRow, name: str) -> str:
    """Format tokens/s as the study prints them, not rounded again; a star marks a cold start."""
    value = row.tokens_per_second(name)
    return (formatting.UNKNOWN if value is None else f"{value:,.0f}") + _mark(row)


def times_text(row: StudyRow, name: str) -> str:
    """Format a speedup as the study prints it; a star marks a cold start."""
    value = row.speedup(name)
    if value is None:
        return ("1" if name == SHOWN[0] else formatting.UNKNOWN) + _mark(row)
    return (f"{value:.1f}x" if value >= 10 else f"{value:.2f}x") + _mark(row)


def _mark(row: StudyRow) -> str:
    return "*" if row.cold_start else ""


class StudyModel(Struct, frozen=True, kw_only=True):
    """Approximate tokens/s of a model, for which the study states neither prompt nor batch."""

    model: str
    baseline: float
    practical: float
    demo: float


class StudyFineTuning(StudyModel, frozen=True, kw_only=True):
    """Seconds of a fine-tuning run; the study estimated the baseline's."""

    iterations: int


class Study(Struct, frozen=True, kw_only=True):
    """The study's table of speedups, and the machine it was measured on."""

    title: str
    machine: str
    note: str
    heads: int
    dtype: DType
    rows: tuple[StudyRow, ...]
    models: tuple[StudyModel, ...]
    fine_tunings: tuple[StudyFineTuning, ...]

    def row_for(self, workload: Workload) -> StudyRow | None:
        """Return the study's row of a workload, or None."""
        for row in self.rows:
            shape = Workload(batch=row.batch, seq=row.seq, head_dim=row.head_dim, heads=self.heads, dtype=self.dtype)
            if workload == shape:
                return row
        return None


@cache
def study() -> Study:
    """Read the study's figures."""
    return msgspec.json.decode(Path(__file__).with_name("study.json").read_bytes(), type=Study)


def beside(report: Report) -> Study | None:
    """Return the study's figures if a run was made from its preset and has one of its rows, else None."""
    if report.run.preset != PRESET:
        return None
    return study() if any(study().row_for(case.workload) for case in report.cases) else None


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
    return next((row for row in sound_rows(case) if row.implementation == name), None)


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
        rows = {row.implementation: row for row in sound_rows(case)}
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
