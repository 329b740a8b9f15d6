"""Drift detection: decide from a few timed calls whether a choice is still the fastest. Pure; it has no clock."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Final

from attention.core.results import Ratio
from attention.core.statistics import ratio_interval

TRY_SHARE: Final = 0.02
"""Share of all calls, and of their time, that may go to another candidate: a slow call counts as several."""
MAX_SAVED_TRIES: Final = 10.0
"""Maximum number of such calls that can be saved up while none is tried."""
CALLS_PER_SAMPLE: Final = 32
"""Calls between two timed ones."""
WINDOW: Final = 3
"""Number of timed calls in the running median."""
SLOWDOWN_THRESHOLD: Final = 1.1
"""Multiple of its usual time at which a call counts as slow and alternatives are tried."""
MIN_PAIRS: Final = 6
"""Minimum number of pairs for a decision."""
CONFIDENCE: Final = 0.9
"""Two-sided confidence of the interval; its lower end alone then holds with 95 %."""
MAX_KEPT_PAIRS: Final = 8
"""Number of latest pairs used: older ones may no longer hold."""
MAX_PAIRS: Final = 16
"""Pairs after which a candidate not found faster is given up."""
MIN_GAIN: Final = 0.03
"""Minimum certain gain before a switch, so that two equal candidates do not alternate."""
MAX_REST_FACTOR: Final = 2
"""Limit of the back-off between tries of a former choice, as a multiple of the pause that TRY_SHARE demands."""


class DriftDetector:
    """Follow the calls of one class.

    Attributes:
        challenger: the candidate being tried against the choice, or None.
        reason: why, in words.
        tried: calls that went to other candidates so far.
    """

    def __init__(self, others: Mapping[str, float], doubt: str = "") -> None:
        """Create it for the other candidates, best first, each with its time relative to the choice.

        A candidate more than MAX_SAVED_TRIES times as slow is never tried: one try would exceed the whole allowance.
        With a `doubt` (a reason in words), the others are tried from the beginning.
        """
        self._price = {name: max(1.0, price) for name, price in others.items()}
        self._others = [name for name, price in self._price.items() if price <= MAX_SAVED_TRIES]
        self._index = 0
        self._former = False
        self._rest = 1
        self._allowance = 0.0
        self._counted = 0
        self._usual_s: float | None = None
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._pairs: deque[float] = deque(maxlen=MAX_KEPT_PAIRS)
        self._pairs_ever = 0
        self.challenger: str | None = None
        self.reason = ""
        self.tried = 0
        if doubt:
            self._start_trying(doubt)

    @property
    def trying(self) -> bool:
        """Whether another candidate is being tried."""
        return self.challenger is not None

    def may_try(self, calls: int) -> bool:
        """Return whether one more call may go to the challenger after `calls` calls; if so, count it."""
        self._allowance = min(MAX_SAVED_TRIES, self._allowance + TRY_SHARE * max(0, calls - self._counted))
        self._counted = calls
        if self.challenger is None:
            return False
        price = min(MAX_SAVED_TRIES, self._rest * self._price[self.challenger])
        if self._allowance < price:
            return False
        self._allowance -= price
        self.tried += 1
        return True

    def observe(self, seconds: float) -> None:
        """Record the time of a call of the choice; ignored if the clock was set back meanwhile."""
        if not seconds > 0:
            return
        self._latest.append(seconds)
        if len(self._latest) < WINDOW or self.challenger is not None:
            return
        now = median(self._latest)
        if self._usual_s is None or now < self._usual_s:
            self._usual_s = now
        elif now > SLOWDOWN_THRESHOLD * self._usual_s:
            self._start_trying(f"its calls take {now / self._usual_s:.2f} times what they did")

    def reset_usual(self) -> None:
        """Reset the usual time of a call, when calls of another kind begin."""
        self._usual_s = None
        self._latest.clear()

    def compare(self, chosen_s: float, challenger_s: float) -> Ratio | None:
        """Record a pair of calls on the same inputs.

        Returns:
            The challenger's speedup if it is certainly faster; the choice should then be changed. Otherwise None.
        """
        if not (self.trying and chosen_s > 0 and challenger_s > 0):
            return None
        self._pairs.append(math.log(chosen_s / challenger_s))
        self._pairs_ever += 1
        if len(self._pairs) < MIN_PAIRS:
            return None
        middle, low, high = ratio_interval(self._pairs, CONFIDENCE)
        if low > math.log1p(MIN_GAIN):
            return Ratio(value=math.exp(middle), low=math.exp(low), high=math.exp(high), significant=True)
        if high < 0 or self._pairs_ever >= MAX_PAIRS:
            self._next_challenger()
        return None

    def on_switch(self, former: str) -> None:
        """Record a change of the choice; the former one is tried from time to time, since it may recover."""
        self._others = [former, *(name for name in self._others if name not in (former, self.challenger))]
        self._price[former] = 1.0
        self._former, self._rest = True, 1
        self.reset_usual()
        self._index = 0
        self._start_trying(f"{former} may have recovered")

    def leave_out(self, name: str) -> None:
        """Exclude a challenger that cannot run."""
        self._others = [other for other in self._others if other != name]
        self._stop_trying()

    def _start_trying(self, reason: str) -> None:
        self._pairs.clear()
        self._pairs_ever = 0
        self.challenger = self._others[self._index] if self._index < len(self._others) else None
        self.reason = reason

    def _next_challenger(self) -> None:
        """Go on to the next challenger; after the last, stop until there is a new reason."""
        self._index += 1
        if self._former and self._index:
            self._index = 0
            self._rest = min(MAX_REST_FACTOR, 2 * self._rest)
            self._start_trying(self.reason)
        elif self._index < len(self._others):
            self._start_trying(self.reason)
        else:
            self._stop_trying()

    def _stop_trying(self) -> None:
        self._index = 0
        self.challenger = None
        self.reset_usual()  # the current time becomes the usual one
