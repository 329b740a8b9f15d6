"""What is left of a run when a worker ends early: its running row fails, and the rest is assigned to another."""

import os
import signal
import tempfile
from collections.abc import Callable
from typing import Final

from msgspec import structs

from attention.core import events as on
from attention.core.errors import truncated
from attention.core.plan import Assignment
from attention.engine.record import AnyRecord

MAX_FRUITLESS: Final = 2
"""Workers in a row that end without any progress, after which a run is given up."""
RESTARTED: Final = "crashed the engine; it is restarted"
CUT: Final = "was running when the connection was cut; the engine is started again"
REGROUPED: Final = "ended the group of ranks; it is formed again"


def mark_file() -> int:
    """Create a file of one byte, in memory where possible: a full disk must not lose the mark."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("engine-mark")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def marked_name(mark: int, names: tuple[str, ...]) -> str | None:
    """Return the implementation that a worker was running; it writes its number, from 1, before each step."""
    number = int.from_bytes(os.pread(mark, 1, 0), "little")
    return names[number - 1] if number else None


def exit_reason(code: int, stderr: list[str]) -> str:
    """Return how a process ended, from its return code and its last lines."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({name}){hint}"
    last = next((line for line in reversed(stderr) if line.strip()), "")
    return f"the engine ended with code {code}" + (f": {truncated(last)}" if last else "")


def next_assignment(
    assignment: Assignment,
    record: AnyRecord,
    culprit: str | None,
    reason: str,
    dispatch: Callable[[on.AnyEvent], None],
    consequence: str = RESTARTED,
) -> Assignment | None:
    """Return the assignment of the next worker; None if no case is left.

    Args:
        assignment: that of the worker that ended.
        record: the run so far, in which a case has begun.
        culprit: the implementation that the worker was running; its row fails.
        reason: how the worker ended.
        dispatch: takes the events by which the row fails, and applies them to the record.
        consequence: what the culprit did and what follows, as the message says it.
    """
    case = record.current_case
    assert case is not None
    if record.cases[case].stopped_by is not None:
        case += 1
    elif culprit:
        if record.cases[case].rows[culprit].ended is None:
            dispatch(on.RowEnded(case=case, implementation=culprit, status="failed", reason=reason))
        dispatch(on.Message(level="info", text=f"{culprit} {consequence} without it"))
    if case == len(record.cases):
        return None
    rows = record.cases[case].rows.values()
    failed = tuple(row.implementation for row in rows if row.ended and row.ended.status == "failed")
    peaks = record.peaks if record.peaks.matmul_flops_per_s else None
    return structs.replace(assignment, first_case=case, skip={case: failed}, peaks=peaks)


def refusal(culprit: str | None, reason: str) -> on.RunRefused:
    """Return the event that gives a run up after MAX_FRUITLESS workers.

    Args:
        culprit: the implementation that the last one was running, if any.
        reason: how it ended.
    """
    what = f"implementation: '{culprit}' cannot be loaded" if culprit else "the engine cannot start"
    return on.RunRefused(kind="cannot start", reason=f"{what}: {reason}")
