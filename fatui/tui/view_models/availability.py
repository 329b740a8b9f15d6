"""The entries of the implementation picker: what each implementation would do with the workload."""

from collections.abc import Mapping

from msgspec import Struct, structs

from attention.core.route import Route
from attention.core.workload import Workload
from attention.implementations import CATALOGUE
from attention.measure.device import Device
from fatui import formatting
from fatui.draft import Draft
from fatui.tui.advisor import Advice


class PickerRow(Struct, frozen=True):
    """One implementation of the list."""

    name: str
    chosen: bool
    path: str
    """The path it would take, in a few words; "…" until it is known."""
    reason: str = ""
    """Why it would take that path, in a sentence."""
    able: bool = True
    """Whether it would run at all."""
    memory: str = ""
    """The memory that it is predicted to need above the inputs; after "≤" an upper bound."""
    time: str = ""
    """The time of a call, from earlier runs on this device; empty if there are none of its kind.

    After "~" it is extrapolated from calls of other sizes.
    """


class CallTime(Struct, frozen=True):
    """How long a call of an implementation takes."""

    seconds: float
    extrapolated: bool = False
    """Whether no call of this size was timed."""


WAITING = "…"
EXTRAPOLATED = "~"
"""Before a time that is scaled from that of a call of another size."""
TUNED = "tuned: "
"""Prefix of the path of an implementation that was tuned."""
UNTRIED = "not tried yet"
"""The path of an implementation that tunes itself, before its first trial."""


def names_for(draft: Draft) -> tuple[str, ...]:
    """Return the catalogue's names, and those of the user's own that are or were selected in the draft."""
    return tuple(dict.fromkeys([*(entry.name for entry in CATALOGUE), *draft.offered, *draft.implementations]))


def make_picker_rows(
    draft: Draft,
    workload: Workload | None,
    advice: Advice,
    paths_taken: dict[str, str] | None = None,
    times: Mapping[str, CallTime] | None = None,
) -> tuple[PickerRow, ...]:
    """Return one entry per implementation.

    Args:
        draft: the draft.
        workload: the workload shown, or None if there is none.
        advice: the advisor's answers.
        paths_taken: the paths that the latest run took on this workload.
        times: of a call of some implementations, from earlier runs.
    """
    made = [_picker_row(name, name in draft.implementations, workload, draft, advice) for name in names_for(draft)]
    known = times or {}
    made = [structs.replace(row, time=_time_text(known[row.name])) if row.name in known else row for row in made]
    return tuple(_with_trial(row, (paths_taken or {}).get(row.name)) for row in made)


def _time_text(time: CallTime) -> str:
    return f"{EXTRAPOLATED if time.extrapolated else ''}{formatting.seconds(time.seconds)}"


def _with_trial(row: PickerRow, took: str | None) -> PickerRow:
    """For an implementation that tunes itself, show the result of its last trial, or that the run will try."""
    if UNTRIED not in row.path:
        return row
    waiting = row.path.endswith(WAITING)
    path = f"{in_order(took)}, last run" if took else "tries them in the run"
    return structs.replace(row, path=f"{path} {WAITING}" if waiting else path)


def _picker_row(name: str, chosen: bool, workload: Workload | None, draft: Draft, advice: Advice) -> PickerRow:
    route = advice.answer.routes.get(name)
    problem = advice.problem or advice.answer.problems.get(name, "")
    if problem:
        return PickerRow(name, chosen, "not available", problem, able=False)
    if route is None or workload is None:
        summary = next((entry.summary for entry in CATALOGUE if entry.name == name), "")
        return PickerRow(name, chosen, WAITING if workload else "-", summary)
    path, able = availability(route, workload, advice.device, draft)
    memory = formatting.predicted_size(route) if route.supported and route.predicted_bytes is not None else ""
    return PickerRow(name, chosen, path if advice.current else f"{path} {WAITING}", route.reason, able, memory)


def availability(route: Route, workload: Workload, device: Device | None, draft: Draft) -> tuple[str, bool]:
    """Return the path or the obstacle as text, and whether it would run at all."""
    if not route.supported:
        return f"cannot: {route.reason}", False
    most = memory_limit(draft, device)
    if route.predicted_bytes is not None and most is not None:
        needed = route.predicted_bytes + workload.held_bytes
        if needed > most:
            return f"will not fit: {_of(formatting.size(needed), formatting.size(most))}", draft.force
    path = in_order(route.path)
    return path if "fused" in path or not route.fused else f"fused: {path}", True


def in_order(path: str) -> str:
    """Put the tuned choice first: "tuned: poc" becomes "poc, tuned"."""
    chosen = path.removeprefix(TUNED)
    return path if chosen == path else f"{chosen}, tuned"


def _of(needed: str, most: str) -> str:
    """Format a size and its limit, with a common unit once: "41 GiB of 22"."""
    number, _, unit = most.partition(" ")
    return f"{needed} of {number if needed.endswith(f' {unit}') else most}"


def needs_text(draft: Draft, advice: Advice) -> str:
    """Format the predicted memory of the selected ones: "needs above the inputs up to baseline 41 MiB, poc 7 MiB".

    It includes the output and all scratch memory, also per thread, of which a call may touch less.
    It is the largest of several cases; that of a single case stands beside the implementation.
    """
    answer = advice.answer
    sizes = {name: answer.largest[name] for name in draft.implementations if name in answer.largest}
    if not sizes:
        return "needs: not known yet"
    several = any(len(answer.needs[name]) > 1 for name in sizes)
    if not several:
        return ""
    text = ", ".join(f"{name} {formatting.size(size)}" for name, size in sizes.items())
    return f"needs above the inputs up to {text}"


def memory_limit(draft: Draft, device: Device | None) -> int | None:
    """Return the bytes available to a case."""
    return draft.memory_limit_bytes or (device.available_bytes if device else None)
