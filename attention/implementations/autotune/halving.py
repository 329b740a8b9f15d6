"""Successive halving: every plausible candidate gets some rounds, the better half more, the last two until decided.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016. As in
"Hoeffding races" (Maron and Moore, NIPS 1993), a candidate that is certainly slower leaves at once.
The rounds are those of a run: interleaved in changing order, with paired samples of queued calls.
"""

import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Final

from msgspec import Struct

from attention.core.results import Ratio
from attention.core.statistics import CONFIDENCE, MIN_FLOOR, log_ratios, ratio_interval
from attention.implementations.autotune.prescreen import MIN_TIME_S, Prescreen
from attention.measure.clock import Clock, Runner, shared_calls
from attention.measure.rounds import Arm, Limits, run_rounds

SAMPLE_S: Final = 0.003
"""Minimum length of a sample; shorter calls are queued several times, as running programs do."""
MAX_EXTENSION: Final = 3.0
"""Multiple of its budget that a trial may take while the best two are undecided and the difference may matter."""
MIN_ROUNDS_SHARE: Final = 0.5
"""Share of the budget guaranteed to the rounds, even if the prescreening used all of it."""
IMMATERIAL: Final = MIN_FLOOR
"""Relative difference between two candidates that does not matter."""
MIN_ROUNDS_TO_ELIMINATE: Final = 12
"""Minimum number of rounds before a candidate is eliminated."""
ROUNDS_PER_CHECK: Final = 4
"""Rounds between two eliminations."""
ELIMINATION_CONFIDENCE: Final = 0.99
"""Confidence of an elimination while there is time for more rounds; high, because there are many comparisons."""
SINGLE_CALLS: Final = 9
"""Single calls timed per candidate: drift detection in a program times single calls, not queues of them."""


class HalvingResult(Struct, frozen=True, kw_only=True):
    """The result of a trial."""

    call_s: dict[str, float]
    """Seconds per call of each candidate that ran, best first."""
    alone_s: dict[str, float] = {}
    """Seconds of a single call including the wait for it, for candidates whose samples were of several calls."""
    pairs: list[float]
    """Logarithms of the runner-up's time over the winner's, sample by sample."""
    untried: list[str]
    """Candidates for which the time did not suffice."""
    failed: dict[str, str]
    """Candidates that raised, and their errors."""

    @property
    def ratio(self) -> Ratio | None:
        """Speedup of the winner over the runner-up; None with fewer than two paired samples."""
        if len(self.pairs) < 2:
            return None
        middle, low, high = ratio_interval(self.pairs)
        return Ratio(value=math.exp(middle), low=math.exp(low), high=math.exp(high), significant=low > 0)


