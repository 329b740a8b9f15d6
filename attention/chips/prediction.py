"""Predictions: the time of a call on a chip that need not be here, with an interval, and what limits it.

The interval is the conformal interval of the calibration family that fits the call (`calibration.py`), widened by how
much the chip differs from the calibrated one: not at all for that chip itself, else by an assumed factor. The factor
for chips of the same architecture is checked (`python -m benchmarks.chips check`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from statistics import median
from typing import Final, Literal

import msgspec
from msgspec import Struct

from attention.chips.calibration import (
    COVERAGE,
    FIXED,
    Calibration,
    Family,
    Measured,
    family_of,
    library_of,
    parts,
    seconds,
)
from attention.chips.cost import TERMS, Path, costs, on_host, predicted_path
from attention.chips.table import Chip
from attention.core.workload import Workload

Likeness = Literal["the same chip", "the same architecture", "the same vendor", "another vendor"]
WIDENING: Final[dict[Likeness, float]] = {
    "the same chip": 0.0,
    "the same architecture": math.log(1.2),
    "the same vendor": math.log(1.6),
    "another vendor": math.log(2.5),
}
"""Added to the half width in quadrature, in logarithms; all but the first are assumptions."""
HOST_SPREAD: Final = math.log(1.4)
"""How much hosts of the same GPU differ in launch time, in logarithms, as seen among hosts of H200s.

Added in quadrature, weighted by the launch's share of the predicted time, unless the host's launches were measured.
"""
KNOWN_HOST_SPREAD: Final = math.log(1.1)
"""The same for a host whose launches were measured; an assumption."""
LIMITS: Final = {
    "launch": "the launch of a call",
    "start": "the start of kernels",
    "matrix": "matrix products",
    "vector": "exponentials and other vector work",
    "memory": "memory traffic",
    "cache": "cache traffic",
    "blocks": "what is done once for each block",
    "scores": "memory traffic of the score matrix",
    "mask": "masked pairs",
}
PREDICTED: Final = ("baseline", "mlx", "practical", "poc", "demo", "torch")
"""Implementations that can be predicted; `demo` takes the fastest of those that it tries."""
TRIED: Final = ("poc", "practical", "mlx")
STRUCTURED: Final = "masks other than causal and a window are not predicted"


class Prediction(Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """The predicted time of one implementation on one case; never mixed with measured rows."""

    workload: Workload
    implementation: str
    chip: str
    """Key of the chip."""
    path: str | None = None
    """Kind of the path."""
    predicted_s: float | None = None
    """Seconds per call; None with a reason."""
    low_s: float | None = None
    high_s: float | None = None
    coverage: float = COVERAGE
    """Share of rows that the interval is meant to contain."""
    tokens_per_second: float | None = None
    limit: str | None = None
    """What the call takes the most time for."""
    shares: dict[str, float] = {}
    """Seconds by term, as if each were alone."""
    like: Likeness | None = None
    """What the calibration's chip and this one have in common."""
    calibrated_on: str | None = None
    """Name of the calibration's chip."""
    calibrated_rows: int = 0
    median_error: float | None = None
    """Of the calibration's rows predicted by each other, on its own chip."""
    host: float | None = None
    """Time of a launch on the host over that of the calibration's; None: taken to be the same."""
    reason: str | None = None
    """Why there is no prediction."""


@cache
def calibration() -> Calibration:
    """Return the calibration that the package ships."""
    text = resources.files("attention.chips").joinpath("calibration.json").read_bytes()
    return msgspec.json.decode(text, type=Calibration)


