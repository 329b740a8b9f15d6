"""Coverage of the intervals, checked against scipy and by simulation."""

import importlib
import math
import random
from statistics import fmean, stdev
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.core import statistics
from attention.core.results import MIN_ROUNDS, NoiseFloor, Ratio

QUIET = NoiseFloor(value=1, low=0.999, high=1.001, floor=0.005)


@pytest.fixture(scope="module")
def special() -> ModuleType:
    """Return scipy.special; scipy.stats, which calls it for all this, takes a second to import."""
    return importlib.import_module("scipy.special")


times = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=50)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 300])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_student_t_agrees_with_scipy(special: ModuleType, freedom: int, probability: float) -> None:
    assert statistics.student_t(probability, freedom) == pytest.approx(special.stdtrit(freedom, probability), rel=1e-3)


@pytest.mark.parametrize("freedom", [1.05, 1.3, 1.7, 1.95])
def test_student_t_of_welchs_freedom_below_2_is_wide(special: ModuleType, freedom: float) -> None:
    exact = special.stdtrit(freedom, 0.975)
    assert exact <= statistics.student_t(0.975, freedom) <= 1.05 * exact


def test_mean_interval_agrees_with_scipy(special: ModuleType) -> None:
    draw = random.Random(1)
    values = [draw.gauss(2, 1) for _ in range(12)]
    half = special.stdtrit(11, 0.975) * stdev(values) / math.sqrt(12)
    expected = (fmean(values) - half, fmean(values) + half)
    assert statistics.mean_interval(values) == pytest.approx(expected, rel=1e-4)


def two_phases(draw: random.Random, rounds: int) -> tuple[list[float], list[float]]:
    """Two arms of equal speed on a machine that is 1.5 times as slow for a while, and then fast again."""
    slow, pairs = False, []
    for _ in range(rounds):
        pair = []
        for _ in range(2):
            slow = slow ^ (draw.random() < 0.1)
            pair.append((1.5 if slow else 1.0) * math.exp(draw.gauss(0, 0.01)))
        pairs.append(pair)
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_a_ratios_interval_covers_1_on_a_drifting_machine() -> None:
    covered, widths = 0, []
    for seed in range(400):
        _, low, high = statistics.ratio_interval(statistics.log_ratios(*two_phases(random.Random(seed), 100)))
        covered += low <= 0 <= high
        widths.append(high - low)
    assert 0.93 <= covered / 400 <= 0.99
    assert fmean(widths) < 0.01  # a mean's would be seven times as wide


@pytest.mark.parametrize("rounds", [3, 5, 6, 30])
def test_a_ratios_interval_covers_1_with_few_rounds(rounds: int) -> None:
    covered = 0
    for seed in range(400):
        draw = random.Random(seed)
        _, low, high = statistics.ratio_interval([draw.gauss(0, 0.05) for _ in range(rounds)])
        covered += low <= 0 <= high
    assert covered / 400 >= 0.9


@pytest.mark.parametrize("count", [6, 9, 20, 60, 201, 5000])
def test_median_interval_is_the_widest_that_the_binomial_needs(special: ModuleType, count: int) -> None:
    interval = statistics.median_interval([float(i) for i in range(count)])
    rank = int(interval.low)
    inside = 1 - 2 * special.bdtr(rank, count, 0.5)
    assert inside >= 0.94 if count > 200 else inside >= 0.94 or rank == 0
    assert 1 - 2 * special.bdtr(rank + 2, count, 0.5) < 0.95
    assert interval.high == count - 1 - rank


@given(times)
def test_median_interval_holds_the_median(samples: list[float]) -> None:
    interval = statistics.median_interval(samples)
    assert min(samples) <= interval.median <= max(samples)
    if len(samples) < MIN_ROUNDS:
        assert (interval.low, interval.high) == (None, None)
    else:
        assert min(samples) <= interval.low <= interval.median <= interval.high <= max(samples)


@given(times, st.floats(1.1, 10))
def test_speedup_of_a_constant_factor_is_that_factor(samples: list[float], factor: float) -> None:
    ratio = statistics.speedup([sample * factor for sample in samples], samples, QUIET)
    assert (ratio is None) == (len(samples) < MIN_ROUNDS)
    if ratio is None:
        return
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.significant


