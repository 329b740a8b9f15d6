"""Successive halving: all that run get a short look, the better half a longer one, the last two the rest.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
"""

import math
import random
from collections.abc import Callable
from statistics import median
from typing import Final

from msgspec import Struct, field

from attention.implementations.protocol import Runner
from attention.measure.clock import calls_for
from attention.report import Ratio
from attention.statistics import log_ratios, ratio_interval

SAMPLE_S: Final = 0.003
"""What a sample lasts at least: a call of less is queued several times, as running programs do."""
HOPELESS: Final = 4.0
"""How many times the best a candidate may have taken on first sight to be timed further."""
BEHIND: Final = 1.5
"""The same once samples were taken."""
LEAST_PAIRS: Final = 3

Clock = Callable[[], float]


class Contender(Struct, eq=False):
    """A candidate with what it took so far, in seconds a call."""

    name: str
    runner: Runner
    sighted_s: float = math.inf
    samples: list[float] = field(default_factory=list)
    round: int = 0
    """The round in which the samples were taken; those of one round are paired."""

    @property
    def call_s(self) -> float:
        """What a call takes, as far as is known."""
        return median(self.samples) if self.samples else self.sighted_s


class Found(Struct, frozen=True, kw_only=True):
    """What came out."""

    call_s: dict[str, float]
    """Seconds a call of each candidate that ran, best first."""
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

    def __init__(self, budget_s: float, output_bytes: int, cold_tells: bool, clock: Clock) -> None:
        """Sets the limits.

        Args:
            budget_s: seconds after which no further call begins, once one candidate has been seen.
            output_bytes: what one call returns.
            cold_tells: whether a first call shows how fast a candidate is; not where it compiles or makes plans.
                Then first calls are outside of the budget too.
            clock: in seconds.
        """
        self._budget_s = budget_s
        self._output_bytes = output_bytes
        self._cold_tells = cold_tells
        self._clock = clock
        self._spent = 0.0
        self._failed: dict[str, str] = {}

    def run(self, runners: dict[str, Runner]) -> Found:
        """Tries the runners, the most promising first.

        Raises:
            RuntimeError: none of them could be run.
        """
        seen = self.look(runners)
        last = self._halved(seen)
        order = last + sorted((each for each in seen if each not in last), key=lambda each: each.call_s)
        order = [each for each in order if each.name not in self._failed]
        if not order:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._failed.items())
            raise RuntimeError(f"none of {', '.join(runners)} could be run: {reasons}")
        paired = len(order) > 1 and order[0].round == order[1].round
        return Found(
            call_s={each.name: each.call_s for each in order},
            pairs=log_ratios(order[1].samples, order[0].samples) if paired else [],
            untried=[name for name in runners if name not in self._failed and all(name != e.name for e in seen)],
            failed=self._failed,
        )

    def look(self, runners: dict[str, Runner]) -> list[Contender]:
        """Takes a first look at each, until the time is up."""
        seen: list[Contender] = []
        for name, runner in runners.items():
            if seen and self._spent >= self._budget_s:
                break
            contender = Contender(name, runner)
            if self._sight(contender, min((each.sighted_s for each in seen), default=math.inf)):
                seen.append(contender)
        return seen

    def _sight(self, contender: Contender, best: float) -> bool:
        """Takes a first look: a cold call, and a warm one where the cold one may not tell or leaves hope."""
        cold = self._timed(contender, 1, charged=self._cold_tells)
        if cold is None:
            return False
        contender.sighted_s = cold
        if not self._cold_tells or (cold <= HOPELESS * best and self._spent + cold < self._budget_s):
            warm = self._timed(contender, 1)
            if warm is None:
                return False
            contender.sighted_s = min(warm, cold)
        return True

    def _halved(self, seen: list[Contender]) -> list[Contender]:
        """Samples the survivors until two are left, or one, and the time is up; best first."""
        best = min((each.sighted_s for each in seen), default=0.0)
        left = [each for each in seen if each.sighted_s <= HOPELESS * best]
        draw = random.Random(len(seen))
        while True:
            rounds = max(1, math.ceil(math.log2(max(1, len(left)))))
            self._sample(left, (self._budget_s - self._spent) / rounds, draw)
            left.sort(key=lambda each: each.call_s)
            if len(left) <= 2:
                return left
            limit = BEHIND * left[0].call_s
            left = [each for each in left[: math.ceil(len(left) / 2)] if each.call_s <= limit]

    def _sample(self, contenders: list[Contender], seconds: float, draw: random.Random) -> None:
        """Takes rounds of one sample of each in a new order; they start anew, so that all their samples are paired."""
        contenders[:] = [each for each in contenders if each.name not in self._failed]
        if len(contenders) < 2:
            return
        for each in contenders:
            each.samples = []
            each.round += 1
        calls = calls_for(min(each.call_s for each in contenders), SAMPLE_S, self._output_bytes)
        until = self._spent + seconds
        done = 0
        while self._spent < until or (done < LEAST_PAIRS and self._spent < self._budget_s):
            for each in draw.sample(contenders, len(contenders)):
                taken = self._timed(each, calls)
                if taken is None:
                    contenders.remove(each)
                else:
                    each.samples.append(taken)
            done += 1

    def _timed(self, contender: Contender, calls: int, charged: bool = True) -> float | None:
        """Seconds of a call when some are queued together; None where it raises, which is remembered."""
        started = self._clock()
        try:
            contender.runner.wait([contender.runner.queue() for _ in range(calls)])
        except Exception as error:  # a candidate that cannot run is out, whatever it says
            self._failed[contender.name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return None
        taken = max(self._clock() - started, 1e-9)  # a clock that was set back says nothing
        self._spent += taken if charged else 0.0
        return taken / calls
