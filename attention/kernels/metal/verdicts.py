"""What the checks of the kernels came to on this machine: for the doctor, and for a report that a user can send."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from attention.errors import KernelUnavailable
from attention.kernels import cache, first_use
from attention.kernels.metal import machine, trust
from attention.kernels.metal.call import FEW_ROWS, Call, Shape, specialisation
from attention.kernels.metal.tiles import HEAD_DIMS, SIZES

UNKNOWN: Final = (
    "Never measured by fatui's authors, who had no Mac: speed, registers and occupancy. "
    "The texts were run and checked on an emulator of Metal's language, not through Apple's compiler."
)


@dataclass(frozen=True)
class Verdict:
    """One specialisation, and what its check came to."""

    name: str
    text: str
    """ "passed", or the error with all its lines, as far as `first_use` keeps it."""
    machine: str
    """GPU, macOS and MLX that it holds for."""

    @property
    def passed(self) -> bool:
        """Whether the kernel is used."""
        return self.text == first_use.PASSED


def known() -> list[Verdict]:
    """The verdicts of all checks that were ever made with this cache folder, by name."""
    made = [
        Verdict(str(record.get("name")), str(text), where)
        for record in cache.records(trust.PREFIX)
        for where, text in record.get("checked", {}).items()
    ]
    return sorted(made, key=lambda verdict: (verdict.machine, verdict.name))


def summary() -> tuple[str, str | None]:
    """The state of the checks on this machine in a line, and of the first that failed its error."""
    here = [verdict for verdict in known() if verdict.machine == machine.mark()]
    failed = [verdict for verdict in here if not verdict.passed]
    if not here:
        return f"no kernel has been used yet, so none has been checked. {UNKNOWN}", None
    text = f"{len(here) - len(failed)} of {len(here)} kernels checked on this Mac agree with float64. {UNKNOWN}"
    return text, f"{failed[0].name}: {first_use.headline(failed[0].text)}" if failed else None


def check_all() -> Iterator[str]:
    """Checks a causal forward, decode and backward kernel of every head dim and type; gives the name of each before.

    Raises:
        KernelUnavailable: there is no Metal here.
    """
    machine.look()
    from attention.kernels.metal import attend, gradient

    for dtype in SIZES:
        for head_dim in HEAD_DIMS:
            many = Shape(1, 4, 2, FEW_ROWS + 1, 83, head_dim, dtype)
            few = Shape(1, 4, 2, 1, 83, head_dim, dtype)
            call = Call(head_dim**-0.5, causal=True)
            for special, shape, check in (
                (specialisation("forward", many, call), many, attend.check),
                (specialisation("decode", few, call), few, attend.check),
                (specialisation("backward_key", many, call), many, gradient.check),
            ):
                yield special.name
                with suppress(KernelUnavailable):  # kept with its reason, as one that passes is
                    check(shape, call)
