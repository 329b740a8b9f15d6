"""Successive halving: every plausible candidate gets some rounds, the better half more, the last two until decided.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016. As in
"Hoeffding races" (Maron and Moore, NIPS 1993), a candidate that is certainly slower leaves at once. A prescreen calls
each candidate once or twice first, so that rounds are spent only on plausible ones. The rounds are those of a run:
interleaved in changing order, with paired samples of queued calls.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean, median
from typing import Final, TypeVar

from msgspec import Struct

from attention.core.results import Ratio
from attention.core.statistics import CONFIDENCE, MIN_FLOOR, log_ratios, ratio_interval
from attention.measure.rounds import Arm, Clock, Limits, Runner, run_rounds, shared_calls, take_sample, warm_up

MAX_SLOWDOWN: Final = 4.0
"""Candidates slower than this multiple of the best in the prescreening are not timed further."""
WARM_CALLS: Final = 3
"""Number of warm calls, of which the fastest counts: slower ones are due to other load on the processor."""
MAX_CHEAP_S: Final = 0.005
"""A call longer than this is not repeated: it is costly, and disturbances matter less to it."""
MIN_WARM_UP_S: Final = {True: 0.02, False: 0.002}
"""Seconds of warm-up per candidate, on a GPU (True) and on a CPU (False)."""
MIN_TIME_S: Final = 1e-9
"""Stands for a time that is not positive because the clock was set back."""
R = TypeVar("R")


class TimeBudget:
    """Time used by a trial, by a clock that may be set back meanwhile."""

    def __init__(self, clock: Clock) -> None:
        """Start at zero."""
        self.seconds = 0.0
        self._clock = clock

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count the time of the block."""
        started = self._clock()
        try:
            yield
        finally:
            self.seconds += max(0.0, self._clock() - started)


class Prescreen:
    """Call candidates for the first time.

    Attributes:
        spent: time used, as far as it counts against the budget.
        failed: candidates that raised, and their errors.
    """

    def __init__(self, budget_s: float, output_bytes: int, on_gpu: bool, clock: Clock) -> None:
        """Set the limits.

        Args:
            budget_s: seconds after which no further candidate is called, once one has run.
            output_bytes: size of the output of one call.
            on_gpu: on a GPU the first call compiles kernels, is not representative and does not count against the
                budget; samples follow an untimed one of the same length.
            clock: in seconds.
        """
        self.spent = TimeBudget(clock)
        self.failed: dict[str, str] = {}
        self._budget_s = budget_s
        self._output_bytes = output_bytes
        self._on_gpu = on_gpu
        self._clock = clock

    def time_all(self, runners: Mapping[str, Runner]) -> list[Arm]:
        """Call each runner until the time is up; return those that ran, with their time per call."""
        seen: list[Arm] = []
        for name, runner in runners.items():
            if seen and self.spent.seconds >= self._budget_s:
                break
            arm = Arm(name=name, runner=runner, call_s=math.inf, lead_in=self._on_gpu, clock=self._clock)
            best = min((each.call_s for each in seen), default=math.inf)
            if self.attempt(arm, lambda arm=arm, best=best: self._time_first_calls(arm, best)) is not None:  # type: ignore[misc]
                seen.append(arm)
        return seen

    def warm_up_promising(self, arms: list[Arm], sample_s: float) -> list[Arm]:
        """Warm up the plausible candidates and measure their time per call in a queue.

        The time of a single short call, which includes the wait for it, predicts that poorly: short ones are dropped
        only after this.
        """
        plausible = _promising(arms, sample_s)
        for arm in plausible:
            if arm.call_s < sample_s:
                self.attempt(arm, lambda arm=arm: self._warm_up(arm, sample_s))  # type: ignore[misc]
        return _promising([arm for arm in plausible if arm.name not in self.failed])

    def attempt(self, arm: Arm, call: Callable[[], R]) -> R | None:
        """Run something with a candidate; None if it raises, and the error is recorded."""
        try:
            return call()
        except Exception as error:  # a candidate that cannot run is out, whatever it raises
            self.fail(arm, error)
            return None

    def fail(self, arm: Arm, error: BaseException) -> None:
        """Record that a candidate raised."""
        self.failed[arm.name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def _time_first_calls(self, arm: Arm, best: float) -> bool:
        """Time a cold call, and warm ones while they are cheap or the candidate is still plausible."""
        before = self.spent.seconds
        arm.call_s = self.time_call(arm)
        if self._on_gpu:
            self.spent.seconds = before
            arm.call_s = self.time_call(arm)
        for number in range(WARM_CALLS):
            costly = arm.call_s > MAX_CHEAP_S and (number > 0 or arm.call_s > MAX_SLOWDOWN * best)
            if costly or self.spent.seconds + arm.call_s >= self._budget_s:
                break
            arm.call_s = min(arm.call_s, self.time_call(arm))
        return True

    def time_call(self, arm: Arm) -> float:
        """Return the seconds of a single call, the wait for it included."""
        with self.spent.measure():
            return max(take_sample(arm.runner, 1, self._clock), MIN_TIME_S)

    def _warm_up(self, arm: Arm, sample_s: float) -> bool:
        min_s = MIN_WARM_UP_S[self._on_gpu]
        with self.spent.measure():
            # warm_up takes samples of half the length
            took = warm_up(arm.runner, arm.call_s, min_s, 2 * sample_s, self._output_bytes, self._clock)
        arm.call_s = max(took, MIN_TIME_S)
        return True


def _promising(arms: list[Arm], cheap_s: float = 0.0) -> list[Arm]:
    """Return the candidates close to the best, and those cheap enough to time again."""
    best = min((arm.call_s for arm in arms), default=0.0)
    return [arm for arm in arms if arm.call_s <= MAX_SLOWDOWN * best or arm.call_s < cheap_s]


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
        raced_s = {arm.name: best_s * math.exp(_log_slowdown(arm, order[0])) for arm in order}
        known = {arm.name for arm in seen} | failed.keys()
        return HalvingResult(
            call_s=raced_s | {arm.name: arm.call_s for arm in sorted(rest, key=lambda arm: arm.call_s)},
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
        is_checked = rounds >= 2 if over else rounds >= MIN_ROUNDS_TO_ELIMINATE and rounds % ROUNDS_PER_CHECK == 0
        if is_checked and _possible_gain(left, CONFIDENCE if over else ELIMINATION_CONFIDENCE) <= IMMATERIAL:
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
