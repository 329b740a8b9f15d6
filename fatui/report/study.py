"""The figures of the original study, shipped as data beside this file."""

from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from attention.core.results import Report
from attention.core.workload import DType, Workload
from fatui import formatting

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
