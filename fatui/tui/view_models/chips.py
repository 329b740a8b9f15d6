"""Chips beside this machine: their roofs, where a case is predicted on them, and what limits it there."""

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from attention.chips import prediction
from attention.chips.prediction import Prediction, explained, predict, what_if
from attention.chips.table import Chip, chips
from attention.core.results import Case, Peaks
from attention.core.workload import Workload
from fatui import formatting
from fatui.report.predictions import basis_texts, chip_line, range_text
from fatui.tui.view_models import roofline
from fatui.tui.view_models.plot import Line, Note, Plot, Point, decades, mark_of

FACTORS: Final = {
    "bandwidth": "bandwidth",
    "rate": "rate",
    "cores": "cores",
    "shared": "shared mem",
    "cache": "cache",
}
"""The figures that sliders change, with their labels."""
PERCENT: Final = (10, 25, 33, 50, 67, 75, 90, 100, 110, 125, 150, 200, 300, 400, 800)
NONE: Final = "none"
PREDICTED: Final = roofline.PREDICTED
MAX_NAMES: Final = 4
PREDICTABLE: Final = prediction.PREDICTED


class ChipPredictions(Struct, frozen=True):
    """What the screen shows of the chips, the chosen one first."""

    chips: tuple[Chip, ...]
    predictions: tuple[tuple[Prediction, ...], ...]
    """Those of each chip, in the order of the chips, of which two may be the same one with other figures."""


def known_keys() -> tuple[str, ...]:
    """Return the keys of all chips."""
    return tuple(chips())


def predict_chips(
    workload: Workload, names: Sequence[str], keys: Sequence[str], percent: Mapping[str, int]
) -> ChipPredictions:
    """Predict a case on some chips; the figures of the first are changed by the sliders' percentages."""
    factors = {name: value / 100 for name, value in percent.items() if value != 100}
    found = [chips()[key] for key in keys if key != NONE]
    if found and factors:
        found[0] = what_if(found[0], factors)
    return ChipPredictions(
        tuple(found), tuple(tuple(predict(workload, name, chip) for name in names) for chip in found)
    )


def plot(
    workload: Workload, made: ChipPredictions, peaks: Peaks, cases: Sequence[Case] = (), names: Sequence[str] = ()
) -> Plot | None:
    """Return FLOP/s over FLOP/byte: a roof for each chip with the case on it, this machine's with what was measured.

    A case on several devices has the roofs of as many.
    """
    at, count = roofline.intensity(workload), workload.ranks
    roofs = [
        (rate * count, chip.bytes_per_s * count, number)
        for number, chip in enumerate(made.chips)
        if (rate := chip.rate(workload.dtype)) and chip.bytes_per_s
    ]
    if peaks.flops_per_s and peaks.copy_bytes_per_s:
        roofs.append((peaks.flops_per_s * count, peaks.copy_bytes_per_s * count, roofline.ROOF))
    if not roofs:
        return None
    points = [
        (number, workload.flops / each.predicted_s, each)
        for number, predictions in enumerate(made.predictions)
        for each in predictions
        if each.predicted_s
    ]
    measured, everything = roofline.measured_points(cases, names)
    ridges = [rate / slope for rate, slope, _ in roofs]
    xs = [at, *ridges, *(point.x for point in everything)]
    ys = [rate for rate, _, _ in roofs] + [rate for _, rate, _ in points] + [point.y for point in everything]
    x = decades(min(xs) / 4, max(xs) * 4, formatting.three)
    y = decades(min(ys) / 3, max(ys) * 1.3)
    lines = [
        roofline.roof_line([(x.low, x.low * slope), (rate / slope, rate), (x.high, rate)], y, number)
        for rate, slope, number in roofs
    ]
    lines += [
        Line(number, (Point(at, rate, *_rates(workload, each)),), joined=False, marked=False)
        for number, rate, each in points
    ]
    notes = [Note(at, rate, PREDICTED, each.implementation, number) for number, rate, each in points]
    titles = {number: chip.key for number, chip in enumerate(made.chips)} | {roofline.ROOF: "this machine"}
    notes += [Note(x.high, rate, " ", titles[number], number) for rate, _, number in roofs]
    return Plot(x, y, (*lines, *measured), tuple(notes), cursor=at)


def title(workload: Workload, made: ChipPredictions) -> str:
    """Format what the plot shows: "FLOP/s over FLOP/byte · NVIDIA H200 SXM, Apple M4 Max", or of several of each."""
    names = ", ".join(chip.name + (" *" if chip.changed else "") for chip in made.chips)
    several = f" · {workload.ranks} of each" if workload.ranks > 1 else ""
    return f"FLOP/s over FLOP/byte · {names}{several}"


def legend(made: ChipPredictions, cases: Sequence[Case], names: Sequence[str]) -> str:
    """Explain the marks of the plot."""
    there = {row.implementation for case in cases for row in case.rows}
    measured = "  ".join(f"{mark_of(number)} {name}" for number, name in enumerate(names) if name in there)
    parts = [f"{PREDICTED} predicted", f"measured here: {measured}" if measured else ""]
    parts.append("* with changed figures" if any(chip.changed for chip in made.chips) else "")
    return " · ".join(filter(None, parts))


def _rates(workload: Workload, prediction: Prediction) -> tuple[float, float]:
    return workload.flops / (prediction.high_s or 1.0), workload.flops / (prediction.low_s or 1.0)


def description_lines(workload: Workload, made: ChipPredictions, peaks: Peaks, cases: Sequence[Case] = ()) -> list[str]:
    """Describe each chip and what limits the case on it; this machine's measured figures come first."""
    lines = roofline.limit_words(workload, peaks, cases)
    said = [f"this machine, measured. {lines[0]}", *lines[1:]] if lines else []
    for chip, predictions in zip(made.chips, made.predictions, strict=True):
        said.append(f"{chip_line(chip)}.")
        for each in predictions:
            if each.predicted_s is None:
                said.append(f"  {each.implementation} {explained(each)}")
                continue
            tokens = formatting.tokens_per_second(each.tokens_per_second)
            time = f"{formatting.seconds(each.predicted_s)} ({range_text(each)}), {tokens} tokens/s"
            said.append(f"  {each.implementation} predicted {time}; {explained(each)}")
        said += [f"  {text}" for text in basis_texts(predictions)]
    return said
