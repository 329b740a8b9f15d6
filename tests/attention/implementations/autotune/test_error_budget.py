"""With an error budget the autotuner tries the approximate candidate too, and leaves it where its error is above."""

from pathlib import Path

import mlx.core as mx
import pytest

from attention import UsageError, attention
from attention.core import events as on
from attention.core.workload import Workload
from attention.implementations.autotune import implementation
from attention.implementations.autotune.drift_detector import WINDOW, DriftDetector
from attention.implementations.autotune.implementation import Demo
from attention.implementations.autotune.store import Store
from attention.implementations.calls import make_inputs, take_path
from tests.support.tuning_examples import FakeTime, Timed

WORKLOAD = Workload(seq=32, heads=2, head_dim=8, dtype="float32")


class Approximate(Timed):
    """A fast candidate with a relative error."""

    def __init__(self, error: float, clock: FakeTime, name: str = "poc-fp8") -> None:
        super().__init__(name, 0.001, clock)
        self.error = error

    def __call__(self, *arrays: mx.array, **more: object) -> mx.array:  # type: ignore[override]
        return super().__call__(*arrays, **more) * (1 + self.error)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> FakeTime:
    """The time that candidates take, on which no other process has an influence."""
    return FakeTime()


@pytest.fixture
def approximate(monkeypatch: pytest.MonkeyPatch, clock: FakeTime) -> Approximate:
    made = Approximate(0.05, clock)
    monkeypatch.setattr(implementation, "PocFp8", lambda: made)
    return made


def demo_among(path: Path, clock: FakeTime, *among: Timed, max_error: float | None = None) -> Demo:
    candidates = {each.name: each for each in among}
    return Demo(store=Store(path), among=candidates, budget_s=0.1, clock=clock, max_error=max_error)


@pytest.fixture
def demo(tmp_path: Path, clock: FakeTime) -> Demo:
    return demo_among(tmp_path / "tuning.toml", clock, Timed("exact", 0.002, clock))


def another_process(demo: Demo) -> Demo:
    """Return a demo with the candidates and the stored choices of one."""
    return Demo(store=Store(demo.store.path), among=demo.candidates, budget_s=0.1, clock=demo.clock)


def path(demo: Demo, **more: float) -> str | None:
    q, k, v = make_inputs(WORKLOAD, 0)
    attention(q, k, v, implementation=demo, **more)  # type: ignore[call-overload]
    return take_path()


@pytest.mark.parametrize(("max_error", "taken"), [(None, "exact"), (0.01, "exact"), (0.1, "poc-fp8")])
def test_the_approximate_candidate_is_taken_within_its_budget(
    demo: Demo, approximate: Approximate, max_error: float | None, taken: str
) -> None:
    assert path(demo, max_error=max_error) == f"tuned: {taken}"  # type: ignore[arg-type]
    assert (approximate.calls > 0) == (max_error is not None)


def test_calls_with_a_budget_have_their_own_choices(demo: Demo, approximate: Approximate) -> None:
    taken = [path(demo, **more) for more in ({"max_error": 0.1}, {}, {"max_error": 0.1})]
    assert taken == ["tuned: poc-fp8", "tuned: exact", "tuned: poc-fp8"]
    assert [entry.workload.label[-9:] for entry in demo.store.entries()] == ["error≤0.1", "8 float32"]


def test_an_error_that_grows_above_the_budget_ends_the_choice(demo: Demo, approximate: Approximate) -> None:
    events: list[object] = []
    with on.listening_to_tuning(events.append):
        assert path(demo, max_error=0.1) == "tuned: poc-fp8"
        approximate.error = 0.3
        assert path(demo, max_error=0.1) == "tuned: exact"
    assert "its error on these inputs is 0.3, above max_error 0.1" in events[-1].text  # type: ignore[attr-defined]
    before = approximate.calls
    assert path(demo, max_error=0.1) == "tuned: exact"
    assert approximate.calls == before


def test_the_choice_that_follows_is_no_challenger_of_itself(demo: Demo, approximate: Approximate) -> None:
    path(demo, max_error=0.1)
    (active,) = demo.within(0.1)._classes.values()
    active.alternatives = {"exact": 0.002}
    active.drift = DriftDetector(active.alternatives)
    active.give_up(demo.within(0.1).candidates, "exact")
    for seconds in [0.001] * WINDOW + [0.1] * WINDOW:
        active.drift.observe(seconds)
    assert (active.name, active.drift.challenger) == ("exact", None)


def test_a_traced_first_call_leaves_a_stored_choice(demo: Demo, approximate: Approximate) -> None:
    path(demo, max_error=0.1)
    again, inputs = another_process(demo), make_inputs(WORKLOAD, 0)
    paths = []

    def traced(q: mx.array) -> mx.array:
        out = attention(q, *inputs[1:3], max_error=0.1, implementation=again)
        paths.append(take_path())
        return out

    mx.eval(mx.vmap(traced)(inputs[0][None]))
    assert paths == ["tuned: exact"]
    assert path(again, max_error=0.1) == "tuned: poc-fp8"


def test_a_demo_with_a_budget_of_its_own_tries_it_too(
    tmp_path: Path, approximate: Approximate, clock: FakeTime
) -> None:
    own = demo_among(tmp_path / "tuning.toml", clock, Timed("exact", 0.002, clock), max_error=0.1)
    assert path(own) == "tuned: poc-fp8"
    assert path(own, max_error=0.01) == "tuned: exact"


def test_a_bound_call_is_tuned_within_the_budget(tmp_path: Path, approximate: Approximate, clock: FakeTime) -> None:
    exact = Timed("exact", 0.002, clock)
    own = demo_among(tmp_path / "tuning.toml", clock, exact, max_error=0.1)
    runner = own.runner(WORKLOAD, make_inputs(WORKLOAD, 0)[:3], WORKLOAD.scale)
    before = approximate.calls
    runner.results()
    assert approximate.calls == before + 1
    approximate.error = 0.3
    again = demo_among(own.store.path, clock, exact, max_error=0.1)
    bound = again.runner(WORKLOAD, make_inputs(WORKLOAD, 0)[:3], WORKLOAD.scale)
    before = approximate.calls
    bound.results()
    assert approximate.calls == before, "its error in another process is above the budget"


@pytest.mark.thorough
def test_a_candidate_that_should_be_exact_has_no_budget(
    tmp_path: Path, approximate: Approximate, clock: FakeTime
) -> None:
    approximate.error = 0.3
    wrong, exact = Approximate(0.05, clock, "wrong"), Timed("exact", 0.002, clock)
    demo = demo_among(tmp_path / "tuning.toml", clock, wrong, exact)
    assert path(demo, max_error=0.1) == "tuned: exact"


def test_another_process_measures_the_error_of_a_stored_choice(demo: Demo, approximate: Approximate) -> None:
    path(demo, max_error=0.1)
    approximate.error = 0.3
    again = another_process(demo)
    assert path(again, max_error=0.1) == "tuned: exact"


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_a_budget_is_a_number_above_0(value: object) -> None:
    q, k, v = make_inputs(WORKLOAD, 0)
    with pytest.raises(UsageError, match=r"max_error: got .*; it takes a number above 0, or None"):
        attention(q, k, v, max_error=value)  # type: ignore[call-overload]


def test_exact_implementations_have_no_error_to_bound() -> None:
    q, k, v = make_inputs(WORKLOAD, 0)
    assert mx.array_equal(attention(q, k, v, max_error=0.1), attention(q, k, v))
