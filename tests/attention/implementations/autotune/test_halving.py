"""A trial finds the fastest candidate within its time."""

import pytest

from attention.implementations.autotune.halving import Halving
from tests.support.tuning_examples import FakeTime


class FakeRunner:
    """A candidate that advances a fake clock by the cost of a call."""

    def __init__(self, clock: FakeTime, seconds: float, cold_s: float = 0.0, fails_after: int = 10**9) -> None:
        self.clock, self.seconds, self.cold_s, self.fails_after = clock, seconds, cold_s, fails_after
        self.calls = 0

    def queue(self) -> None:
        self.calls += 1
        if self.calls > self.fails_after:
            raise RuntimeError("out of memory")
        self.clock.now += self.seconds + (self.cold_s if self.calls == 1 else 0.0)

    def wait(self, outputs: object) -> None:
        pass

    def results(self) -> list[object]:
        return []

    def peak_bytes(self) -> int | None:
        return None


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


def halving(clock: FakeTime, budget_s: float = 0.5, on_gpu: bool = False) -> Halving:
    return Halving(budget_s, 1000, on_gpu, clock)


def runners(clock: FakeTime, **seconds: float) -> dict[str, FakeRunner]:
    return {name: FakeRunner(clock, each) for name, each in seconds.items()}


def test_the_fastest_wins_and_the_rest_stands_in_order(clock: FakeTime) -> None:
    found = halving(clock).run(runners(clock, c=0.0014, a=0.001, d=0.0015, b=0.0012, e=0.0016))
    assert list(found.call_s)[:2] == ["a", "b"]
    assert set(found.call_s) == set("abcde")
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(1.2)


def test_the_hopeless_is_called_once(clock: FakeTime) -> None:
    given = runners(clock, fast=0.001, slow=0.02)
    halving(clock).run(given)
    assert given["slow"].calls == 1


def test_compiling_first_calls_get_a_second_call_off_the_clock(clock: FakeTime) -> None:
    given = {"plain": FakeRunner(clock, 0.002), "compiled": FakeRunner(clock, 0.001, cold_s=3.0)}
    found = halving(clock, on_gpu=True).run(given)
    assert next(iter(found.call_s)) == "compiled"


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_it_keeps_to_its_time(clock: FakeTime, count: int) -> None:
    before = clock.now
    given = {str(number): FakeRunner(clock, 0.001 + number * 1e-5) for number in range(count)}
    halving(clock).run(given)
    assert clock.now - before <= 0.5 + 0.05


def test_after_its_time_nothing_begins_and_the_result_says_so(clock: FakeTime) -> None:
    given = runners(clock, first=0.6, second=0.7)
    found = halving(clock).run(given)
    assert found.untried == ["second"]
    assert given["second"].calls == 0


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_what_raises_is_out_whenever_it_does(clock: FakeTime, after: int) -> None:
    broken = FakeRunner(clock, 0.001, fails_after=after)
    found = halving(clock).run({"broken": broken, "works": FakeRunner(clock, 0.002)})
    assert list(found.call_s) == ["works"]
    assert found.failed == {"broken": "RuntimeError: out of memory"}


@pytest.mark.parametrize("after", [5, 30])
def test_where_all_leaders_raise_the_best_of_the_others_wins(clock: FakeTime, after: int) -> None:
    broken = {name: FakeRunner(clock, 0.001, fails_after=after) for name in ("one", "other")}
    found = halving(clock).run(broken | runners(clock, slower=0.03, slow=0.02))
    assert list(found.call_s) == ["slow", "slower"]
    assert found.failed == dict.fromkeys(broken, "RuntimeError: out of memory")


def test_when_nothing_runs_it_says_why(clock: FakeTime) -> None:
    given = {name: FakeRunner(clock, 0.1, fails_after=0) for name in "ab"}
    with pytest.raises(RuntimeError, match="none of a, b could be run: a: RuntimeError: out of memory; b"):
        halving(clock).run(given)


def test_a_clock_that_is_set_back_meanwhile_stops_nothing(clock: FakeTime) -> None:
    class Back(FakeRunner):
        def queue(self) -> None:
            super().queue()
            if self.calls % 10 == 0:
                self.clock.now -= 5.0

    found = halving(clock).run({"a": Back(clock, 0.02), "b": FakeRunner(clock, 0.03)})
    assert set(found.call_s) == {"a", "b"}
