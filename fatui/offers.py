"""What each implementation would do with the workload, in the words of the picker."""

from msgspec import structs

from attention.device import Device
from attention.implementations import CATALOGUE
from attention.route import Route
from attention.workload import Workload
from fatui import figures
from fatui.advice import Advice
from fatui.draft import Draft
from fatui.widgets.implementation_picker import Offer

WAITING = "…"
TUNED = "tuned: "
"""How the path of one that chose by trying begins."""
UNTRIED = "not tried yet"
"""The path of an implementation that finds its way by trying, told by one that has not."""


def names_for(draft: Draft) -> tuple[str, ...]:
    """The catalogue, and those of the person's own that the draft has."""
    return tuple(dict.fromkeys([*(entry.name for entry in CATALOGUE), *draft.implementations]))


def make_offers(
    draft: Draft, workload: Workload | None, advice: Advice, took: dict[str, str] | None = None
) -> tuple[Offer, ...]:
    """One line for each implementation.

    Args:
        draft: what is set up.
        workload: the one that is shown, or None where there is none.
        advice: what the advisor told.
        took: the paths that the latest run took on this workload.
    """
    made = (_offer(name, name in draft.implementations, workload, draft, advice) for name in names_for(draft))
    return tuple(_with_trial(offer, (took or {}).get(offer.name)) for offer in made)


def _with_trial(offer: Offer, took: str | None) -> Offer:
    """Say of one that tries what its last trial came to, or that there will be one."""
    if UNTRIED not in offer.path:
        return offer
    waiting = offer.path.endswith(WAITING)
    path = f"{in_order(took)}, last run" if took else "tries them in the run"
    return structs.replace(offer, path=f"{path} {WAITING}" if waiting else path)


def _offer(name: str, chosen: bool, workload: Workload | None, draft: Draft, advice: Advice) -> Offer:
    route = advice.answer.routes.get(name)
    problem = advice.problem or advice.answer.problems.get(name, "")
    if problem:
        return Offer(name, chosen, "not available", problem, able=False)
    if route is None or workload is None:
        summary = next((entry.summary for entry in CATALOGUE if entry.name == name), "")
        return Offer(name, chosen, WAITING if workload else "-", summary)
    path, able = words(route, workload, advice.device, draft)
    return Offer(name, chosen, path if advice.current else f"{path} {WAITING}", route.reason, able)


def words(route: Route, workload: Workload, device: Device | None, draft: Draft) -> tuple[str, bool]:
    """What would happen, and whether it would run at all."""
    if not route.supported:
        return f"cannot: {route.reason}", False
    most = _memory(draft, device)
    if route.predicted_bytes is not None and most is not None:
        needed = route.predicted_bytes + workload.input_bytes
        if needed > most:
            return f"will not fit: {_of(figures.size(needed), figures.size(most))}", draft.force
    path = in_order(route.path)
    return path if "fused" in path or not route.fused else f"fused: {path}", True


def in_order(path: str) -> str:
    """The path of one that chose it by trying, with what it chose first: "tuned: poc" is "poc, tuned"."""
    chosen = path.removeprefix(TUNED)
    return path if chosen == path else f"{chosen}, tuned"


def _of(needed: str, most: str) -> str:
    """ "41 GiB of 22": the unit once where both have the same."""
    number, _, unit = most.partition(" ")
    return f"{needed} of {number if needed.endswith(f' {unit}') else most}"


def needs_text(draft: Draft, advice: Advice) -> str:
    """Predicted memory of the chosen ones above the inputs: "needs up to baseline 41 MiB, poc 7 MiB".

    It counts the output and all scratch, that of threads included, of which a call may touch less.
    Of several cases it is the largest's, and how many of them are beyond the memory here is said.
    """
    answer = advice.answer
    sizes = {name: answer.largest[name] for name in draft.implementations if name in answer.largest}
    if not sizes:
        return "needs: not known yet"
    several = any(len(answer.needs[name]) > 1 for name in sizes)
    text = ", ".join(f"{name} {figures.size(size)}" for name, size in sizes.items())
    most = _memory(draft, advice.device)
    beyond = {name: sum(size > most for size in answer.needs[name]) for name in sizes} if most and several else {}
    misfits = [f"{name} {count} of {len(answer.needs[name])}" for name, count in beyond.items() if count]
    fit = f"; cases that will not fit: {', '.join(misfits)}" if misfits else ""
    return f"needs up to {text}{fit}"


def _memory(draft: Draft, device: Device | None) -> int | None:
    """Bytes that a case may take."""
    return draft.memory_limit_bytes or (device.available_bytes if device else None)
