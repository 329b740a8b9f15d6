"""Comparison of two runs: how much each row changed, beyond the change of the machine.

Between two runs the machine differs, by load, clocks or temperature, and all rows with it. The reference, whose code is
assumed unchanged, measures by how much: a row's change is that of its speedup over the reference, and it counts only
beyond the noise of both runs and beyond the change in the reference's own time.
"""

import math
from typing import Final

from msgspec import Struct

from attention.core import statistics
from attention.core.results import AnyCase, Ratio, Report, Row
from attention.core.stream import Stream
from attention.core.workload import FineTuning, Generation, Workload

AnyWorkload = Workload | Generation | FineTuning | Stream
FLOORLESS: Final = statistics.MIN_FLOOR


class RowChange(Struct, frozen=True, kw_only=True):
    """One implementation on one workload, before and after."""

    workload: AnyWorkload
    implementation: str
    before: Row
    after: Row
    times: Ratio | None
    """Median time before over median time after, the machine's change included; None for too few rounds."""
    ratio: Ratio | None
    """Speedup over the reference after, divided by that before; above 1 is faster after.

    None if one run has no speedup for it, or the references differ; 1 for the reference itself.
    """
    floor: float
    """The largest of both noise floors and the change of the reference's time; a ratio inside it is printed as ≈ 1."""
    reference: str | None
    """The reference of both runs; None if they have none in common."""
    drift: Ratio | None
    """The change of the reference's own time."""


class Comparison(Struct, frozen=True, kw_only=True):
    """The rows that two reports have in common, and those that only one has."""

    before: Report
    after: Report
    changes: tuple[RowChange, ...]
    only_before: tuple[str, ...]
    """Rows without a counterpart: "baseline on B=1 L=64 ..."."""
    only_after: tuple[str, ...]
    differences: tuple[str, ...]
    """Differences between the environments: "mlx: 0.32.4, then 0.33.0"."""


def compare(before: Report, after: Report) -> Comparison:
    """Match rows by workload and implementation."""
    first, second = _rows(before), _rows(after)
    return Comparison(
        before=before,
        after=after,
        changes=tuple(_change(first[key], second[key]) for key in first if key in second),
        only_before=tuple(_name(key) for key in first if key not in second),
        only_after=tuple(_name(key) for key in second if key not in first),
        differences=_differences(before, after),
    )


def _rows(report: Report) -> dict[tuple[AnyWorkload, str], tuple[AnyCase, Row]]:
    return {(case.workload, row.implementation): (case, row) for case in report.all_cases for row in case.rows}


def _name(key: tuple[AnyWorkload, str]) -> str:
    return f"{key[1]} on {key[0].label}"


def _change(before: tuple[AnyCase, Row], after: tuple[AnyCase, Row]) -> RowChange:
    (case, row), (case_after, row_after) = before, after
    reference = case.reference if case.reference == case_after.reference else None
    floors = [each.noise_floor.floor for each in (case, case_after) if each.noise_floor]
    noise = max(floors, default=FLOORLESS)
    drift = _times(_reference_row(case), _reference_row(case_after), noise) if reference else None
    floor = max(noise, math.expm1(abs(math.log(drift.value)))) if drift else noise
    return RowChange(
        workload=case.workload,
        implementation=row.implementation,
        before=row,
        after=row_after,
        times=_times(row, row_after, noise),
        ratio=_beyond(row, row_after, floor) if drift else None,
        floor=floor,
        reference=reference,
        drift=drift,
    )


def _reference_row(case: AnyCase) -> Row | None:
    return next((row for row in case.rows if row.implementation == case.reference), None)


def _times(before: Row | None, after: Row | None, floor: float) -> Ratio | None:
    if before is None or after is None or before.call_s is None or after.call_s is None:
        return None
    return statistics.ratio_of_medians(before.call_s, after.call_s, floor)


def _beyond(before: Row, after: Row, floor: float) -> Ratio | None:
    if before.speedup is None or after.speedup is None:
        return None
    return statistics.ratio_of_speedups(before.speedup, after.speedup, floor)


def _differences(before: Report, after: Report) -> tuple[str, ...]:
    differences = []
    for name in before.environment.__struct_fields__:
        first, second = getattr(before.environment, name), getattr(after.environment, name)
        if first != second:
            differences.append(f"{name}: {first or 'unknown'}, then {second or 'unknown'}")
    return tuple(differences)
