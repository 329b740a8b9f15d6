"""Whether a choice still holds, judged from few of the calls it is made for: pure arithmetic, no clock of its own."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Final

from attention.report import Ratio
from attention.statistics import ratio_interval

SHARE: Final = 0.02
"""Of all calls, those that may go to another candidate; and of their time, since a slow one counts as several."""
SAVED: Final = 10.0
"""Such calls that quiet times may save up."""
LOOK_EVERY: Final = 32
"""Calls between two that are timed."""
WINDOW: Final = 3
"""Timed calls whose median counts."""
SLOWER: Final = 1.1
"""How many times its usual time a call may take before others are tried."""
FEWEST: Final = 6
"""Pairs without which nothing is decided."""
CONFIDENCE: Final = 0.9
"""Of the interval's two ends; that a candidate is faster, its lower end alone, is then 95 % sure."""
KEPT: Final = 8
"""Pairs that are looked at: the latest, so that what was true long ago does not count."""
MOST: Final = 16
"""Pairs after which a candidate that was not found better is given up."""
MARGIN: Final = 0.03
"""By how much a candidate must surely be faster, so that two equal ones do not take turns."""
LONGEST_REST: Final = 2
"""How many times longer than the share demands the pause between tries of a former choice may get."""


class Watch:
    """Follows the calls of one class.

    Attributes:
        challenger: who is tried against the choice at present, or None while nothing gives reason to.
        reason: why, in words.
        tried: calls that went to others so far.
    """

    def __init__(self, others: Mapping[str, float], doubt: str = "") -> None:
        """Takes the others, best first, each with how many times the choice's time it takes.

        One that takes more than SAVED times as long is never tried, since a try would cost more than all its share.
        A doubt, in words, has them tried from the beginning.
        """
        self._price = {name: max(1.0, price) for name, price in others.items()}
        self._others = [name for name, price in self._price.items() if price <= SAVED]
        self._index = 0
        self._former = False
        self._rest = 1
        self._allowance = 0.0
        self._counted = 0
        self._usual_s: float | None = None
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._pairs: deque[float] = deque(maxlen=KEPT)
        self._pairs_ever = 0
        self.challenger: str | None = None
        self.reason = ""
        self.tried = 0
        if doubt:
            self._doubt(doubt)

    @property
    def trying(self) -> bool:
        """Whether another candidate is being tried."""
        return self.challenger is not None

    def may_try(self, calls: int) -> bool:
        """Whether one more call may go to the challenger after so many calls; then it counts as gone there."""
        self._allowance = min(SAVED, self._allowance + SHARE * max(0, calls - self._counted))
        self._counted = calls
        if self.challenger is None:
            return False
        price = min(SAVED, self._rest * self._price[self.challenger])
        if self._allowance < price:
            return False
        self._allowance -= price
        self.tried += 1
        return True

    def observe(self, seconds: float) -> None:
        """Takes in what a call of the choice took; nothing where the clock was set back meanwhile."""
        if not seconds > 0:
            return
        self._latest.append(seconds)
        if len(self._latest) < WINDOW or self.challenger is not None:
            return
        now = median(self._latest)
        if self._usual_s is None or now < self._usual_s:
            self._usual_s = now
        elif now > SLOWER * self._usual_s:
            self._doubt(f"its calls take {now / self._usual_s:.2f} times what they did")

    def begin_anew(self) -> None:
        """Forgets what a call usually takes, when calls of another kind begin."""
        self._usual_s = None
        self._latest.clear()

    def compare(self, chosen_s: float, challenger_s: float) -> Ratio | None:
        """Takes in a pair of calls on the same inputs.

        Returns:
            How many times as fast the challenger is, if it is so surely; the choice is then to be changed.
        """
        if not (self.trying and chosen_s > 0 and challenger_s > 0):
            return None
        self._pairs.append(math.log(chosen_s / challenger_s))
        self._pairs_ever += 1
        if len(self._pairs) < FEWEST:
            return None
        middle, low, high = ratio_interval(self._pairs, CONFIDENCE)
        if low > math.log1p(MARGIN):
            return Ratio(value=math.exp(middle), low=math.exp(low), high=math.exp(high), significant=True)
        if high < 0 or self._pairs_ever >= MOST:
            self._give_up()
        return None

    def changed(self, former: str) -> None:
        """The choice was changed; the former one is tried from time to time, since it may recover."""
        self._others = [former, *(name for name in self._others if name not in (former, self.challenger))]
        self._price[former] = 1.0
        self._former, self._rest = True, 1
        self.begin_anew()
        self._index = 0
        self._doubt(f"{former} may have recovered")

    def leave_out(self, name: str) -> None:
        """A challenger that cannot run is never tried again."""
        self._others = [other for other in self._others if other != name]
        self._calm()

    def _doubt(self, reason: str) -> None:
        self._pairs.clear()
        self._pairs_ever = 0
        self.challenger = self._others[self._index] if self._index < len(self._others) else None
        self.reason = reason

    def _give_up(self) -> None:
        """Goes on to the next challenger; after the last, rests until there is a new reason."""
        self._index += 1
        if self._former and self._index:
            self._index = 0
            self._rest = min(LONGEST_REST, 2 * self._rest)
            self._doubt(self.reason)
        elif self._index < len(self._others):
            self._doubt(self.reason)
        else:
            self._calm()

    def _calm(self) -> None:
        self._index = 0
        self.challenger = None
        self.begin_anew()  # what it takes now is what it takes
