"""The choice in use for one class: called, timed now and then, and replaced when another is faster."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct, field

from attention.core import events as on
from attention.implementations.autotune.drift_detector import CALLS_PER_SAMPLE, MIN_GAIN, DriftDetector
from attention.implementations.autotune.store import TrialResult, WorkloadClass
from attention.implementations.autotune.trial import NAME
from attention.implementations.protocol import Implementation
from attention.measure.rounds import Clock

RETRY_CALLS: Final = 4
"""Calls until the next check whether another candidate may be tried."""
UNDECIDED_REASON: Final = "its trial left open whether another is faster"
MIN_CHECK_INTERVAL_S: Final = 0.005
"""Minimum seconds between two timed calls: a wait for an idle device, tens of microseconds, is then 1 % at most."""
WAIT_SHARE: Final = 0.01
"""Maximum share of the time that a choice may spend waiting for the inputs of its timed calls.

In a model they are results of what was queued before: the wait empties the queue, and the device is then idle until
the program has queued more."""
MAX_CHECK_INTERVAL_S: Final = 60.0
"""Maximum seconds between two timed calls: most of a wait of seconds is work that has to be done anyway."""

Attempt = Callable[[Implementation], Any]
"""Runs a candidate once, evaluates and returns its result."""
CheckAccuracy = Callable[[Implementation], tuple[float, str]]
"""Returns a candidate's error, and what is wrong with it."""


class ActiveChoice(Struct, eq=False, kw_only=True):
    """A choice and its statistics."""

    workload: WorkloadClass
    name: str
    call: Implementation
    alternatives: dict[str, float]
    """The alternatives, best first, with their time in the trial relative to the choice."""
    drift: DriftDetector
    queue_overlap: dict[str, float] = field(default_factory=dict)
    """Logarithm of a call's time in a queue over its time alone; no entry where they are equal."""
    checked: set[str] = field(default_factory=set)
    """Candidates found accurate."""
    warm: set[str] = field(default_factory=set)
    """Candidates that ran in this process."""
    calls: int = 0
    next_check: int = CALLS_PER_SAMPLE
    """Number of the next call that is not merely dispatched."""
    last_check_s: float = -math.inf
    """Time of the latest observation, by the clock."""
    pause_s: float = MIN_CHECK_INTERVAL_S
    """Minimum seconds from one observation to the next."""
    choice_first: bool = False
    """Which of the two goes first in the next pair."""

    def is_due(self, now_s: float) -> bool:
        """Return whether a call is to be observed; set when to check next."""
        trying = self.drift.trying
        self.next_check = self.calls + (RETRY_CALLS if trying else CALLS_PER_SAMPLE)
        if 0 <= now_s - self.last_check_s < self.pause_s or (trying and not self.drift.may_try(self.calls)):
            return False
        self.last_check_s = now_s
        return True

    def waited(self, seconds: float) -> None:
        """Record how long an observed call waited for its inputs, of which the time until the next one follows."""
        self.pause_s = min(max(MIN_CHECK_INTERVAL_S, seconds / WAIT_SHARE), MAX_CHECK_INTERVAL_S)

    def give_up(self, candidates: Mapping[str, Implementation], fallback: str) -> None:
        """Replace the choice by the best alternative for good, or by `fallback` if there is none."""
        self.name = next(iter(self.alternatives), fallback)
        self.drift.leave_out(self.name)
        self.call = candidates[self.name]
        self.alternatives = {name: price for name, price in self.alternatives.items() if name != self.name}

    def timed_call(
        self, attempt: Attempt, check_accuracy: CheckAccuracy, candidates: Mapping[str, Implementation], clock: Clock
    ) -> Any:
        """Make a call, timed or paired with one of the challenger; return the result of the choice."""
        if self.drift.challenger is None:
            started = clock()
            result = attempt(self.call)
            self.drift.observe(clock() - started)
            self.warm.add(self.name)
            self.next_check = self.calls + (RETRY_CALLS if self.drift.trying else CALLS_PER_SAMPLE)
            return result
        return self.timed_pair(self.drift.challenger, attempt, check_accuracy, candidates, clock)

    def timed_pair(
        self,
        challenger: str,
        attempt: Attempt,
        check_accuracy: CheckAccuracy,
        candidates: Mapping[str, Implementation],
        clock: Clock,
        queued: bool = False,
    ) -> Any:
        """Time the choice and a challenger one after the other, and switch if the challenger is faster.

        The time of a single call does not predict its time in a queue, least of all on a GPU: unless the attempts are
        of queued calls, the ratio is corrected by the trial's measurements of both.
        """
        took: dict[str, float] = {}
        results: dict[str, Any] = {}
        order = (self.name, challenger) if self.choice_first else (challenger, self.name)
        self.choice_first = not self.choice_first
        for name in order:
            started = clock()
            try:
                results[name] = attempt(candidates[name])
            except Exception as error:
                if name == self.name:
                    raise
                on.emit_tuning(on.Message(level="warning", text=f"{NAME}: {name} is not tried again: {error}"))
                self.drift.leave_out(name)
            took[name] = clock() - started
        if challenger not in results:
            return results[self.name]
        result = results[self.name]
        if challenger in self.warm:
            known = not queued and {self.name, challenger} <= self.queue_overlap.keys()
            factor = math.exp(self.queue_overlap[self.name] - self.queue_overlap[challenger]) if known else 1.0
            self._maybe_switch(challenger, took, factor, check_accuracy, candidates)
        self.warm |= results.keys()
        return result

    def _maybe_switch(
        self,
        challenger: str,
        took: dict[str, float],
        factor: float,
        check_accuracy: CheckAccuracy,
        candidates: Mapping[str, Implementation],
    ) -> None:
        reason = self.drift.reason
        ratio = self.drift.compare(took[self.name] * factor, took[challenger])
        if ratio is None:
            return
        if challenger not in self.checked:
            _, wrong = check_accuracy(candidates[challenger])
            if wrong:
                on.emit_tuning(
                    on.Message(level="warning", text=f"{NAME}: {challenger} is not taken: inaccurate: {wrong}")
                )
                self.drift.leave_out(challenger)
                return
            self.checked.add(challenger)
        before, self.name, self.call = self.name, challenger, candidates[challenger]
        self.alternatives = {before: 1.0} | {
            name: price for name, price in self.alternatives.items() if name != challenger
        }
        self.drift.on_switch(before)
        on.emit_tuning(
            on.Switched(
                implementation=NAME,
                workload=self.workload.label,
                before=before,
                after=challenger,
                ratio=ratio,
                reason=reason,
            )
        )


