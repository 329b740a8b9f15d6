"""What else goes on while a run measures: processes that are not the run's own, and other runs."""

import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from attention.core.results import Conditions
from attention.measure import conditions
from attention.measure.conditions import ConditionsWatch
from tests.support.stage import DEVICE
from tests.support.tuning_examples import FakeTime

SPIN = "while True: pass"


@pytest.fixture
def no_family(monkeypatch):
    """Count this process alone as the run's own, so that a child counts as another program."""
    monkeypatch.setattr(conditions, "_family", set)


@pytest.fixture
def clock(monkeypatch):
    """The clock of readings, which a loaded machine does not advance between two of them."""
    made = FakeTime()
    monkeypatch.setattr(conditions, "time", SimpleNamespace(monotonic=made))
    return made


@pytest.mark.thorough
def test_another_busy_process_is_counted_and_named(no_family, clock):
    watch = ConditionsWatch(DEVICE)
    with subprocess.Popen([sys.executable, "-c", SPIN]) as busy:
        try:
            process = psutil.Process(busy.pid)
            while process.cpu_times().user < 0.5:
                time.sleep(0.01)
            name = process.name()
            clock.now += 1.0
            read = watch.read()
        finally:
            busy.kill()
    assert read.other_cores is not None and read.other_cores > 0.1
    assert name in read.busiest or len(read.busiest) == conditions.MAX_NAMES
    assert read.cores == DEVICE.cores


def test_what_the_run_itself_started_is_its_own():
    child = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        assert child.pid in conditions._family()
    finally:
        child.kill()
        child.wait()


def test_the_ranks_of_another_run_are_counted_once(no_family, monkeypatch):
    """Of one program; engines of the machine's other programs come and go meanwhile."""
    idle = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = [subprocess.Popen([*idle, *more]) for more in ([conditions.ENGINE], [conditions.ENGINE], [])]
    try:
        started = [psutil.Process(process.pid) for process in processes]
        monkeypatch.setattr(conditions.psutil, "process_iter", lambda: iter(started))
        assert conditions._usage().engines == {started[0].ppid()}
        monkeypatch.setattr(conditions.psutil, "process_iter", lambda: iter(started[2:]))
        assert conditions._usage().engines == set()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_an_interval_too_short_to_tell_repeats_the_last_reading(clock):
    watch = ConditionsWatch(DEVICE)
    clock.now += 0.9 * conditions.MIN_INTERVAL_S
    assert watch.read() == Conditions()
    clock.now += 0.2 * conditions.MIN_INTERVAL_S
    assert watch.read().cores == DEVICE.cores


def test_the_worst_of_two_cases_is_kept():
    calm = Conditions(cores=2, other_cores=0.1, stolen_cores=0.2, other_engines=1, on_battery=True)
    busy = Conditions(cores=2, other_cores=1.5, busiest=("cc1plus",), stolen_cores=0.0, on_battery=False)
    worst = calm.worst(busy)
    assert (worst.other_cores, worst.busiest, worst.stolen_cores) == (1.5, ("cc1plus",), 0.2)
    assert worst.other_engines == 1 and worst.on_battery is True
