"""The table of chips: sourced figures, each with where it is from."""

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

from msgspec import Struct, structs

from attention.core.errors import UsageError, suggestion
from attention.core.results import Peaks

FIGURES: Final = (
    *("cores", "clock_hz", "matrix16_flops", "matrix32_flops", "vector32_flops"),
    *("bytes_per_s", "cache_bytes", "shared_bytes", "memory_bytes", "watts"),
)
"""The figures of a chip; see chips.toml for their meaning."""
RATES: Final = ("matrix16_flops", "matrix32_flops", "vector32_flops")
MOVED: Final = {"rate": RATES, "cores": (*RATES, "cores")}
"""The figures that a factor is of, where it is of several."""
LANES: Final = {"cuda": 128, "metal": 128, "cpu": 32}
"""Float32 multiply-adds of a core in a cycle, for chips whose clock no source states."""
MACHINE: Final = "this machine"


class Source(Struct, frozen=True):
    """Where a figure is from."""

    title: str
    """Address or document, and the place in it."""
    note: str = ""
    """How the figure follows from what the source says, if it does not say it itself."""


class Chip(Struct, frozen=True, kw_only=True):
    """A chip; figures that no source states are None."""

    key: str
    name: str
    vendor: str
    architecture: str
    backend: str
    """As `Device.backend`: "cpu", "metal" or "cuda"."""
    cores: float | None = None
    clock_hz: float | None = None
    matrix16_flops: float | None = None
    matrix32_flops: float | None = None
    vector32_flops: float | None = None
    bytes_per_s: float | None = None
    cache_bytes: float | None = None
    shared_bytes: float | None = None
    memory_bytes: float | None = None
    watts: float | None = None
    sources: dict[str, Source] = {}
    """By figure."""
    changed: tuple[str, ...] = ()
    """Figures that were replaced to see what they would do."""

    def rate(self, dtype: str) -> float | None:
        """Return the peak FLOP/s of matrix products of a dtype; None if no source states it."""
        if dtype == "float32":
            return self.matrix32_flops or self.vector32_flops
        return self.matrix16_flops or self.vector32_flops

    @property
    def cycles_per_s(self) -> float | None:
        """Cycles of all cores in a second."""
        if self.cores and self.clock_hz:
            return self.cores * self.clock_hz
        return self.vector32_flops / (2 * LANES[self.backend]) if self.vector32_flops else None

    def scaled(self, **factors: float) -> "Chip":
        """Return the chip with figures multiplied; more cores bring rates and cache traffic with them.

        Args:
            factors: by the name of a figure; `rate` is every matrix and vector rate.
        """
        figures: dict[str, float] = {}
        for name, factor in factors.items():
            for each in MOVED.get(name, (name,)):
                value = figures.get(each, getattr(self, each))
                if value is not None:
                    figures[each] = value * factor
        moved = [name for name, factor in factors.items() if factor != 1]
        return structs.replace(self, **figures, changed=(*self.changed, *moved))


@cache
def chips() -> Mapping[str, Chip]:
    """Return all chips by key."""
    document = tomllib.loads(resources.files("attention.chips").joinpath("chips.toml").read_text())
    titles = document["sources"]
    return {key: _chip(key, entry, titles) for key, entry in document["chips"].items()}


def _chip(key: str, entry: Mapping[str, Any], titles: Mapping[str, str]) -> Chip:
    figures: dict[str, Any] = {name: float(entry[name][0]) for name in FIGURES if name in entry}
    sources = {name: Source(titles[entry[name][1]], *entry[name][2:]) for name in figures}
    words: dict[str, Any] = {name: entry[name] for name in ("name", "vendor", "architecture", "backend")}
    return Chip(key=key, sources=sources, **words, **figures)


def find_chips(names: Iterable[str]) -> list[Chip]:
    """Return chips by key.

    Raises:
        UsageError: a name is not in the table, with those that are.
    """
    known = chips()
    problems = [
        f"chip: got '{name}'; it takes {', '.join(known)}{suggestion(name, list(known))}"
        for name in names
        if name not in known
    ]
    if problems:
        raise UsageError(*problems)
    return [known[name] for name in names]


DEVICES: Final = {
    "H200": "h200",
    "H100 PCIe": "h100-pcie",
    "H100": "h100",
    "A100-SXM4-80GB": "a100-80",
    "A100-SXM4-40GB": "a100",
    "B200": "b200",
    "RTX 4090": "rtx-4090",
    "RTX 5090": "rtx-5090",
}
"""Keys by a part of the device's name as drivers write it, the more special first."""


def chip_of_device(name: str | None) -> Chip | None:
    """Return the chip that a device of a run is, by its name; None if the table lacks it."""
    if not name:
        return None
    if name.startswith("Apple "):
        return chips().get(name.removeprefix("Apple ").lower().replace(" ", "-"))
    key = next((key for part, key in DEVICES.items() if part in name), None)
    return chips()[key] if key else None


def chip_of_peaks(name: str, backend: str, peaks: Peaks, cores: int | None) -> Chip:
    """Return a chip whose rates are those measured on a machine."""
    source = Source("measured at the start of the run")
    figures = {
        "cores": float(cores) if cores else None,
        "matrix16_flops": peaks.matmul_flops_per_s,
        "vector32_flops": peaks.fma_flops_per_s or peaks.matmul_flops_per_s,
        "bytes_per_s": peaks.copy_bytes_per_s,
    }
    known: dict[str, Any] = {figure: value for figure, value in figures.items() if value}
    sources = dict.fromkeys(known, source)
    return Chip(key=MACHINE, name=name, vendor="", architecture=name, backend=backend, sources=sources, **known)
