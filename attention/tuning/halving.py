"""Successive halving: all that stand a chance get some rounds, the better half more, the last two what it takes.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016; and as
in "Hoeffding races" (Maron and Moore, NIPS 1993) whoever is surely behind leaves at once, whoever is not stays.
The rounds are those of a run: interleaved, in an order that changes, samples of queued calls that are paired.
"""

import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Final

from msgspec import Struct

from attention.implementations.protocol import Runner
from attention.measure.clock import Clock, shared_calls
from attention.measure.rounds import Arm, Limits, run_rounds
from attention.report import Ratio
from attention.statistics import CONFIDENCE, SMALLEST_FLOOR, log_ratios, ratio_interval
from attention.tuning.sighting import SHORTEST_S, Sighting

SAMPLE_S: Final = 0.003
"""What a sample lasts at least: a call of less is queued several times, as running programs do."""
EXTENDED: Final = 3.0
"""How many times its budget a trial may take while the best two are not told apart and it would matter."""
LEAST_SHARE: Final = 0.5
"""Of the budget that is for rounds, though first looks used it all."""
IMMATERIAL: Final = SMALLEST_FLOOR
"""By how much the better of two may be faster without mattering."""
FEWEST: Final = 12
"""Rounds without which nobody is surely behind."""
LOOK_EVERY: Final = 4
"""Rounds between looks at who is behind."""
SURE: Final = 0.99
"""Confidence of being behind, or ahead, while there is time for more rounds: there are many looks."""
ALONE: Final = 9
"""Single calls of each, so that running programs, which are watched by such, are told apart from queues of calls."""


class Found(Struct, frozen=True, kw_only=True):
    """What came out."""

    call_s: dict[str, float]
    """Seconds a call of each candidate that ran, best first."""
    alone_s: dict[str, float] = {}
    """Seconds of a single call that is waited for, where calls were queued together."""
    pairs: list[float]
    """Logarithms of the runner-up's time over the winner's, sample by sample."""
    untried: list[str]
    """Those for which the time did not suffice."""
    failed: dict[str, str]
    """Those that raised, and what."""

    @property
    def ratio(self) -> Ratio | None:
        """How many times as fast as the runner-up the winner is; None where no two samples were paired."""
        if len(self.pairs) < 2:
            return None
        middle, low, high = ratio_interval(self.pairs)
        return Ratio(value=math.exp(middle), low=math.exp(low), high=math.exp(high), significant=low > 0)


