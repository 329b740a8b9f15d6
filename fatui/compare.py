"""Two runs side by side: how much each row changed, and whether it did."""

from typing import Final

from msgspec import Struct

from attention import statistics
from attention.models.workloads import FineTuning, Generation
from attention.report import AnyCase, Ratio, Report, Row
from attention.workload import Workload

AnyWorkload = Workload | Generation | FineTuning
FLOORLESS: Final = statistics.SMALLEST_FLOOR


class Change(Struct, frozen=True, kw_only=True):
    """One implementation on one workload, before and after."""

    workload: AnyWorkload
    implementation: str
    before: Row
    after: Row
    ratio: Ratio | None
    """Time before over time after, above 1 is faster after; None where one of them has too few samples."""
    floor: float
    """The larger noise floor of the two cases; a ratio inside it is printed as ≈ 1."""


class Comparison(Struct, frozen=True, kw_only=True):
    """All that two reports have in common, and what only one of them has."""

    before: Report
    after: Report
    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    """Rows without a partner: "baseline on B=1 L=64 ..."."""
    only_after: tuple[str, ...]
    differences: tuple[str, ...]
    """What differs between where they ran: "mlx: 0.32.4, then 0.33.0"."""


def compare(before: Report, after: Report) -> Comparison:
    """Matches rows by workload and implementation."""
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


def _change(before: tuple[AnyCase, Row], after: tuple[AnyCase, Row]) -> Change:
    floors = [case.noise_floor.floor for case, _ in (before, after) if case.noise_floor]
    floor = max(floors, default=FLOORLESS)
    return Change(
        workload=before[0].workload,
        implementation=before[1].implementation,
        before=before[1],
        after=after[1],
        ratio=statistics.unpaired_ratio(before[1].samples, after[1].samples, floor),
        floor=floor,
    )


def _differences(before: Report, after: Report) -> tuple[str, ...]:
    told = []
    for name in before.environment.__struct_fields__:
        first, second = getattr(before.environment, name), getattr(after.environment, name)
        if first != second:
            told.append(f"{name}: {first or 'unknown'}, then {second or 'unknown'}")
    return tuple(told)
