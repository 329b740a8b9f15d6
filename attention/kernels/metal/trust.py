"""Records of the kernels' self-checks on this Mac, one per specialisation; see `first_use`."""

import hashlib
from functools import cache as once
from typing import Final

from attention.code_mark import code_mark
from attention.kernels.first_use import PASSED, Check, FirstUse
from attention.kernels.metal.call import Specialisation
from attention.kernels.metal.machine import mark

PREFIX: Final = "metal-"
"""Prefix of the keys of all records."""


@once
def key_of(special: Specialisation) -> str:
    """Return the key of a specialisation's record: its constants and the fingerprint of its code."""
    return PREFIX + hashlib.sha256(f"{special}{code_mark('kernels/metal')}".encode()).hexdigest()[:32]


def distrust(special: Specialisation) -> str | None:
    """Return why a specialisation must not be used on this machine, in one line, or None if unknown."""
    reason = checks.distrust(key_of(special))
    return f"{special.name}: {reason}" if reason else None


def is_trusted(special: Specialisation) -> bool:
    """Return whether a specialisation has passed its self-check on this machine."""
    return checks.verdict(key_of(special)) == PASSED


def ensure(special: Specialisation, check: Check) -> None:
    """Run the self-check of a specialisation unless it has been run on this machine before.

    Args:
        special: the specialisation.
        check: runs the kernel (Metal compiles it) and returns what is wrong with its results, or None.

    Raises:
        KernelUnavailable: the self-check failed, now or before.
    """
    checks.ensure(key_of(special), special.name, check)


checks = FirstUse(mark)