def active_choice_of(entry: TrialResult, candidates: Mapping[str, Implementation]) -> ActiveChoice:
    """Create the choice from a trial's result; alternatives are tried at once if the trial was undecided."""
    others = {
        name: seconds / entry.call_s[entry.winner]
        for name, seconds in entry.call_s.items()
        if name in candidates and name != entry.winner
    }
    return ActiveChoice(
        workload=entry.workload,
        name=entry.winner,
        call=candidates[entry.winner],
        alternatives=others,
        drift=DriftDetector(
            others, UNDECIDED_REASON if entry.low is not None and entry.low < 1 / (1 + MIN_GAIN) else ""
        ),
        queue_overlap={name: math.log(entry.call_s[name] / alone) for name, alone in entry.alone_s.items()},
        checked={entry.winner},
    )


def inherited_choice(neighbour: ActiveChoice, workload: WorkloadClass, fit: Sequence[str]) -> ActiveChoice:
    """Inherit the choice of a neighbouring class, for calls that have outgrown it; alternatives are tried at once."""
    others = {name: price for name, price in neighbour.alternatives.items() if name in fit}
    doubt = f"its lengths went from {neighbour.workload.label} to {workload.label}"
    return ActiveChoice(
        workload=workload,
        name=neighbour.name,
        call=neighbour.call,
        alternatives=others,
        drift=DriftDetector(others, doubt),
        queue_overlap=neighbour.queue_overlap,
        checked={neighbour.name},
    )
