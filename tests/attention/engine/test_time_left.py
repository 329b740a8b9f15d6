"""The worker's estimate of the time left, from the times of calls so far."""

import pytest

from attention.core import events as on
from attention.core.plan import Assignment, Plan, StreamPlan
from attention.core.stream import Stream
from attention.core.workload import Workload
from attention.engine.case_runner import SampleStream, longer_text
from attention.engine.progress import Forecast, Progress, case_s, counterpart_calls
from attention.engine.stream import AttentionStreamBench
from attention.measure.rounds import Arm

SMALL = Workload(seq=128)
LARGE = Workload(seq=1280)  # 100 times the FLOPs
DECODE = Workload(pass_="decode", kv_seq=128)


def plan_of(*cases: Workload, seconds: float = 2.0) -> Plan:
    return Plan(cases=cases, implementations=("baseline", "poc"), seconds=seconds)


def test_a_case_takes_its_seconds_or_six_rounds() -> None:
    assert case_s([0.001, 0.001], 2.0) == pytest.approx(2.0 + 8 * 0.002)
    assert case_s([1.0, 2.0], 2.0) == pytest.approx(6 * (1 + 1 + 2) + 8 * 3)  # the reference is sampled twice


@pytest.mark.parametrize(("takes_s", "shown"), [(0.13, "0.13 s"), (3.0, "3 s"), (9.96, "10 s"), (123.4, "123 s")])
def test_rounds_that_take_longer_are_never_said_to_take_none(takes_s: float, shown: str) -> None:
    assert f"6 rounds of these take about {shown}, longer than the 0.05 s" in longer_text(6, takes_s, 0.05)
    assert longer_text(1, takes_s, 0.05).startswith(f"1 round of these takes about {shown}")


def test_calls_of_larger_cases_are_scaled_by_flops() -> None:
    forecast = Forecast(plan_of(SMALL, LARGE))
    forecast.record_call(0, "baseline", 0.01)
    forecast.record_call(0, "poc", 0.01)
    assert forecast.rounds_s(0) == 2.0
    assert forecast.rounds_s(1) == pytest.approx(6 * 3 * 1.0)
    assert forecast.case_s(1) > 6 * 3 + 8 * 2


def test_calls_of_one_kind_say_nothing_of_another() -> None:
    forecast = Forecast(plan_of(LARGE, DECODE))
    forecast.record_call(0, "baseline", 100.0)
    assert forecast.rounds_s(1) == 2.0


def test_what_is_not_timed_yet_counts_as_the_others() -> None:
    forecast = Forecast(plan_of(SMALL))
    forecast.record_call(0, "baseline", 1.0)
    assert forecast.rounds_s(0) == pytest.approx(6 * 3)
    forecast.drop(0, "poc")
    assert forecast.rounds_s(0) == pytest.approx(6 * 2)


def test_complete_cases_correct_the_others() -> None:
    forecast = Forecast(plan_of(SMALL, SMALL))
    forecast.record_case(0, 5.0)
    assert forecast.case_s(1) == pytest.approx(5.0)


def test_before_the_rounds_all_of_them_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("attention.engine.progress.time.perf_counter", lambda: now[0])
    reported: list[on.AnyEvent] = []
    progress = Progress(plan_of(SMALL, LARGE), 0, reported.append, lambda number: None)
    progress.begin_case(0)
    progress.record_call_s("baseline", 0.01)
    now[0] = 60.0  # what comes before the rounds takes far longer than was guessed
    progress.emit_progress("poc: first call")
    event = reported[-1]
    assert isinstance(event, on.Progress)
    assert event.remaining_s >= 2.0 + 6 * 3 * 1.0
    assert event.done == pytest.approx(60.0 / (60.0 + event.remaining_s))


@pytest.mark.parametrize("pace", [1.0, 3.0])
def test_rounds_go_by_their_own_pace(pace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("attention.engine.case_runner.time.perf_counter", lambda: now)
    reported: list[on.AnyEvent] = []
    progress = Progress(plan_of(SMALL), 0, reported.append, lambda number: None)
    stream = SampleStream(progress, 2.0, 60.0, 6)  # 10 s a round were expected
    arms = [Arm(name=name, runner=None, call_s=5.0) for name in ("baseline", "poc")]  # type: ignore[arg-type]
    for count in range(1, 4):
        now += 10 * pace
        for arm in arms:
            arm.samples.append(5 * pace)
        stream.collect(arms)
        left = [event.remaining_s for event in reported if isinstance(event, on.Progress)][-1]
        assert left == pytest.approx((6 - count) * 10 * pace)


def test_calls_on_a_dense_counterpart_count_by_their_pairs() -> None:
    case = Workload(seq=1024, heads=2, head_dim=16, dtype="float32", mask="window:64")
    dense = 1024 * 1024 / (64 * 1024 - 64 * 63 / 2)
    assert counterpart_calls([0.01, 0.05], case, 1.0) == pytest.approx([0.01 * dense])  # the other takes too long
    assert counterpart_calls([0.01], SMALL, 1.0) == []
    assert case_s([0.01], 0.5, [0.2]) == pytest.approx(8 * 0.01 + 2 * 0.2 + 6 * (0.02 + 0.2))
    forecast = Forecast(plan_of(case, seconds=0.1))
    for name in ("baseline", "poc"):
        forecast.record_call(0, name, 0.004)
    assert forecast.rounds_s(0) == pytest.approx(6 * 0.004 * (3 + 2 * dense))


def test_the_rows_of_a_stream_that_are_still_to_come_count() -> None:
    plan = StreamPlan(cases=(Stream(tokens=1000),), seconds=60.0)
    bench = AttentionStreamBench(Assignment(plan=plan), plan, lambda event: None)
    bench._rows_after = 2
    assert bench._left_s(10.0, 0.5) == pytest.approx(10 + 2 * 20)
    assert bench._left_s(50.0, 0.1) == pytest.approx(10 + 2 * 60)  # a row ends at the time limit
