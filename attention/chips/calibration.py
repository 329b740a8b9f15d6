"""Calibration: a few constants for each family of rows, fitted to measured times.

A family is an implementation on a backend, by the kind of its path, pass and width of numbers. Its time is

    T = (launch^q + (start + W)^q)^(1/q),    W = (sum over the other terms of (a * x)^p)^(1/p)

since the host launches calls while the chip still works on others; x are the costs at peak rates (`cost.py`), with a
constant a for each: seconds of a launch and a start, and the reciprocal of the share of each peak that the kernel
reaches. p says how well the terms overlap: 1 not at all, large the longest alone. The fit minimises the logarithm of
predicted over measured by Gauss-Newton steps with damping (Levenberg and Marquardt), with Huber's weights against
outliers and a weak prior on each constant, so that one the rows do not determine stays where peak rates put it.

Intervals are conformal: rows are left out a fold at a time, predicted by the others, and the 90 % quantile of the
absolute log error, with the correction for a finite number of rows, is the half width (Lei et al., "Distribution-free
predictive inference for regression", JASA 113, 2018).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from attention.chips.cost import TERMS, Costs, Path, costs, on_host, path_kind
from attention.chips.table import Chip
from attention.core.results import Report
from attention.core.route import FALLS_BACK
from attention.core.workload import Workload

Vector = NDArray[np.float64]
COVERAGE: Final = 0.9
FOLDS: Final = 8
MIN_ROWS: Final = 5
"""A family with fewer rows is not calibrated."""
DISTURBED_CORES: Final = 1.0
"""Cores kept busy by other processes from which a run counts as disturbed."""
FLOOR: Final = 0.03
"""Smallest half width, in logarithms: what runs of the same code differ by."""
STARTS: Final = {
    "launch": 1e-5,
    "start": 3e-6,
    "matrix": 1.5,
    "vector": 0.03,
    "memory": 1.2,
    "cache": 0.02,
    "blocks": 1e-6,
    "scores": 4.0,
    "mask": 1.0,
}
SPREADS: Final = {
    "launch": 2.0,
    "start": 2.0,
    "matrix": 0.3,
    "vector": 0.7,
    "memory": 0.3,
    "cache": 0.7,
    "blocks": 1.5,
    "scores": 1.0,
    "mask": 1.5,
}
"""Standard deviations of the prior, in logarithms."""
PRIOR: Final = 0.05
"""What a standard deviation of the prior weighs, in logarithms of a time."""
UNTUNED: Final = {"matrix": 2.0, "vector": 2.0, "scores": 2.0}
"""Wider ones, for a CPU."""
FAR: Final = 0.7
"""Logarithm of the factor by which the prior may be off before a fit begins at several places."""
POOR: Final = 0.03
"""Median log error of a fit from which others begin where each term alone explains the rows."""
START_POWER: Final = 2.0
OVERLAP: Final = 4.0
"""The power q of launches and work."""
FIXED: Final = ("launch", "start")
HUBER: Final = 0.1


@dataclass(frozen=True)
class Measured:
    """A measured time, and what it is of."""

    workload: Workload
    implementation: str
    path: Path
    chip: Chip
    seconds: float
    file: str = ""
    launch_s: float | None = None
    """What the host launched a call in (`Peaks.queued_launch_s`); None if that was not measured."""

    @property
    def library(self) -> str:
        """What launches its calls."""
        return library_of(self.implementation)

    @property
    def family(self) -> str:
        """Key of the family."""
        return family_of(self.implementation, self.path, self.workload, self.chip.backend)


class Family(Struct, frozen=True):
    """The constants of a family, and what they were calibrated on."""

    constants: dict[str, float]
    """By term; "power" is p."""
    half_width: float
    """Of the 90 % interval on the chip it was calibrated on, in logarithms."""
    median_error: float
    """Of rows predicted by others: |predicted / measured - 1|."""
    rows: int
    chip: str
    """Name of the chip."""
    vendor: str
    architecture: str
    launch_s: float | None = None
    """What the calibration's host launched a call in; None if its rows do not say."""


class Calibration(Struct, frozen=True):
    """The families, and the files they were calibrated on."""

    families: dict[str, Family]
    files: dict[str, str] = {}
    """Digests of the runs by file."""


def library_of(implementation: str) -> str:
    """Return the library that launches an implementation's calls; each takes a time of its own on a host."""
    return "torch" if implementation == "torch" else "MLX"


def family_of(implementation: str, path: Path, workload: Workload, backend: str) -> str:
    """Return the key of the family of a row.

    On a CPU the unfused paths are one: all multiply by MLX's own products, which take nearly all of their time.
    """
    width = "float32" if workload.dtype == "float32" else "16-bit"
    if backend == "cpu":
        width = workload.dtype
        implementation = "MLX" if path == "unfused" else implementation
    return f"{backend} {implementation}, {path}, {workload.pass_}, {width}"


