"""Which kernels have shown on this Mac that they are right: `first_use` for what Metal compiles of the texts."""

import hashlib
from functools import cache as once
from typing import Final

from attention.code_mark import code_mark
from attention.kernels.first_use import PASSED, Check, FirstUse
from attention.kernels.metal.call import Specialisation
from attention.kernels.metal.machine import mark

PREFIX: Final = "metal-"
"""Of the keys of all records."""


@once
def key_of(special: Specialisation) -> str:
    """The name that a specialisation's record has: its constants, and the code that a verdict is of."""
    return PREFIX + hashlib.sha256(f"{special}{code_mark('kernels/metal')}".encode()).hexdigest()[:32]


def distrust(special: Specialisation) -> str | None:
    """Why a specialisation is not to be used on this machine, in one line, if that is known."""
    reason = checks.distrust(key_of(special))
    return f"{special.name}: {reason}" if reason else None


def is_trusted(special: Specialisation) -> bool:
    """Whether a specialisation has shown on this machine that it is right."""
    return checks.verdict(key_of(special)) == PASSED


def ensure(special: Specialisation, check: Check) -> None:
    """Checks a specialisation unless that has been done on this machine before.

    Args:
        special: what the verdict is kept for.
        check: runs the kernel and returns what is wrong with its results, or None; Metal compiles it meanwhile.

    Raises:
        KernelUnavailable: the check failed, now or before.
    """
    checks.ensure(key_of(special), special.name, check)


checks = FirstUse(mark)
