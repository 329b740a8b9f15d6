"""Delivery of tuning events: to the listeners of a run if there are any, otherwise to Python's logging."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

from attention.core import events as on
from attention.core.results import Ratio

Listener = Callable[[on.TuningEvent | on.Message], None]
LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_listeners: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send all tuning events of this process to a listener instead of the log."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def emit(event: on.TuningEvent | on.Message) -> None:
    """Send an event to all listeners; without any, log it as a line to the logger `attention`."""
    for listener in _listeners:
        listener(event)
    if not _listeners:
        level = event.level if isinstance(event, on.Message) else "info"
        logging.getLogger("attention").log(LEVELS[level], "%s", log_line(event))


def log_line(event: on.TuningEvent | on.Message) -> str:
    """Return an event as a line of a log."""
    match event:
        case on.TrialStarted():
            return f"{event.implementation} tries {', '.join(event.candidates)} for {event.workload}"
        case on.Tuned():
            alone = "" if event.runner_up is None or event.ratio is None else _margin(event.ratio, event.runner_up)
            return (
                f"{event.implementation} takes {event.winner} for {event.workload}{alone}, after {event.seconds:.2g} s"
            )
        case on.Switched():
            change = f"{event.implementation} goes from {event.before} to {event.after} for {event.workload}"
            return f"{change}{_margin(event.ratio, event.before)}: {event.reason}"
        case on.Message():
            return event.text


def _margin(ratio: Ratio, other: str) -> str:
    return f", {ratio.value:.3g}x {other} ({ratio.low:.3g} to {ratio.high:.3g})"
