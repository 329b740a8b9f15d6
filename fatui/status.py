"""The texts of the status line."""

from typing import TYPE_CHECKING, Final

from fatui import estimate, figures
from fatui.session import AnySession

if TYPE_CHECKING:
    from fatui.app import FatuiApp

SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def left_text(app: "FatuiApp") -> str:
    """Format what is set up and on which machine: "quick · AMD EPYC, 2 cores · MLX 0.32.4"."""
    parts = [app.session.preset or "unnamed" if app.session and app.session.active else app.draft.title()]
    advice = app.advice
    if advice.device is not None:
        device = advice.device
        parts += [f"{device.name}, {device.cores} cores" if device.backend == "cpu" else device.name]
        parts += [f"MLX {device.mlx}"] if device.mlx else []
    else:
        parts.append(advice.problem.splitlines()[0] if advice.problem else "probing the device")
    return " · ".join(parts)


def right_text(app: "FatuiApp") -> str:
    """Format the phase, the time, and the number of errors."""
    errors = app.journal.errors
    told = f" · {errors} error{'s' if errors > 1 else ''}, see the log" if errors else ""
    session, going = app.session, app.runs.going
    if going is not None and going is not session:
        left = estimate.left(going)
        return f"{going.plan.cases[0].model} runs{f' · {left.words}' if left else ''}{told}"
    if session is None:
        return f"{f'run {app.report.run.id} is open' if app.report else 'ready'}{told}"
    elapsed = figures.duration(session.elapsed_s)
    if not session.active:
        return f"{session.phase}, {elapsed}{told}"
    turn = SPINNER[int(session.elapsed_s * 2) % len(SPINNER)]
    if session.silent:
        return f"engine silent for {figures.duration(session.silent_s)}; {app.keys['stop']} stops it{told} {turn}"
    return f"{_phase(session)}{told} {turn}"


def _phase(session: AnySession) -> str:
    left = estimate.left(session)
    if session.phase != "running" or left is None:
        return f"{session.phase}, {figures.duration(session.elapsed_s)}"
    if session.building:
        return f"compiling {session.building} · {figures.duration(session.elapsed_s)}"
    many = len(session.plan.cases)
    case = f" case {(session.case_number or 0) + 1} of {many}" if many > 1 else ""
    return f"running{case} · {figures.duration(session.elapsed_s)} · {left.words}"