def rows_of(report: Report, chip: Chip, file: str = "") -> list[Measured]:
    """Return the measured times of a run that can be predicted.

    They are medians, but the fastest samples of a run during which other processes kept cores busy: a prediction is of
    a machine that does nothing else.
    """
    backend = report.environment.backend or chip.backend
    disturbed = report.conditions is not None and (report.conditions.other_cores or 0.0) > DISTURBED_CORES
    return [
        Measured(
            case.workload,
            row.implementation,
            path_kind(row.path, backend),
            chip,
            min(row.samples, default=row.call_s.median) if disturbed else row.call_s.median,
            file,
            report.peaks.queued_launch_s,
        )
        for case in report.cases
        for row in case.rows
        if row.status == "ok"
        and row.call_s
        and row.implementation != "demo"
        and not case.workload.structured
        and not (row.path or "").startswith(FALLS_BACK)  # another implementation's kernel
    ]


def calibrate(
    rows: Iterable[Measured], files: Mapping[str, str] | None = None, *, intervals: bool = True
) -> Calibration:
    """Return the constants of each family with enough rows.

    Args:
        rows: measured times.
        files: digests of the runs that they are of.
        intervals: whether rows are left out to learn the errors of predictions, which takes most of the time; without
            them the half width and the median error are NaN.
    """
    by_family: dict[str, list[Measured]] = {}
    for row in rows:
        by_family.setdefault(row.family, []).append(row)
    families = {key: _family(found, intervals) for key, found in sorted(by_family.items()) if len(found) >= MIN_ROWS}
    return Calibration(families, dict(files or {}))


def _family(rows: Sequence[Measured], intervals: bool) -> Family:
    constants = _fit(rows)
    errors = _left_out_errors(rows, constants) if intervals else [math.nan]
    return Family(
        constants=constants,
        half_width=max(FLOOR, conformal(errors)) if intervals else math.nan,
        median_error=math.expm1(median(map(abs, errors))),
        rows=len(rows),
        chip=rows[0].chip.name,
        vendor=rows[0].chip.vendor,
        architecture=rows[0].chip.architecture,
        launch_s=_common_launch_s(rows),
    )


def _common_launch_s(rows: Sequence[Measured]) -> float | None:
    """Return the median time of a launch on the hosts of rows; None if it is known of none, or they are torch's."""
    known = [row.launch_s for row in rows if row.launch_s]
    return median(known) if known and rows[0].library == "MLX" else None


def _costs_of(rows: Sequence[Measured]) -> list[Costs]:
    """Return the costs of rows on their hosts; one whose launches were not measured counts as the median host."""
    common = _common_launch_s(rows)
    return [
        on_host(costs(row.workload, row.chip, row.path), (row.launch_s or common) / common if common else 1.0)
        for row in rows
    ]


def conformal(errors: Sequence[float], coverage: float = COVERAGE) -> float:
    """Return the half width that a further absolute error stays within with that probability."""
    ordered = sorted(map(abs, errors))
    rank = math.ceil(coverage * (len(ordered) + 1))
    if rank <= len(ordered):
        return ordered[rank - 1]
    return 1.5 * ordered[-1]  # too few rows for that probability: beyond the largest


def _left_out_errors(rows: Sequence[Measured], near: Mapping[str, float]) -> list[float]:
    """Return the log errors of rows predicted by the other folds; rows of one case stay together.

    The fits begin at the constants of all rows, and at the prior.
    """
    number = {case: index for index, case in enumerate(dict.fromkeys(row.workload for row in rows))}
    folds = min(FOLDS, len(number))
    found = _costs_of(rows)
    errors = [0.0] * len(rows)
    for fold in range(folds):
        out = [number[row.workload] % folds == fold for row in rows]
        constants = _fit([row for row, left in zip(rows, out, strict=True) if not left], near)
        for index in (index for index, left in enumerate(out) if left):
            errors[index] = math.log(seconds(found[index], constants) / rows[index].seconds)
    return errors