class Halving:
    """One trial of some runners."""

    def __init__(self, budget_s: float, output_bytes: int, on_gpu: bool, clock: Clock) -> None:
        """Sets the limits; see Sighting.

        Args:
            budget_s: seconds of a trial, where the best two are told apart by then; EXTENDED times as many at most.
            output_bytes: what one call returns.
            on_gpu: whether it runs on a GPU.
            clock: in seconds.
        """
        self._sighting = Sighting(budget_s, output_bytes, on_gpu, clock)
        self._spent = self._sighting.spent
        self._budget_s = budget_s
        self._output_bytes = output_bytes
        self._clock = clock
        self._until_s = self._stage_s = self._stage_ends_s = 0.0

    def run(self, runners: Mapping[str, Runner]) -> Found:
        """Tries the runners, the most promising first.

        Raises:
            RuntimeError: none of them could be run.
        """
        seen = self._sighting.look(runners)
        raced = self._sighting.warm(seen, SAMPLE_S)
        self._race([*raced])
        failed = self._sighting.failed
        running = [arm for arm in seen if arm.name not in failed]
        order = _in_order([arm for arm in raced if arm in running] or running)
        rest = [arm for arm in running if arm not in order]
        if not order:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise RuntimeError(f"none of {', '.join(runners)} could be run: {reasons}")
        best_s = _call_s(order[0])
        behind = {arm.name: best_s * math.exp(_behind_by(arm, order[0])) for arm in order}
        known = {arm.name for arm in seen} | failed.keys()
        return Found(
            call_s=behind | {arm.name: arm.call_s for arm in sorted(rest, key=lambda arm: arm.call_s)},
            alone_s=self._alone(order),
            pairs=log_ratios(order[1].samples, order[0].samples) if len(order) > 1 else [],
            untried=[name for name in runners if name not in known],
            failed=failed,
        )

    def _race(self, arms: list[Arm]) -> None:
        """Takes rounds until one is left, or it does not matter which, or the time is up."""
        if len(arms) < 2 or self._spent.seconds >= EXTENDED * self._budget_s:
            return
        numbers = shared_calls([arm.call_s for arm in arms], SAMPLE_S, self._output_bytes)
        for arm, calls in zip(arms, numbers, strict=True):
            arm.calls = calls
        # Whatever first looks at hopeless ones took, those that stand a chance get their rounds.
        self._until_s = max(self._budget_s, self._spent.seconds + LEAST_SHARE * self._budget_s)
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
            failed=self._sighting.fail,
            after=after,
            clock=self._clock,
        )

    def _after_round(self, left: list[Arm]) -> str | None:
        """Takes out who is behind; says why to stop, if there is a reason."""
        if any(arm.samples[-1] <= 0 for arm in left):  # the clock was set back
            for arm in left:
                arm.samples.pop()
        over = self._spent.seconds >= self._until_s
        rounds = len(left[0].samples) if left else 0
        if rounds >= FEWEST and rounds % LOOK_EVERY == 0:
            self._take_out(left)
        if len(left) < 2:
            return "decided"
        looks = rounds >= 2 if over else rounds >= FEWEST and rounds % LOOK_EVERY == 0
        if looks and _at_stake(left, CONFIDENCE if over else SURE) <= IMMATERIAL:
            return "decided"
        return "time" if self._spent.seconds >= EXTENDED * self._budget_s else None

    def _take_out(self, left: list[Arm]) -> None:
        """Those that are surely behind; and when a stage is over those of the worse half that are behind at all."""
        ranked = _in_order(left)
        half = len(ranked)
        if self._spent.seconds >= self._stage_ends_s and len(left) > 2:
            self._stage_ends_s += self._stage_s
            half = math.ceil(half / 2)
        for place, arm in enumerate(ranked[1:], 1):
            _, low, _ = ratio_interval(log_ratios(arm.samples, ranked[0].samples), SURE if place < half else CONFIDENCE)
            if low > 0:
                left.remove(arm)

    def _alone(self, arms: list[Arm]) -> dict[str, float]:
        """What single calls take, where samples were of several."""
        several = [arm for arm in arms if arm.calls > 1 and arm.samples]
        took: dict[str, list[float]] = {arm.name: [] for arm in several}
        for _ in range(ALONE):
            for arm in several:
                seconds = self._sighting.tried(arm, lambda arm=arm: self._sighting.once(arm))  # type: ignore[misc]
                took[arm.name] += [] if seconds is None else [seconds]
        return {name: median(times) for name, times in took.items() if times}


def _in_order(arms: list[Arm]) -> list[Arm]:
    """The fastest first, by the rounds that they took together; then those that left, the last one first."""
    rounds = max((len(arm.samples) for arm in arms), default=0)
    if not rounds:
        return sorted(arms, key=lambda arm: arm.call_s)
    last = [arm for arm in arms if len(arm.samples) == rounds]
    usual = [fmean(math.log(arm.samples[n]) for arm in last) for n in range(rounds)]
    best = min(last, key=lambda arm: median(math.log(s) - u for s, u in zip(arm.samples, usual, strict=True)))
    return [best, *sorted((arm for arm in arms if arm is not best), key=lambda arm: _behind_by(arm, best))]


def _behind_by(arm: Arm, best: Arm) -> float:
    """Logarithm of how many times the best's time an arm takes."""
    pairs = log_ratios(arm.samples, best.samples)
    return median(pairs) if pairs else math.log(_call_s(arm) / _call_s(best))


def _call_s(arm: Arm) -> float:
    return max(median(arm.samples) if arm.samples else arm.call_s, SHORTEST_S)


def _at_stake(left: list[Arm], confidence: float) -> float:
    """By how much another may be faster than the best, as far as it cannot be excluded: 0.01 is 1 %."""
    best, *others = _in_order(left)
    lowest = min(ratio_interval(log_ratios(arm.samples, best.samples), confidence)[1] for arm in others)
    return math.expm1(max(0.0, -lowest))
