"""The time left that the app shows, on events recorded from real runs: `tests/support/recorded_runs`."""

import pytest

from attention.engine.record import Record
from fatui.storage.settings import RunSpeed
from fatui.tui.view_models import cost
from fatui.tui.view_models.journal import Log
from fatui.tui.view_models.session import Session
from tests.support import recorded_runs
from tests.support.stage import AT, Clock

RUNS = sorted(recorded_runs.FOLDER.glob("*.jsonl"))
SOON_S = 2.0
"""Less than this is as good as done."""


class Silent:
    """An engine whose events come from a recording."""

    def __init__(self, plan, listener):
        self.record, self.process_id, self.listener = Record(plan), None, listener

    def tell(self, event):
        self.record.apply(event)
        self.listener(event)


def shown(path):
    """Replay a run; return the (time, seconds left) shown four times a second, and its duration."""
    plan, known, events = recorded_runs.read(path)
    clock = Clock()
    pace = RunSpeed(device="here", calls=known.calls)
    expected = cost.estimate_s(plan, pace, "here") if known.calls else None
    session = Session(plan, Log(lambda: AT), Silent, command="", expected_s=expected, clock=clock, now=lambda: AT)
    began, points, tick = clock.at, [], 0.0
    for at, event in events:
        while tick < at:
            clock.at = began + tick
            cost.note_time_left(session)
            left = cost.remaining(session)
            if left is not None:
                points.append((tick, left.seconds))
            tick += 0.25
        clock.at = began + at
        session.engine.tell(event)
    return points, events[-1][0]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_time_left_never_grows_fourfold(path):
    points, _ = shown(path)
    least = float("inf")
    for at, seconds in points:
        assert seconds <= SOON_S or seconds < 4 * max(least, SOON_S), f"{least:.1f} s, then {seconds:.1f} s at {at} s"
        least = min(least, seconds)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_time_left_ends_near_the_truth(path):
    points, whole = shown(path)
    late = [(whole - at, seconds) for at, seconds in points if at > whole / 2]
    assert late
    for truth, seconds in late:
        assert truth / 2 - SOON_S <= seconds <= 2 * truth + 2 * SOON_S


def test_a_jumping_estimate_is_shown_as_more_than_a_multiple():
    plan, _, _ = recorded_runs.read(RUNS[0])
    clock = Clock()
    session = Session(plan, Log(lambda: AT), Silent, command="", expected_s=10.0, clock=clock, now=lambda: AT)
    cost.note_time_left(session)
    assert cost.remaining(session).words == "10 s left"
    session.expected_s = 100.0
    assert cost.remaining(session).words == "more than 30 s left"


def test_asking_for_the_time_left_changes_nothing():
    plan, _, _ = recorded_runs.read(RUNS[0])
    session = Session(plan, Log(lambda: AT), Silent, command="", expected_s=10.0, clock=Clock(), now=lambda: AT)
    assert cost.remaining(session).words == "10 s left"
    session.expected_s = 100.0
    assert cost.remaining(session).words == "1 min 40 s left"
