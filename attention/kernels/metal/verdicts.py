"""Results of the kernels' self-checks on this machine, for diagnostics and bug reports."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache, first_use
from attention.kernels.metal import trust as metal_trust
from attention.kernels.metal.call import FEW_ROWS, CallParams, CallShape, specialisation
from attention.kernels.metal.tiles import HEAD_DIMS, SIZES, Kind

UNKNOWN: Final = (
    "Never measured by the authors, who had no Mac: speed, registers and occupancy. "
    "The texts were run and checked on an emulator of Metal's language, not through Apple's compiler."
)


@dataclass(frozen=True)
class CheckResult:
    """The result of one specialisation's self-check."""

    name: str
    text: str
    """ "passed", or the whole error, as far as `first_use` stores it."""
    machine: str
    """GPU, macOS and MLX version that it is valid for."""

    @property
    def passed(self) -> bool:
        """Whether the kernel is used."""
        return self.text == first_use.PASSED


def known_results() -> list[CheckResult]:
    """Return all self-check results stored in this cache folder, by name."""
    made = [
        CheckResult(str(record.get("name")), str(text), where)
        for record in cache.records(metal_trust.PREFIX)
        for where, text in record.get("checked", {}).items()
    ]
    return sorted(made, key=lambda verdict: (verdict.machine, verdict.name))


def summary() -> tuple[str, str | None]:
    """Return the state of the self-checks on this machine in a line, and the error of the first that failed."""
    here = [verdict for verdict in known_results() if verdict.machine == metal_trust.machine_fingerprint()]
    failed = [verdict for verdict in here if not verdict.passed]
    if not here:
        return f"no kernel has been used yet, so none has been checked. {UNKNOWN}", None
    text = f"{len(here) - len(failed)} of {len(here)} kernels checked on this Mac agree with float64. {UNKNOWN}"
    return text, f"{failed[0].name}: {first_use.headline(failed[0].text)}" if failed else None


def check_all() -> Iterator[str]:
    """Self-check the kernels of every head dim and dtype, causal and with block lists; yields each name first.

    Raises:
        KernelUnavailable: there is no Metal device.
    """
    metal_trust.describe()
    from attention.kernels.metal import attend, gradients

    for dtype in SIZES:
        for head_dim in HEAD_DIMS:
            many = CallShape(1, 4, 2, FEW_ROWS + 1, 83, head_dim, dtype)
            few = CallShape(1, 4, 2, 1, 83, head_dim, dtype)
            causal, listed = CallParams(head_dim**-0.5, causal=True), CallParams(head_dim**-0.5, lists=True)
            checks: list[tuple[Kind, CallShape, CallParams, Callable[[CallShape, CallParams], None]]] = [
                ("forward", many, causal, attend.check),
                ("decode", few, causal, attend.check),
                ("backward_key", many, causal, gradients.check),
                ("forward", many, listed, attend.check),
                ("backward_key", many, listed, gradients.check),
            ]
            for kind, shape, call, check in checks:
                yield specialisation(kind, shape, call).name
                with suppress(KernelUnavailable):  # stored with its reason, like one that passes
                    check(shape, call)