def predict(
    workload: Workload,
    implementation: str,
    chip: Chip,
    given: Calibration | None = None,
    *,
    launch_s: float | None = None,
    hosts: Mapping[str, float] | None = None,
) -> Prediction:
    """Predict the time of a call; one without `predicted_s` has the reason.

    Args:
        workload: the call.
        implementation: what computes it.
        chip: the chip.
        given: the calibration; the package's by default.
        launch_s: seconds that a launch by MLX takes on the host (`queued_launch_s` of its runs' peaks), if known.
        hosts: launch time of the host over that of the calibration's host, by library, if known.
    """
    known = given or calibration()
    if implementation == "demo":
        return _fastest(workload, chip, known, launch_s, hosts)

    def refused(reason: str) -> Prediction:
        return Prediction(workload=workload, implementation=implementation, chip=chip.key, reason=reason)

    if workload.structured:
        return refused(STRUCTURED)
    path = predicted_path(implementation, workload, chip)
    if path is None:
        return refused(_unpredicted(implementation, workload))
    family = family_for(known, implementation, path, workload, chip)
    if family is None:
        return refused(
            f"no rows of {implementation} by the path '{path}' in {workload.dtype} {workload.pass_} to calibrate on"
        )
    try:
        found = costs(workload, chip, path)
    except ValueError as error:
        return refused(str(error))
    needed = [name for name in found.missing if family.constants.get(name)]
    if needed and not (needed == ["matrix"] and workload.pass_ == "decode"):
        figure = "memory bandwidth" if needed[0] in ("memory", "scores", "mask") else "rate"
        return refused(f"no source states the {figure} of {chip.key}")
    if chip.memory_bytes and workload.bytes_moved > chip.memory_bytes:
        return refused(f"its arrays do not fit in the memory of {chip.key}")
    host = (hosts or {}).get(library_of(implementation))
    if host is None and launch_s and family.launch_s:
        host = launch_s / family.launch_s
    found = on_host(found, host or 1.0)
    predicted = seconds(found, family.constants)
    like = likeness(chip, family)
    shares = parts(found, family.constants)
    fixed = sum(shares.get(name, 0.0) for name in FIXED)  # few rows can separate the host's share
    half = math.hypot(
        family.half_width, WIDENING[like], (KNOWN_HOST_SPREAD if host else HOST_SPREAD) * min(1.0, fixed / predicted)
    )
    return Prediction(
        workload=workload,
        implementation=implementation,
        chip=chip.key,
        path=path,
        predicted_s=predicted,
        low_s=predicted * math.exp(-half),
        high_s=predicted * math.exp(half),
        tokens_per_second=workload.tokens / predicted,
        limit=LIMITS[max(shares, key=lambda name: shares[name])],
        shares=shares,
        like=like,
        calibrated_on=family.chip,
        calibrated_rows=family.rows,
        median_error=family.median_error,
        host=host,
    )


def hosts_of(smallest: Sequence[Measured], known: Calibration) -> dict[str, float]:
    """Return a host's launch time over that of the calibration's host, by library, from rows limited by launches.

    The caller chooses those rows; they cannot test predictions that use the result.
    """
    ratios: dict[str, list[float]] = {}
    for row in smallest:
        predicted = predict(row.workload, row.implementation, row.chip, known).predicted_s
        if predicted is not None:
            ratios.setdefault(row.library, []).append(row.seconds / predicted)
    return {library: median(found) for library, found in ratios.items()}


def _unpredicted(implementation: str, workload: Workload) -> str:
    if workload.ranks > 1:
        return "several ranks are not predicted"
    if workload.quantized:
        return "quantized keys and values are not predicted"
    known = "" if implementation in PREDICTED else f"; it takes {', '.join(PREDICTED)}"
    return f"{implementation} is not predicted for such a call{known}"


def _fastest(
    workload: Workload, chip: Chip, known: Calibration, launch_s: float | None, hosts: Mapping[str, float] | None
) -> Prediction:
    made = [predict(workload, name, chip, known, launch_s=launch_s, hosts=hosts) for name in TRIED]
    if made[0].predicted_s is None and predicted_path(TRIED[0], workload, chip) is not None:
        # `poc` has a kernel for it, which is likely to be the fastest: of the others the time would be too long
        return msgspec.structs.replace(made[0], implementation="demo")
    best = min(made, key=lambda each: each.predicted_s or math.inf)
    return msgspec.structs.replace(best, implementation="demo")


def family_for(known: Calibration, implementation: str, path: Path, workload: Workload, chip: Chip) -> Family | None:
    """Return the family that a chip's rows would be of; a GPU without rows of its own is taken to be like CUDA's."""
    backends = {"metal": ("metal", "cuda")}.get(chip.backend, (chip.backend,))
    names = (implementation, "general") if path == "general" else (implementation,)
    for backend in backends:
        for name in names:
            family = known.families.get(family_of(name, path, workload, backend))
            if family:
                return family
    return None


def likeness(chip: Chip, family: Family) -> Likeness:
    """Return what a chip has in common with the one that a family was calibrated on."""
    if chip.name == family.chip and not chip.changed:
        return "the same chip"
    if chip.architecture == family.architecture:
        return "the same architecture"
    return "the same vendor" if chip.vendor == family.vendor else "another vendor"


def explained(prediction: Prediction) -> str:
    """Return in words what limits a predicted call, and the next two terms."""
    if prediction.predicted_s is None:
        return f"not predicted: {prediction.reason}."
    ranked = sorted(prediction.shares.items(), key=lambda item: -item[1])
    whole = prediction.predicted_s
    names = [f"{LIMITS[name]} {100 * value / whole:.0f} %" for name, value in ranked[1:3] if value / whole >= 0.05]
    beside = f" (alone, {' and '.join(names)} of the time)" if names else ""
    return f"limited by {prediction.limit}{beside}."


def what_if(chip: Chip, factors: Mapping[str, float]) -> Chip:
    """Return a chip with figures multiplied, by the names of the options: bandwidth, rate, shared, cores, cache."""
    names = {"bandwidth": "bytes_per_s", "shared": "shared_bytes", "cache": "cache_bytes"}
    return chip.scaled(**{names.get(name, name): factor for name, factor in factors.items()})


assert set(LIMITS) == set(TERMS)
