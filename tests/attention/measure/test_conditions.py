"""What else goes on while a run measures: processes that are not the run's own, and other runs."""

import subprocess
import sys
import time

import pytest

from attention.core.results import Conditions
from attention.measure import conditions
from attention.measure.conditions import ConditionsWatch
from tests.support.stage import DEVICE

SPIN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


@pytest.fixture
def no_family(monkeypatch):
    """Count this process alone as the run's own, so that a child counts as another program."""
    monkeypatch.setattr(conditions, "_family", set)


@pytest.mark.thorough
def test_another_busy_process_is_counted_and_named(no_family):
    watch = ConditionsWatch(DEVICE)
    busy = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.6)
        read = watch.read()
    finally:
        busy.kill()
        busy.wait()
    assert read.other_cores is not None and read.other_cores > 0.1
    assert any("python" in name for name in read.busiest) or len(read.busiest) == conditions.MAX_NAMES
    assert read.cores == DEVICE.cores


def test_what_the_run_itself_started_is_its_own():
    child = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        assert child.pid in conditions._family()
    finally:
        child.kill()
        child.wait()


def test_another_engine_is_counted_once(no_family):
    idle = "import sys, time; sys.argv = ['-m', 'attention.engine.worker']; time.sleep(20)"
    engines = [subprocess.Popen([sys.executable, "-c", idle, conditions.ENGINE]) for _ in range(2)]
    try:
        time.sleep(0.1)
        apart = len(conditions._usage().engines)
        assert apart >= 1
    finally:
        for engine in engines:
            engine.kill()
            engine.wait()
    assert len(conditions._usage().engines) == apart - 1


def test_an_interval_too_short_to_tell_repeats_the_last_reading():
    watch = ConditionsWatch(DEVICE)
    assert watch.read() == Conditions()


def test_the_worst_of_two_cases_is_kept():
    calm = Conditions(cores=2, other_cores=0.1, stolen_cores=0.2, other_engines=1, on_battery=True)
    busy = Conditions(cores=2, other_cores=1.5, busiest=("cc1plus",), stolen_cores=0.0, on_battery=False)
    worst = calm.worst(busy)
    assert (worst.other_cores, worst.busiest, worst.stolen_cores) == (1.5, ("cc1plus",), 0.2)
    assert worst.other_engines == 1 and worst.on_battery is True