class Halving:
    """A trial of several runners."""

    def __init__(self, budget_s: float, output_bytes: int, on_gpu: bool, clock: Clock) -> None:
        """Set the limits; see Prescreen.

        Args:
            budget_s: seconds of a trial; at most MAX_EXTENSION times as many while the best two are undecided.
            output_bytes: size of the output of one call.
            on_gpu: whether it runs on a GPU.
            clock: in seconds.
        """
        self._prescreen = Prescreen(budget_s, output_bytes, on_gpu, clock)
        self._spent = self._prescreen.spent
        self._budget_s = budget_s
        self._output_bytes = output_bytes
        self._clock = clock
        self._until_s = self._stage_s = self._stage_ends_s = 0.0

    def run(self, runners: Mapping[str, Runner]) -> HalvingResult:
        """Run the trial; runners should come most promising first.

        Raises:
            RuntimeError: no runner could be run.
        """
        seen = self._prescreen.time_all(runners)
        raced = self._prescreen.warm_up_promising(seen, SAMPLE_S)
        self._race([*raced])
        failed = self._prescreen.failed
        running = [arm for arm in seen if arm.name not in failed]
        order = _ranked([arm for arm in raced if arm in running] or running)
        rest = [arm for arm in running if arm not in order]
        if not order:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise RuntimeError(f"none of {', '.join(runners)} could be run: {reasons}")
        best_s = _call_s(order[0])
        behind = {arm.name: best_s * math.exp(_log_slowdown(arm, order[0])) for arm in order}
        known = {arm.name for arm in seen} | failed.keys()
        return HalvingResult(
            call_s=behind | {arm.name: arm.call_s for arm in sorted(rest, key=lambda arm: arm.call_s)},
            alone_s=self._time_single_calls(order),
            pairs=log_ratios(order[1].samples, order[0].samples) if len(order) > 1 else [],
            untried=[name for name in runners if name not in known],
            failed=failed,
        )

    def _race(self, arms: list[Arm]) -> None:
        """Run rounds until one is left, the difference does not matter, or the time is up."""
        if len(arms) < 2 or self._spent.seconds >= MAX_EXTENSION * self._budget_s:
            return
        numbers = shared_calls([arm.call_s for arm in arms], SAMPLE_S, self._output_bytes)
        for arm, calls in zip(arms, numbers, strict=True):
            arm.calls = calls
        # Plausible candidates get their rounds, however long the prescreening of the others took.
        self._until_s = max(self._budget_s, self._spent.seconds + MIN_ROUNDS_SHARE * self._budget_s)
        self._stage_s = (self._until_s - self._spent.seconds) / math.ceil(math.log2(len(arms)))
        self._stage_ends_s = self._spent.seconds + self._stage_s
        latest = self._clock()

        def after(left: list[Arm]) -> str | None:
            nonlocal latest
            before, latest = latest, self._clock()
            self._spent.seconds += max(0.0, latest - before)
            return self._after_round(left)

        run_rounds(
            arms,
            Limits(seconds=math.inf, precision=0),
            seed=len(arms),
            before=lambda arm: None,
            failed=self._prescreen.fail,
            after=after,
            clock=self._clock,
        )

    def _after_round(self, left: list[Arm]) -> str | None:
        """Eliminate slower candidates; return the reason to stop, if there is one."""
        if any(arm.samples[-1] <= 0 for arm in left):  # the clock was set back
            for arm in left:
                arm.samples.pop()
        over = self._spent.seconds >= self._until_s
        rounds = len(left[0].samples) if left else 0
        if rounds >= MIN_ROUNDS_TO_ELIMINATE and rounds % ROUNDS_PER_CHECK == 0:
            self._eliminate(left)
        if len(left) < 2:
            return "decided"
        looks = rounds >= 2 if over else rounds >= MIN_ROUNDS_TO_ELIMINATE and rounds % ROUNDS_PER_CHECK == 0
        if looks and _possible_gain(left, CONFIDENCE if over else ELIMINATION_CONFIDENCE) <= IMMATERIAL:
            return "decided"
        return "time" if self._spent.seconds >= MAX_EXTENSION * self._budget_s else None

    def _eliminate(self, left: list[Arm]) -> None:
        """Eliminate the certainly slower; at the end of a stage also the probably slower of the worse half."""
        ranked = _ranked(left)
        half = len(ranked)
        if self._spent.seconds >= self._stage_ends_s and len(left) > 2:
            self._stage_ends_s += self._stage_s
            half = math.ceil(half / 2)
        for place, arm in enumerate(ranked[1:], 1):
            _, low, _ = ratio_interval(
                log_ratios(arm.samples, ranked[0].samples), ELIMINATION_CONFIDENCE if place < half else CONFIDENCE
            )
            if low > 0:
                left.remove(arm)

    def _time_single_calls(self, arms: list[Arm]) -> dict[str, float]:
        """Return the time of single calls, for candidates whose samples were of several."""
        several = [arm for arm in arms if arm.calls > 1 and arm.samples]
        took: dict[str, list[float]] = {arm.name: [] for arm in several}
        for _ in range(SINGLE_CALLS):
            for arm in several:
                seconds = self._prescreen.attempt(arm, lambda arm=arm: self._prescreen.time_call(arm))  # type: ignore[misc]
                took[arm.name] += [] if seconds is None else [seconds]
        return {name: median(times) for name, times in took.items() if times}


def _ranked(arms: list[Arm]) -> list[Arm]:
    """Sort by speed in the rounds taken together; then the eliminated ones."""
    rounds = max((len(arm.samples) for arm in arms), default=0)
    if not rounds:
        return sorted(arms, key=lambda arm: arm.call_s)
    last = [arm for arm in arms if len(arm.samples) == rounds]
    usual = [fmean(math.log(arm.samples[n]) for arm in last) for n in range(rounds)]
    best = min(last, key=lambda arm: median(math.log(s) - u for s, u in zip(arm.samples, usual, strict=True)))
    return [best, *sorted((arm for arm in arms if arm is not best), key=lambda arm: _log_slowdown(arm, best))]


def _log_slowdown(arm: Arm, best: Arm) -> float:
    """Return the logarithm of an arm's time over the best arm's."""
    pairs = log_ratios(arm.samples, best.samples)
    return median(pairs) if pairs else math.log(_call_s(arm) / _call_s(best))


def _call_s(arm: Arm) -> float:
    return max(median(arm.samples) if arm.samples else arm.call_s, MIN_TIME_S)


def _possible_gain(left: list[Arm], confidence: float) -> float:
    """Return by how much another arm may still be faster than the best, within the confidence; 0.01 is 1 %."""
    best, *others = _ranked(left)
    lowest = min(ratio_interval(log_ratios(arm.samples, best.samples), confidence)[1] for arm in others)
    return math.expm1(max(0.0, -lowest))