def test_speedup_cancels_a_drift_that_all_share() -> None:
    draw = random.Random(3)
    drift = [1 + 0.5 * i / 30 for i in range(30)]
    reference = [d * math.exp(draw.gauss(0, 0.004)) for d in drift]
    faster = [d / 1.03 * math.exp(draw.gauss(0, 0.004)) for d in drift]
    ratio = statistics.speedup(reference, faster, QUIET)
    assert ratio is not None
    assert ratio.low < 1.03 < ratio.high
    assert ratio.high - ratio.low < 0.01


def test_speedup_inside_the_floor_is_not_significant() -> None:
    loud = NoiseFloor(value=1, low=0.9, high=1.1, floor=0.11)
    times = [1.0 + i / 1000 for i in range(10)]
    ratio = statistics.speedup([t * 1.05 for t in times], times, loud)
    assert ratio is not None
    assert not ratio.significant


def test_nothing_is_significant_without_a_floor() -> None:
    ratio = statistics.speedup([2.0] * 6, [1.0] * 6, None)
    assert ratio is not None
    assert not ratio.significant


@pytest.mark.parametrize("rounds", range(MIN_ROUNDS))
def test_too_few_rounds_give_no_figure(rounds: int) -> None:
    reference, times = [2.0 + n / 100 for n in range(rounds)], [1.0] * rounds
    assert statistics.speedup(reference, times, QUIET) is None
    assert statistics.noise_floor(reference, times) is None
    assert statistics.unpaired_ratio(reference, times) is None


def test_six_rounds_show_a_40_fold_difference() -> None:
    draw = random.Random(6)
    reference, again = ([0.9 * math.exp(draw.gauss(0, 0.3)) for _ in range(6)] for _ in range(2))
    floor = statistics.noise_floor(reference, again)
    ratio = statistics.speedup(reference, [0.9 / 40 * math.exp(draw.gauss(0, 0.3)) for _ in range(6)], floor)
    assert ratio is not None
    assert ratio.significant
    assert 10 < ratio.low < 40 < ratio.high < 160


def test_the_noise_floor_is_the_larger_side_of_its_interval() -> None:
    draw = random.Random(4)
    floor = statistics.noise_floor([draw.gauss(1, 0.05) for _ in range(20)], [draw.gauss(1, 0.05) for _ in range(20)])
    assert floor is not None
    assert floor.low < floor.value < floor.high
    assert floor.floor == pytest.approx(max(1 / floor.low - 1, floor.high - 1))


def test_an_unpaired_ratio_agrees_with_scipys_welch() -> None:
    draw = random.Random(5)
    before = [math.exp(draw.gauss(0.1, 0.1)) for _ in range(20)]
    after = [math.exp(draw.gauss(0, 0.2)) for _ in range(14)]
    ratio = statistics.unpaired_ratio(before, after)
    assert ratio is not None
    # scipy.stats.ttest_ind(log(before), log(after), equal_var=False).confidence_interval(0.95), of scipy 1.17
    assert (math.log(ratio.low), math.log(ratio.high)) == pytest.approx((-0.1184058, 0.1404541), rel=1e-3)


def test_drift_is_reported_when_last_rounds_exceed_the_floor() -> None:
    draw = random.Random(6)
    steady = [draw.gauss(1, 0.01) for _ in range(30)]
    assert not statistics.slowed_down(steady, 0.01)
    assert statistics.slowed_down([value * (1 + i / 60) for i, value in enumerate(steady)], 0.01)
    assert not statistics.slowed_down([value / (1 + i / 60) for i, value in enumerate(steady)], 0.01)
    slower = [value * (1 + i / 60) for i, value in enumerate(steady)]
    assert statistics.slowed_down([*slower[:20], *[math.nan] * 40, *slower[20:]], 0.01)  # rounds without a sample


def test_the_geometric_mean_narrows_with_the_number_of_cases() -> None:
    one = Ratio(value=2, low=1.9, high=2.1)
    mean = statistics.geometric_mean([one] * 4)
    assert mean is not None
    assert mean.value == pytest.approx(2)
    assert mean.high / mean.low == pytest.approx(math.sqrt(2.1 / 1.9), rel=1e-3)
    assert statistics.geometric_mean([]) is None
