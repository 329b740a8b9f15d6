"""The table of chips: every figure has a source, and is of the size that such a figure has."""

import tomllib
from pathlib import Path

import pytest

from attention.chips import table
from attention.chips.table import FIGURES, LANES, chip_of_device, chips, find_chips
from attention.core.errors import UsageError

DOCUMENT = tomllib.loads((Path(table.__file__).parent / "chips.toml").read_text())
RANGES = {
    "cores": (1, 1000),
    "clock_hz": (1e9, 6e9),
    "matrix16_flops": (1e12, 1e16),
    "matrix32_flops": (1e12, 1e16),
    "vector32_flops": (1e12, 1e15),
    "bytes_per_s": (5e10, 2e13),
    "cache_bytes": (1e6, 1e9),
    "shared_bytes": (3e4, 1e6),
    "memory_bytes": (1e9, 1e12),
    "watts": (5, 2000),
}


@pytest.mark.parametrize("key", DOCUMENT["chips"])
def test_every_figure_of_a_chip_has_a_source_and_is_plausible(key):
    chip = chips()[key]
    entry = DOCUMENT["chips"][key]
    assert set(entry) <= {"name", "vendor", "architecture", "backend", *FIGURES}
    assert chip.backend in LANES
    figures = [name for name in FIGURES if getattr(chip, name) is not None]
    assert set(figures) == set(chip.sources) and "bytes_per_s" in figures
    for name in figures:
        low, high = RANGES[name]
        assert low <= getattr(chip, name) <= high, name
        assert "/" in chip.sources[name].title


def test_every_source_is_of_a_figure_or_named_in_a_note():
    entries = [value for chip in DOCUMENT["chips"].values() for value in chip.values() if isinstance(value, list)]
    notes = " ".join(note for _, _, *rest in entries for note in rest)
    used = {entry[1] for entry in entries}
    assert used <= set(DOCUMENT["sources"])
    assert {name for name in DOCUMENT["sources"] if name not in used and name not in notes} == set()


def test_rates_agree_with_cores_and_clock_where_both_are_stated():
    for chip in chips().values():
        if chip.backend != "cpu" and chip.clock_hz and chip.vector32_flops and chip.architecture != "Ampere":
            lanes = chip.vector32_flops / (2 * chip.cores * chip.clock_hz)
            assert lanes == pytest.approx(LANES[chip.backend], rel=0.1), chip.key


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Apple M4 Max", "m4-max"),
        ("Intel(R) Xeon(R) Processor", None),
        (None, None),
    ],
)
def test_a_device_is_found_by_its_name(device, key):
    found = chip_of_device(device)
    assert (found.key if found else None) == key


def test_unknown_chips_are_named_with_those_that_are_known():
    with pytest.raises(UsageError) as caught:
        find_chips(["h200", "h20"])
    assert caught.value.problems[0].startswith("chip: got 'h20'; it takes a100, ")
    assert "did you mean 'h200'" in caught.value.problems[0]


def test_more_cores_bring_their_rates_and_other_figures_stay():
    chip = chips()["h200"]
    made = chip.scaled(cores=2, bytes_per_s=1)
    assert (made.cores, made.matrix16_flops) == (2 * chip.cores, 2 * chip.matrix16_flops)
    assert made.bytes_per_s == chip.bytes_per_s
    assert made.changed == ("cores",)
