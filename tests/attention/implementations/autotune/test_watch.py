"""A choice is questioned for a reason, others are tried within their share, and it changes only for a clear gain."""

import random

from attention.implementations.autotune.drift_detector import MAX_PAIRS, TRY_SHARE, WINDOW, DriftDetector


def observed(watch: DriftDetector, *seconds: float) -> DriftDetector:
    for each in seconds:
        watch.observe(each)
    return watch


def test_calls_that_take_what_they_took_raise_no_doubt() -> None:
    watch = observed(DriftDetector({"b": 1.1}), *[1.0, 1.02, 0.99] * 100)
    assert not watch.trying
    assert not watch.may_try(10_000)


def test_one_slow_call_is_no_reason_and_two_of_three_are() -> None:
    watch = observed(DriftDetector({"b": 1.1}), *[1.0] * WINDOW, 2.0)
    assert not watch.trying
    assert observed(watch, 1.3, 1.3).challenger == "b"
    assert "1.30 times" in watch.reason


def test_others_get_2_percent_of_the_calls_and_no_more() -> None:
    watch = DriftDetector({"b": 1.0}, doubt="the test says so")
    tried = sum(watch.may_try(calls) for calls in range(1, 10_001))
    assert 0.9 * TRY_SHARE * 10_000 <= tried <= TRY_SHARE * 10_000


def test_slow_ones_count_several_and_hopeless_ones_are_skipped() -> None:
    watch = DriftDetector({"b": 5.0}, doubt="the test says so")
    assert sum(watch.may_try(calls) for calls in range(1, 10_001)) <= TRY_SHARE * 10_000 / 5
    assert not DriftDetector({"b": 50.0}, doubt="the test says so").trying


def test_it_changes_for_a_sure_gain_only() -> None:
    watch = DriftDetector({"b": 1.0}, doubt="the test says so")
    ratios = [watch.compare(1.3, 1.0 + 0.01 * n) for n in range(6)]
    assert ratios[:5] == [None] * 5
    last = ratios[5]
    assert last is not None
    assert last.low > 1.03


def test_equal_candidates_do_not_take_turns() -> None:
    draw = random.Random(1)
    changes = 0
    for _ in range(100):
        watch = DriftDetector({"b": 1.0}, doubt="the test says so")
        while watch.trying:
            ratio = watch.compare(draw.gauss(1, 0.05), draw.gauss(1, 0.05))
            if ratio is not None:
                changes += 1
                break
    assert changes <= 10


def test_one_that_is_not_better_is_given_up_and_the_next_tried() -> None:
    watch = DriftDetector({"b": 1.0, "c": 1.0}, doubt="the test says so")
    for _ in range(MAX_PAIRS):
        if watch.challenger == "b":
            watch.compare(1.0, 1.0)
    assert watch.challenger == "c"
    for _ in range(MAX_PAIRS):
        watch.compare(1.0, 2.0)
    assert not watch.trying


def test_a_former_choice_is_retried_less_and_less_often() -> None:
    watch = DriftDetector({"b": 1.0}, doubt="the test says so")
    watch.on_switch("a")
    for _ in range(50):
        watch.compare(1.0, 1.3)
    assert watch.challenger == "a"
    assert sum(watch.may_try(calls) for calls in range(1, 10_001)) <= TRY_SHARE * 10_000 / 2


def test_times_of_a_clock_that_was_set_back_do_not_count() -> None:
    watch = observed(DriftDetector({"b": 1.0}), 1.0, 1.0, 1.0, -50.0, 0.0, -1.0, 1.0)
    assert not watch.trying
    assert watch.compare(-3.0, 1.0) is None
    assert watch.compare(1.0, 0.0) is None
