"""A trial: successive halving among the candidates, the winner's accuracy, and the entry stored of both."""

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from attention import events as on
from attention.device import Device
from attention.implementations.protocol import Implementation
from attention.measure.clock import Clock
from attention.report import Ratio
from attention.tuning import news
from attention.tuning.halving import Found, Halving
from attention.tuning.store import Entry, code_now
from attention.tuning.task import BoundCall, Check, Task
from attention.tuning.workload_class import WorkloadClass

NAME: Final = "demo"


class Trial:
    """A trial of candidates on a task."""

    def __init__(
        self,
        workload: WorkloadClass,
        task: Task,
        *,
        budget_s: float,
        device: Device,
        clock: Clock,
        now: Callable[[], datetime],
    ) -> None:
        """Create a trial for a class, with a task of that class and the limits."""
        self._class = workload
        self._task = task
        self._clock = clock
        self._now = now
        self._halving = Halving(budget_s, task.workload.output_bytes, device.backend != "cpu", clock)

    def run(self, candidates: Mapping[str, Implementation]) -> Entry:
        """Find the fastest accurate candidate; events report start, end, and which candidates dropped out and why.

        Raises:
            RuntimeError: no candidate could be run.
        """
        news.tell(on.TrialStarted(implementation=NAME, workload=self._class.label, candidates=list(candidates)))
        started = self._clock()
        found = self._halving.run({name: BoundCall(each, self._task) for name, each in candidates.items()})
        for name, reason in found.failed.items():
            self._warn(f"{name} is out for {self._class.label}: {reason}")
        winner, error, inaccurate = self._accurate(found, candidates)
        entry = self._entry(found, winner, error, inaccurate)
        news.tell(
            on.Tuned(
                implementation=NAME,
                workload=self._class.label,
                winner=winner,
                runner_up=entry.runner_up,
                ratio=ratio_of(entry),
                seconds=max(0.0, self._clock() - started),
            )
        )
        return entry

    def _accurate(self, found: Found, candidates: Mapping[str, Implementation]) -> tuple[str, float, list[str]]:
        """Return the first accurate candidate, its error, and the inaccurate ones; or the least wrong."""
        check = Check(self._task)
        errors: dict[str, float] = {}
        for name in found.call_s:
            error, wrong = check.error(candidates[name])
            if not wrong:
                return name, error, list(errors)
            errors[name] = error if math.isfinite(error) else math.inf
            self._warn(f"{name} is out for {self._class.label}: inaccurate: {wrong}")
        least = min(errors, key=lambda name: errors[name])
        self._warn(f"no candidate is accurate for {self._class.label}; {least} is the least wrong")
        return least, errors[least], [name for name in errors if name != least]

    def _entry(self, found: Found, winner: str, error: float, inaccurate: list[str]) -> Entry:
        first = next(iter(found.call_s)) == winner
        ratio = found.ratio if first else None
        call_s = {winner: found.call_s[winner]} | {
            name: seconds for name, seconds in found.call_s.items() if name not in inaccurate
        }
        return Entry(
            winner=winner,
            tuned=self._now(),
            ratio=ratio.value if ratio else None,
            low=ratio.low if ratio else None,
            high=ratio.high if ratio else None,
            max_error=error if math.isfinite(error) else None,
            untried=[*found.untried, *found.failed, *inaccurate],
            call_s=call_s,
            alone_s={name: seconds for name, seconds in found.alone_s.items() if name in call_s},
            made_with=code_now(),
            workload=self._class,
        )

    @staticmethod
    def _warn(text: str) -> None:
        news.tell(on.Message(level="warning", text=f"{NAME}: {text}"))


def ratio_of(entry: Entry) -> Ratio | None:
    """Return the winner's speedup over the runner-up, with its interval."""
    if entry.ratio is None or entry.low is None or entry.high is None:
        return None
    return Ratio(value=entry.ratio, low=entry.low, high=entry.high, significant=entry.low > 1)
