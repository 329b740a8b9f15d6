"""Which kernels have shown on this Mac that they are right: `first_use` for what Metal compiles of the texts."""

import hashlib
from functools import cache as once
from pathlib import Path
from typing import Final

from attention.kernels.first_use import PASSED, Check, FirstUse
from attention.kernels.metal.call import Specialisation
from attention.kernels.metal.machine import mark

PREFIX: Final = "metal-"
"""Of the keys of all records."""
FOLDER: Final = Path(__file__).parent
KINDS: Final = frozenset({".metal", ".py"})


@once
def key_of(special: Specialisation) -> str:
    """The name that a specialisation's record has: its constants, and the code that a verdict is of."""
    return PREFIX + hashlib.sha256(f"{special}{_code()}".encode()).hexdigest()[:32]


@once
def _code() -> str:
    """A digest of the texts, and of what launches and checks them: with a fault in these mended, all is tried anew."""
    sha = hashlib.sha256()
    for path in sorted(path for path in FOLDER.iterdir() if path.suffix in KINDS):
        sha.update(path.name.encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()


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