def parts(found: Costs, constants: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each term; those of terms that cannot be computed are left out."""
    return {
        name: constants[name] * value
        for name in TERMS
        if name in constants and (value := getattr(found, name)) is not None
    }


def seconds(found: Costs, constants: Mapping[str, float]) -> float:
    """Return the predicted seconds of a call."""
    times = parts(found, constants)
    work = _norm([value for name, value in times.items() if name not in FIXED], constants["power"])
    return _norm([times.get("launch", 0.0), times.get("start", 0.0) + work], OVERLAP)


def _norm(values: Iterable[float], power: float) -> float:
    positive = [value for value in values if value > 0]
    longest = max(positive, default=0.0)
    return longest * float(sum((value / longest) ** power for value in positive) ** (1 / power)) if positive else 0.0


def _fit(rows: Sequence[Measured], near: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the constants that predict the rows best, and where the fit ended.

    Args:
        rows: of one family.
        near: the constants of more rows; with them fits begin there and at the prior alone.
    """
    found = _costs_of(rows)
    names = [name for name in TERMS if any(getattr(each, name) for each in found)]
    table = np.array([[getattr(each, name) or 0.0 for name in names] for each in found])
    measured = np.log([row.seconds for row in rows])
    least = float(np.exp(measured.min()))
    start = np.log(
        [*(min(STARTS[name], 0.5 * least) if name == "launch" else STARTS[name] for name in names), START_POWER]
    )
    free = UNTUNED if rows[0].chip.backend == "cpu" else {}  # a reference BLAS may reach a hundredth of a peak
    spreads = np.array([*(free.get(name, SPREADS[name]) for name in names), 0.7])

    def residuals(theta: Vector) -> Vector:
        errors = _log_times(table, theta) - measured
        size = np.abs(errors)
        robust = np.where(size <= HUBER, errors, np.sign(errors) * np.sqrt(np.maximum(0.0, HUBER * (2 * size - HUBER))))
        return np.concatenate([robust, PRIOR * (theta - start) / spreads], axis=-1)

    if near is None:
        begins = _beginnings(start, measured, _log_times(table, start))
    else:
        begins = [start, np.log([*(near[name] for name in names), near["power"]])]
    found_ones = [least_squares(residuals, begin) for begin in begins]
    poor = min(float(np.median(np.abs(_log_times(table, found) - measured))) for found in found_ones) > POOR
    if near is None and poor:
        found_ones += [least_squares(residuals, begin) for begin in _alone(start, table, measured)]
    theta = min(found_ones, key=lambda each: float(residuals(each) @ residuals(each)))
    values = np.exp(theta)
    return {**dict(zip(names, map(float, values[:-1]), strict=True)), "power": float(max(1.0, values[-1]))}


def _beginnings(start: Vector, measured: Vector, predicted: Vector) -> list[Vector]:
    """Return where fits begin: at the prior and, if that is far off, with one constant or all scaled by the median."""
    scale = float(np.median(measured - predicted))
    if abs(scale) < FAR:
        return [start]
    shifts = [np.r_[np.full(len(start) - 1, scale), 0.0], *(scale * row for row in np.eye(len(start))[:-1])]
    return [start, *(start + shift for shift in shifts)]


def _alone(start: Vector, table: Vector, measured: Vector) -> list[Vector]:
    """Return beginnings where one term, alone, explains the rows that have it, and where all do in equal parts."""
    made, together = [], start.copy()
    columns = range(len(FIXED), table.shape[1])
    for column in columns:
        has = table[:, column] > 0
        begin = start.copy()
        begin[column] = float(np.median(measured[has] - np.log(table[has, column])))
        together[column] = begin[column] - math.log(len(columns))
        made.append(begin)
    together[-1] = 0.0
    return [*made, together]


def _log_times(table: Vector, theta: Vector) -> Vector:
    """Return the logarithms of predicted times, rows of the table along the last axis, for any number of thetas.

    The first columns of the table are launch and start, the last parameter is log p.
    """
    power = np.exp(np.clip(theta[..., -1:], 0.0, 3.0))
    times = table * np.exp(theta[..., None, :-1])
    work = times[..., len(FIXED) :]
    longest = np.maximum(work.max(axis=-1), 1e-12)
    worked = longest * ((work / longest[..., None]) ** power[..., None]).sum(axis=-1) ** (1 / power)
    launched, worked = times[..., 0], times[..., 1] + worked
    highest = np.maximum(launched, worked)
    made: Vector = np.log(highest) + np.log((launched / highest) ** OVERLAP + (worked / highest) ** OVERLAP) / OVERLAP
    return made


def least_squares(residuals: Callable[[Vector], Vector], start: Vector, steps: int = 100) -> Vector:
    """Minimise a sum of squares by damped Gauss-Newton steps with a numerical Jacobian.

    Args:
        residuals: of one theta, or of several along the first axis.
        start: where to begin.
        steps: maximum number of steps.
    """
    theta, damping = start.copy(), 1e-2
    current = residuals(theta)
    for _ in range(steps):
        jacobian = ((residuals(theta + 1e-5 * np.eye(len(theta))) - current) / 1e-5).T
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ current
        while damping < 1e8:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
            tried = residuals(theta + step)
            if tried @ tried < current @ current:
                break
            damping *= 4
        else:
            return theta
        gained = 1 - (tried @ tried) / (current @ current)
        theta, current, damping = theta + step, tried, damping / 3
        if gained < 1e-9:
            return theta
    return theta
