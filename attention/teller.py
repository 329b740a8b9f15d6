"""What a worker says while it works: events, the mark of who is at work, and how long it will still take."""

import time
from collections.abc import Callable
from typing import Final

from attention import events as on
from attention.plan import AnyPlan

Emit = Callable[[on.AnyEvent], None]
TELL_EVERY_S: Final = 0.25
PREPARATION_SHARE: Final = 0.6
"""Time of a case before its rounds, as a share of theirs, until a case has been measured."""


class Teller:
    """The bench's voice.

    Attributes:
        emit: takes an event to whoever listens.
    """

    def __init__(self, plan: AnyPlan, first_case: int, emit: Emit, mark: Callable[[int], None]) -> None:
        """Takes the plan, the case to begin with, where events go, and where the number at work is marked."""
        self.emit = emit
        self._mark = mark
        self._numbers = {name: number for number, name in enumerate(plan.ordered, 1)}
        self._cases = len(plan.cases)
        self._case = self._first = first_case
        self._started = self._case_started = time.perf_counter()
        self._guess_s = plan.seconds * (1 + PREPARATION_SHARE)

    def begin(self, case: int) -> None:
        """Tells that a case begins."""
        self._case, self._case_started = case, time.perf_counter()
        self.emit(on.CaseStarted(case=case))

    def end(self, stopped_by: str) -> None:
        """Tells that the case is complete, and learns from it how long the others will take."""
        self.at_rest()
        self.emit(on.CaseDone(case=self._case, stopped_by=stopped_by))
        self._guess_s = (time.perf_counter() - self._started) / (self._case - self._first + 1)

    def at_work(self, name: str) -> None:
        """Marks who is at work, so that a death is laid at the right door."""
        self._mark(self._numbers[name])

    def at_rest(self) -> None:
        """Marks that nobody is at work."""
        self._mark(0)

    def step(self, name: str, step: on.Step) -> None:
        """Tells that an implementation begins a step of the case."""
        self.at_work(name)
        self.emit(on.StepStarted(case=self._case, implementation=name, step=step))
        self.progress(f"{name}: {step}")

    def say(self, text: str) -> None:
        """Tells something worth a line in the log."""
        self.emit(on.Message(level="info", text=text))

    def end_row(self, name: str, status: on.Ending, reason: str) -> None:
        """Tells that an implementation is out of the case."""
        self.emit(on.RowEnded(case=self._case, implementation=name, status=status, reason=reason))

    def progress(self, now: str, remaining_s: float | None = None) -> None:
        """Tells what runs now, and how far the run is; how long the case will still take, where that is known."""
        elapsed = time.perf_counter() - self._case_started
        if remaining_s is not None:
            self._guess_s = elapsed + remaining_s
        inside = min(elapsed / self._guess_s, 0.99)
        left = self._guess_s * (1 - inside + self._cases - self._case - 1)
        self.emit(on.Progress(done=(self._case + inside) / self._cases, remaining_s=left, now=now))

    @property
    def case(self) -> int:
        """The case that is being measured."""
        return self._case
