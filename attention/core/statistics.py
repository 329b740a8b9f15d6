"""Confidence intervals of medians and of paired and unpaired ratios, and their significance."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, median
from typing import Final

from attention.core.results import MIN_ROUNDS, Interval, NoiseFloor, Ratio

CONFIDENCE: Final = 0.95
FLOOR_CONFIDENCE: Final = 0.99
"""Confidence of the noise floor, higher because a difference must lie outside it to be significant."""
MIN_FLOOR: Final = 0.005
"""Smallest relative difference that can be significant: code and data alignment alone cause as much."""


def student_t(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution for a probability above 0.5.

    Hill, "Algorithm 396: Student's t-quantiles", CACM 13 (1970); exact forms for one and two degrees of freedom, and
    between these a quantile that is up to 5 % too large.
    """
    tail = 2 * (1 - probability)
    if freedom <= 1:
        return 1 / math.tan(tail * math.pi / 2)
    if freedom == 2:
        return math.sqrt(2 / (tail * (2 - tail)) - 2)
    if freedom < 2:  # Welch's, of two samples each; the logarithm is nearly linear in 1 / freedom
        of_1, of_2 = student_t(probability, 1), student_t(probability, 2)
        return float(of_2 * (of_1 / of_2) ** (2 / freedom - 1))
    a = 1 / (freedom - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * freedom
    y = (d * tail) ** (2 / freedom)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(tail / 2)
        y = x * x
        if freedom < 5:
            c += 0.3 * (freedom - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        inner = 1 / (((freedom + 6) / (freedom * y) - 0.089 * d - 0.822) * (freedom + 2) * 3)
        y = ((inner + 0.5 / (freedom + 4)) * y - 1) * (freedom + 1) / (freedom + 2) + 1 / y
    return math.sqrt(freedom * y)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of a mean by Student's t, 95 % by default; for two values or more."""
    half = student_t((1 + confidence) / 2, len(values) - 1) * math.sqrt(_variance(values) / len(values))
    return fmean(values) - half, fmean(values) + half


def log_ratios(reference: Sequence[float], times: Sequence[float]) -> list[float]:
    """Return the logarithms of reference time over time, round by round; above 0 is faster than the reference.

    A round without a sample of either is NaN there and gives no pair.
    """
    return list(map(math.log, [a / b for a, b in zip(reference, times, strict=False) if a == a and b == b]))


def ratio_interval(logs: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return middle, low and high of paired log ratios: the median with its order-statistic interval.

    A shared machine alternates between fast and slow phases, and pairs that straddle a change are outliers on either
    side: they move a mean but not the median, whose interval makes no assumption about the distribution. If there are
    too few pairs for such an interval (but at least two), the mean and Student's t are used.
    """
    if 2 * 0.5 ** len(logs) > 1 - confidence:
        return fmean(logs), *mean_interval(logs, confidence)
    return _median_bounds(logs, confidence)


def noise_floor(reference: Sequence[float], again: Sequence[float]) -> NoiseFloor | None:
    """Return the reference against itself with a 99 % interval, or None for fewer than MIN_ROUNDS rounds."""
    logs = log_ratios(reference, again)
    if len(logs) < MIN_ROUNDS:
        return None
    middle, low, high = ratio_interval(logs, FLOOR_CONFIDENCE)
    floor = max(math.expm1(abs(low)), math.expm1(abs(high)), MIN_FLOOR)
    return NoiseFloor(value=math.exp(middle), low=math.exp(low), high=math.exp(high), floor=floor)


def speedup(reference: Sequence[float], times: Sequence[float], floor: NoiseFloor | None) -> Ratio | None:
    """Return the paired speedup over the reference with its interval, or None for fewer than MIN_ROUNDS rounds.

    It is significant if the whole interval lies outside the noise floor; never without a floor.
    """
    return paired_ratio(reference, times, floor.floor if floor else math.inf)


def paired_ratio(before: Sequence[float], after: Sequence[float], floor: float) -> Ratio | None:
    """Return the ratio of times sampled in the same rounds, before over after; None for fewer than MIN_ROUNDS."""
    logs = log_ratios(before, after)
    return _ratio(*ratio_interval(logs), floor) if len(logs) >= MIN_ROUNDS else None


def unpaired_ratio(before: Sequence[float], after: Sequence[float], floor: float = MIN_FLOOR) -> Ratio | None:
    """Return the ratio of two runs' times, before over after, by Welch's interval on logarithms; above 1 means faster.

    None for fewer than MIN_ROUNDS samples on either side.
    """
    return _welch(before, after, floor) if min(len(before), len(after)) >= MIN_ROUNDS else None


def _welch(before: Sequence[float], after: Sequence[float], floor: float) -> Ratio:
    a, b = [math.log(x) for x in before], [math.log(x) for x in after]
    va, vb = _variance(a) / len(a), _variance(b) / len(b)
    middle = fmean(a) - fmean(b)
    if va + vb == 0:
        return _ratio(middle, middle, middle, floor)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = student_t((1 + CONFIDENCE) / 2, freedom) * math.sqrt(va + vb)
    return _ratio(middle, middle - half, middle + half, floor)


def _variance(values: Sequence[float]) -> float:
    """Return the sample variance; `statistics.stdev` computes in fractions, which takes 20 times as long."""
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def ratio_of_medians(before: Interval, after: Interval, floor: float) -> Ratio | None:
    """Return the ratio of two medians, before over after, from their intervals; None if one has no interval."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None
    return _quotient((before.median, before.low, before.high), (after.median, after.low, after.high), floor)


def ratio_of_speedups(before: Ratio, after: Ratio, floor: float) -> Ratio | None:
    """Return the ratio of two speedups, after over before: common factors such as the machine's speed cancel."""
    return _quotient((after.value, after.low, after.high), (before.value, before.low, before.high), floor)


def _quotient(above: tuple[float, float, float], below: tuple[float, float, float], floor: float) -> Ratio | None:
    """Return the quotient of two independent estimates (middle, low, high); None if one is not positive.

    Its interval combines theirs on logarithms: Zou and Donner, "Construction of confidence limits about effect
    measures: a general approach", Statistics in Medicine 27 (2008).
    """
    if min(*above, *below) <= 0:
        return None
    (a, a_low, a_high), (b, b_low, b_high) = (tuple(map(math.log, each)) for each in (above, below))
    middle = a - b
    low = middle - math.hypot(a - a_low, b_high - b)
    return _ratio(middle, low, middle + math.hypot(a_high - a, b - b_low), floor)


def _ratio(middle: float, low: float, high: float, floor: float) -> Ratio:
    edge = math.log1p(floor)
    return Ratio(
        value=math.exp(middle), low=math.exp(low), high=math.exp(high), significant=bool(low > edge or high < -edge)
    )


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median with its interval (95 % by default) from order statistics, for any distribution.

    Below MIN_ROUNDS samples there is no interval: not even their whole range covers 95 %.
    """
    if len(samples) < MIN_ROUNDS:
        return Interval(median=median(samples))
    middle, low, high = _median_bounds(samples, confidence)
    return Interval(median=middle, low=low, high=high)


def _median_bounds(samples: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Return median, low and high. Conover, "Practical Nonparametric Statistics", 3.2."""
    ordered = sorted(samples)
    rank = _rank_below_median(len(ordered), confidence)
    return median(ordered), ordered[rank], ordered[-1 - rank]


@lru_cache(maxsize=4096)
def _rank_below_median(count: int, confidence: float) -> int:
    """Return the largest r for which the r-th smallest and r-th largest value enclose the median that surely."""
    if count > 200:  # the normal approximation holds, and binomial terms would leave a float's range
        return int((count - NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(count)) / 2) - 1
    below = 0.0
    for rank in range(count // 2):
        below += math.comb(count, rank) * 0.5**count
        if below > (1 - confidence) / 2:
            return max(rank - 1, 0)
    return max(count // 2 - 1, 0)


def slowed_down(times: Sequence[float], floor: float) -> bool:
    """Return whether the last third of the samples is significantly slower than the first third, beyond the floor.

    A round without a sample is NaN, and does not count.
    """
    taken = [time for time in times if time == time]
    third = len(taken) // 3
    ratio = _welch(taken[:third], taken[-third:], floor) if third >= 2 else None
    return ratio is not None and bool(ratio.significant) and ratio.value < 1


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio | None:
    """Return the geometric mean of the cases' speedups; its interval treats theirs as independent and normal.

    It is significant if the interval excludes 1 by more than the smallest floor.
    """
    if not ratios:
        return None
    middle = fmean(math.log(ratio.value) for ratio in ratios)
    half = _joint_half_width(ratios)
    return _ratio(middle, middle - half, middle + half, MIN_FLOOR)


def repeated_ratio(ratios: Sequence[Ratio], floor: float, confidence: float = CONFIDENCE) -> Ratio | None:
    """Return the geometric mean of repeated measurements of one ratio; None without any.

    Its interval is the wider of two: that of their own intervals, as of independent ones, and Student's t of their
    values, which has in it what changes from one measurement to the next, and has the confidence. A single ratio keeps
    its own interval.
    """
    if not ratios:
        return None
    if len(ratios) == 1:
        (ratio,) = ratios
        return _ratio(math.log(ratio.value), math.log(ratio.low), math.log(ratio.high), floor)
    logs = [math.log(ratio.value) for ratio in ratios]
    low, high = mean_interval(logs, confidence)
    half = max((high - low) / 2, _joint_half_width(ratios))
    middle = fmean(logs)
    return _ratio(middle, middle - half, middle + half, floor)


def repeated_floor(floors: Sequence[NoiseFloor]) -> float:
    """Return the noise floor of the mean of several runs, from those of the runs; MIN_FLOOR without any."""
    if len(floors) == 1:
        return floors[0].floor
    if not floors:
        return MIN_FLOOR
    if any(each.low <= 0 for each in floors):  # of a file
        return max(each.floor for each in floors)
    middle, half = fmean(math.log(each.value) for each in floors), _joint_half_width(floors)
    return max(math.expm1(abs(middle) + half), MIN_FLOOR)


def _joint_half_width(ratios: Sequence[Ratio] | Sequence[NoiseFloor]) -> float:
    """Return the half width of the interval of a mean of logarithms, from the intervals of independent values."""
    return math.sqrt(sum((math.log(ratio.high / ratio.low) / 2) ** 2 for ratio in ratios)) / len(ratios)
