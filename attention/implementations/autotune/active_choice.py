"""The choice in use for one class: called, timed now and then, and replaced when another is faster."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import mlx.core as mx
from msgspec import Struct, field

from attention.core import events as on
from attention.implementations.autotune import tuning_events
from attention.implementations.autotune.drift_detector import LOOK_EVERY, MARGIN, Watch
from attention.implementations.autotune.store import Entry, WorkloadClass
from attention.implementations.autotune.trial import NAME
from attention.implementations.protocol import Implementation
from attention.measure.clock import Clock

SOON: Final = 4
"""Calls until the next check whether another candidate may be tried."""
UNDECIDED: Final = "its trial left open whether another is faster"
REST_S: Final = 0.005
"""Seconds between two timed calls: a wait for the device, some tens of microseconds, is then 1 % at most."""

Attempt = Callable[[Implementation], Any]
"""Runs a candidate once, evaluates and returns its result."""
Judge = Callable[[Implementation], tuple[float, str]]
"""Returns a candidate's error, and what is wrong with it."""


class Standing(Struct, eq=False, kw_only=True):
    """A choice and its statistics."""

    workload: WorkloadClass
    name: str
    call: Implementation
    rivals: dict[str, float]
    """The alternatives, best first, with their time in the trial relative to the choice."""
    watch: Watch
    hidden: dict[str, float] = field(default_factory=dict)
    """Logarithm of a call's time in a queue over its time alone; no entry where they are equal."""
    checked: set[str] = field(default_factory=set)
    """Candidates found accurate."""
    warm: set[str] = field(default_factory=set)
    """Candidates that ran in this process."""
    calls: int = 0
    look_at: int = LOOK_EVERY
    """Number of the next call that is not merely dispatched."""
    looked_s: float = -math.inf
    """Time of the latest observation, by the clock."""
    turn: bool = False
    """Which of the two goes first in the next pair."""

    def due(self, now_s: float) -> bool:
        """Return whether a call is to be observed; set when to check next."""
        trying = self.watch.trying
        self.look_at = self.calls + (SOON if trying else LOOK_EVERY)
        if 0 <= now_s - self.looked_s < REST_S or (trying and not self.watch.may_try(self.calls)):
            return False
        self.looked_s = now_s
        return True

    def time(self, attempt: Attempt, judge: Judge, candidates: Mapping[str, Implementation], clock: Clock) -> Any:
        """Make a call, timed or paired with one of the challenger; return the result of the choice."""
        if self.watch.challenger is None:
            started = clock()
            result = attempt(self.call)
            self.watch.observe(clock() - started)
            self.warm.add(self.name)
            self.look_at = self.calls + (SOON if self.watch.trying else LOOK_EVERY)
            return result
        return self.pair(self.watch.challenger, attempt, judge, candidates, clock)

    def pair(
        self,
        challenger: str,
        attempt: Attempt,
        judge: Judge,
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
        order = (self.name, challenger) if self.turn else (challenger, self.name)
        self.turn = not self.turn
        for name in order:
            started = clock()
            try:
                results[name] = attempt(candidates[name])
            except Exception as error:
                if name == self.name:
                    raise
                tuning_events.tell(on.Message(level="warning", text=f"{NAME}: {name} is not tried again: {error}"))
                self.watch.leave_out(name)
            took[name] = clock() - started
        if challenger not in results:
            return results[self.name]
        result = results[self.name]
        if challenger in self.warm:
            known = not queued and {self.name, challenger} <= self.hidden.keys()
            factor = math.exp(self.hidden[self.name] - self.hidden[challenger]) if known else 1.0
            self._settle(challenger, took, factor, judge, candidates)
        self.warm |= results.keys()
        return result

    def _settle(
        self,
        challenger: str,
        took: dict[str, float],
        factor: float,
        judge: Judge,
        candidates: Mapping[str, Implementation],
    ) -> None:
        reason = self.watch.reason
        ratio = self.watch.compare(took[self.name] * factor, took[challenger])
        if ratio is None:
            return
        if challenger not in self.checked:
            _, wrong = judge(candidates[challenger])
            if wrong:
                tuning_events.tell(
                    on.Message(level="warning", text=f"{NAME}: {challenger} is not taken: inaccurate: {wrong}")
                )
                self.watch.leave_out(challenger)
                return
            self.checked.add(challenger)
        before, self.name, self.call = self.name, challenger, candidates[challenger]
        self.rivals = {before: 1.0} | {name: price for name, price in self.rivals.items() if name != challenger}
        self.watch.changed(before)
        tuning_events.tell(
            on.Switched(
                implementation=NAME,
                workload=self.workload.label,
                before=before,
                after=challenger,
                ratio=ratio,
                reason=reason,
            )
        )


def standing_of(entry: Entry, candidates: Mapping[str, Implementation]) -> Standing:
    """Create the choice from a trial's result; alternatives are tried at once if the trial was undecided."""
    others = {
        name: seconds / entry.call_s[entry.winner]
        for name, seconds in entry.call_s.items()
        if name in candidates and name != entry.winner
    }
    return Standing(
        workload=entry.workload,
        name=entry.winner,
        call=candidates[entry.winner],
        rivals=others,
        watch=Watch(others, UNDECIDED if entry.low is not None and entry.low < 1 / (1 + MARGIN) else ""),
        hidden={name: math.log(entry.call_s[name] / alone) for name, alone in entry.alone_s.items()},
        checked={entry.winner},
    )


def heir(standing: Standing, workload: WorkloadClass, fit: Sequence[str]) -> Standing:
    """Inherit the choice of a neighbouring class, for calls that have outgrown it; alternatives are tried at once."""
    others = {name: price for name, price in standing.rivals.items() if name in fit}
    doubt = f"its lengths went from {standing.workload.label} to {workload.label}"
    return Standing(
        workload=workload,
        name=standing.name,
        call=standing.call,
        rivals=others,
        watch=Watch(others, doubt),
        hidden=standing.hidden,
        checked={standing.name},
    )


def evaluated(*arrays: mx.array | None) -> bool:
    """Evaluate the inputs of a call; return False if they are being traced and have no values."""
    try:
        mx.eval([array for array in arrays if array is not None])
    except (RuntimeError, ValueError):
        return False
    return True
