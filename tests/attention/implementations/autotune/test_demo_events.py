"""Events of tuning and switching, and how their readers handle them."""

from pathlib import Path

import msgspec
import pytest

from attention.core import events as on
from attention.core.plan import Assignment, Plan
from attention.core.results import Peaks, Ratio
from attention.core.workload import Workload
from attention.engine import bench
from attention.engine.bench import Bench
from attention.engine.record import Record
from attention.implementations.autotune.implementation import Demo
from attention.implementations.autotune.store import Store
from attention.implementations.baseline import Baseline
from fatui.tui.view_models.journal import event_line
from tests.support.tuning_examples import FakeTime, Timed

SWITCHED = on.Switched(
    implementation="demo",
    workload="BH≤8 L≤512",
    before="poc",
    after="mlx",
    ratio=Ratio(value=1.25, low=1.2, high=1.3),
    reason="its calls take 1.30 times what they did",
)
TUNED = on.Tuned(
    implementation="demo", workload="BH≤8 L≤512", winner="poc", runner_up="mlx", ratio=SWITCHED.ratio, seconds=0.5
)
STARTED = on.TrialStarted(implementation="demo", workload="BH≤8 L≤512", candidates=["poc", "mlx"])
PLAN = Plan(cases=(Workload(seq=16, heads=1, head_dim=8),), implementations=("baseline", "demo"), seconds=0.1)


@pytest.mark.thorough
def test_the_trial_is_reported_before_and_apart_from_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    among = {"slow": Timed("slow", 0.002, clock), "fast": Timed("fast", 0.001, clock)}
    demo = Demo(store=Store(tmp_path / "tuning.toml"), among=among, budget_s=0.3, clock=clock)
    monkeypatch.setattr(
        bench.implementations, "load_implementation", {"baseline": Baseline(), "demo": demo}.__getitem__
    )
    events: list[on.AnyEvent] = []
    of_demo: list[tuple[type, int]] = []

    def heard(event: on.AnyEvent) -> None:
        events.append(event)
        if getattr(event, "implementation", "") == "demo":
            of_demo.append((type(event), sum(one.calls for one in among.values())))

    Bench(Assignment(plan=PLAN, peaks=Peaks()), PLAN, heard).run()
    kinds = [kind for kind, _ in of_demo]
    first = kinds.index(on.FirstCall)
    assert kinds.index(on.TrialStarted) < kinds.index(on.Tuned) < first
    # Its time begins with its step: one call, and none of the trial, is in it.
    assert kinds[first - 1] is on.StepStarted
    assert of_demo[first][1] == of_demo[first - 1][1] + 1
    record = Record(PLAN)
    for event in events:
        record.apply(event)
    assert [row.path for row in record.case(0).rows] == ["manual, unfused", "tuned: fast"]


@pytest.mark.thorough
def test_a_switch_in_a_run_is_reported_with_the_new_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.implementations.autotune.implementation.SAMPLES_PER_CHECK", 1)
    slow, clock = [1.0], FakeTime()
    among = {"a": Timed("a", lambda: 3e-4 * slow[0], clock), "b": Timed("b", 4e-4, clock)}
    demo = Demo(store=Store(tmp_path / "tuning.toml"), among=among, budget_s=0.1, clock=clock)
    events: list[on.AnyEvent] = []

    class SeenEnough(Exception):
        pass

    def heard(event: on.AnyEvent) -> None:
        events.append(event)
        if isinstance(event, on.RoundsDone):
            rounds = sum(len(each.samples["demo"]) for each in events if isinstance(each, on.RoundsDone))
            slow[0] = 4.0 if rounds >= 10 else 1.0  # its usual time is known by then, however few an event has
            if rounds > 3000 or any(isinstance(each, on.Switched) for each in events):
                raise SeenEnough

    monkeypatch.setattr(
        bench.implementations, "load_implementation", {"baseline": Baseline(), "demo": demo}.__getitem__
    )
    plan = msgspec.structs.replace(PLAN, seconds=600, precision=0.0)  # ends with the switch
    with pytest.raises(SeenEnough):
        Bench(Assignment(plan=plan, peaks=Peaks()), plan, heard).run()
    place = next(number for number, event in enumerate(events) if isinstance(event, on.Switched))
    after = events[place + 1]
    assert isinstance(after, on.RouteFound)
    assert after.route.path == "tuned: b"


@pytest.mark.parametrize("event", [STARTED, TUNED, SWITCHED])
def test_events_come_through_as_lines_and_change_no_row(event: on.TuningEvent) -> None:
    assert on.decode(on.encode(event)) == event
    record = Record(PLAN)
    record.apply(event)
    assert record.cases == Record(PLAN).cases


def test_the_log_says_what_was_chosen_and_why_it_changed() -> None:
    texts = [said[0] for event in (STARTED, TUNED, SWITCHED) if (said := event_line(event, PLAN))]
    assert texts == [
        "demo tries poc, mlx for BH≤8 L≤512",
        "demo takes poc for BH≤8 L≤512, 1.25x mlx (1.2 to 1.3), after 0.5 s",
        "demo goes from poc to mlx for BH≤8 L≤512, 1.25x poc (1.2 to 1.3): its calls take 1.30 times what they did",
    ]


def test_an_event_of_an_unknown_kind_becomes_a_message() -> None:
    event = on.decode(b'{"event": "moon_rose", "height": 3}\n')
    assert event == on.Message(level="info", text="unknown event 'moon_rose' from the engine")


@pytest.mark.parametrize("line", [b"", b"nonsense", b'{"height": 3}', b'{"event": "case_done"}', b'{"event": 3}'])
def test_what_is_no_event_is_still_an_error(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        on.decode(line)


def test_words_are_the_same_for_logs_and_messages() -> None:
    assert on.tuning_log_line(on.Message(level="info", text="as it is")) == "as it is"
