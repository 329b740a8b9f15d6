"""The check on first use: each specialisation once, on small inputs against float64, before anything is made with it.

What it came to is kept with GPU, macOS and MLX in the cache folder, so that a new system or a new text is checked anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache as once
from typing import Any, Final

from attention.errors import KernelUnavailable
from attention.kernels import cache
from attention.kernels.metal.call import Specialisation
from attention.kernels.metal.machine import mark

PASSED: Final = "passed"
BEGUN: Final = "its check on first use did not come to an end"
LONGEST: Final = 8000
"""Characters of an error that are kept."""
PREFIX: Final = "metal-"
TEXTS: Final = ("common", "forward", "join", "backward_query", "backward_key")
_verdicts: dict[tuple[str, str], str] = {}
"""What the check of each key came to on this machine, for this process."""


@once
def key_of(special: Specialisation) -> str:
    """The name that a specialisation's record has: its constants, and every text that may be in it."""
    from attention.kernels.metal.launch import source

    made = hashlib.sha256(repr(special).encode())
    for text in TEXTS:
        made.update(source(text).encode())
    return PREFIX + made.hexdigest()[:32]


def distrust(special: Specialisation) -> str | None:
    """Why a specialisation is not to be used on this machine, in one line, if that is known."""
    verdict = _verdict(special)
    if verdict == BEGUN and cache.is_locked(f"{key_of(special)}-check"):
        return None  # another process is at it
    return None if verdict in (PASSED, None) else f"{special.name}: {headline(verdict)}"


def is_trusted(special: Specialisation) -> bool:
    """Whether a specialisation has shown on this machine that it is right."""
    return _verdict(special) == PASSED


def ensure(special: Specialisation, check: Callable[[], str | None]) -> None:
    """Checks a specialisation unless that has been done on this machine before.

    Args:
        special: what the verdict is kept for.
        check: runs the kernel and returns what is wrong with its results, or None. Should it bring the process down,
            the next process finds that it was begun.

    Raises:
        KernelUnavailable: the check failed, now or before.
    """
    verdict = _verdict(special)
    if verdict is None or verdict == BEGUN:
        verdict = _judge(special, check)
    if verdict != PASSED:
        raise KernelUnavailable(f"{special.name}: {headline(verdict)}")


def headline(verdict: str) -> str:
    """The line of an error that says most: the compiler's own, where there is one."""
    lines = [line.strip() for line in verdict.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "an error without a text")


def records() -> Iterator[dict[str, Any]]:
    """What is known of every specialisation that was ever checked here, for a report."""
    for path in sorted(cache.folder().glob(f"{PREFIX}*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            yield record


def forget() -> None:
    """Forgets what this process knows; the records stay."""
    _verdicts.clear()


def _verdict(special: Specialisation) -> str | None:
    key = (key_of(special), mark())
    if key not in _verdicts:
        kept: str | None = cache.read_record(key[0]).get("checked", {}).get(key[1])
        if kept is None or kept == BEGUN:
            return kept  # it may come to an end yet, here or in another process
        _verdicts[key] = kept
    return _verdicts[key]


def _judge(special: Specialisation, check: Callable[[], str | None]) -> str:
    with cache.lock(f"{key_of(special)}-check"):
        kept = _verdict(special)  # another process may have been faster, or have come to grief
        if kept:
            return kept
        _keep(special, BEGUN)
        try:
            verdict = check() or PASSED
        except (RuntimeError, ValueError) as error:  # MLX's, of a text that Metal does not take or a launch that fails
            verdict = str(error)[:LONGEST] or type(error).__name__
        _keep(special, verdict)
        _verdicts[key_of(special), mark()] = verdict
        return verdict


def _keep(special: Specialisation, verdict: str) -> None:
    key = key_of(special)
    record = cache.read_record(key)
    checked = {**record.get("checked", {}), mark(): verdict}
    cache.write_record(key, {"name": special.name, "checked": checked})
