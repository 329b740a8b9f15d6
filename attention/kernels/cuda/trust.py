"""The check on first use: each specialisation once on small inputs against float64, the outcome kept with the code."""

import functools
from collections.abc import Callable
from importlib import metadata

from attention.errors import KernelUnavailable
from attention.kernels import cache
from attention.kernels.cuda.gpu import gpu
from attention.kernels.cuda.program import Program

_PASSED = "passed"
_BEGUN = "its check on first use did not come to an end"
_verdicts: dict[str, str] = {}
"""What the check of each key came to, for this process."""


def distrust(program: Program) -> str | None:
    """Why a program is not to be used on this GPU, if that is known."""
    verdict = _verdicts.get(program.key) or _kept(program)
    if verdict == _BEGUN and cache.is_locked(_lock_name(program)):
        return None  # another process is at it
    return None if verdict in (_PASSED, None) else verdict


def ensure(program: Program, check: Callable[[], str | None]) -> None:
    """Checks a program unless that has been done on this GPU before.

    Args:
        program: what the verdict is kept for.
        check: runs the kernel and returns what is wrong with its results, or None. Should it bring the process down,
            the next process finds that it was begun.

    Raises:
        KernelUnavailable: the check failed, now or before.
    """
    verdict = judged(program, check)
    if verdict:
        raise KernelUnavailable(f"{program.name}: {verdict}")


def judged(program: Program, check: Callable[[], str | None]) -> str | None:
    """The same, but returns the reason, or None if the program is right."""
    if program.key not in _verdicts:
        kept = _kept(program)
        _verdicts[program.key] = kept if kept and kept != _BEGUN else _judge(program, check)
    return None if _verdicts[program.key] == _PASSED else _verdicts[program.key]


def _judge(program: Program, check: Callable[[], str | None]) -> str:
    with cache.lock(_lock_name(program)):
        kept = _kept(program)  # another process may have been faster, or have come to grief
        if kept:
            return kept
        _keep(program, _BEGUN)
        try:
            verdict = check() or _PASSED
        except RuntimeError as error:  # MLX's, of a launch that failed
            verdict = str(error).splitlines()[0]
        _keep(program, verdict)
        return verdict


def _mark() -> str:
    """What a verdict holds for: GPU, driver, and the MLX that launches."""
    return f"{gpu().mark}, MLX {_mlx_version()}"


@functools.cache
def _mlx_version() -> str:
    return metadata.version("mlx")


def _lock_name(program: Program) -> str:
    """Not the key itself: compiling, which a check may have to do, takes that lock."""
    return f"{program.key}-check"


def _kept(program: Program) -> str | None:
    verdict = cache.read_record(program.key).get("checked", {}).get(_mark())
    return str(verdict) if verdict else None


def _keep(program: Program, verdict: str) -> None:
    record = cache.read_record(program.key)
    record["checked"] = {**record.get("checked", {}), _mark(): verdict}
    cache.write_record(program.key, record)
