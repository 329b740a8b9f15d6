"""Energies of calls from a counter that moves in steps."""

import sys
import threading
import time
import types

import pytest

from attention.core.plan import Assignment, Plan
from attention.core.results import Peaks
from attention.core.workload import Workload
from attention.engine import case_runner
from attention.engine.bench import Bench
from attention.engine.record import record_of
from attention.measure import energy
from attention.measure.device import Device, open_nvml
from attention.measure.energy import EnergyOfCalls, RaplCounter, energy_counter, energy_of_calls, per_call, watts_of
from tests.support.marks import slow
from tests.support.patience import patient
from tests.support.tuning_examples import FakeTime

CPU = Device(backend="cpu", name="a CPU", cores=2, memory_bytes=1, available_bytes=1)


@pytest.mark.parametrize("step_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("call_s", [0.0001, 0.003, 0.4])
def test_the_energy_of_a_call_is_its_power_times_its_time(step_s, call_s):
    calls = [(0.003 + number * call_s, number) for number in range(int(3 / call_s))]
    steps = [(number * step_s, 50 * number * step_s) for number in range(1, int(2.5 / step_s))]
    assert per_call(steps, calls, 0.25) == pytest.approx(50 * call_s)
    assert watts_of(steps, calls) == pytest.approx(50)


def test_a_window_ends_at_the_last_step_that_calls_have_passed():
    calls = [(0.0, 0), (1.0, 10), (2.0, 30)]
    assert per_call([(0.5, 5.0), (1.5, 20.0), (2.5, 90.0)], calls, 0.25) == pytest.approx(15 / 15)
    assert per_call([(0.5, 5.0), (0.7, 20.0)], calls, 0.25) is None
    assert per_call([(0.5, 5.0), (2.5, 20.0)], calls, 0.25) is None


def test_a_slow_counter_is_read_while_the_device_computes():
    """A read between calls would let the device idle, whose energy would count as that of calls.

    Each of the first reads waits for two calls that begin after it, and calls wait for the reads that are due."""
    reads = made = 0
    clock, changed = FakeTime(), threading.Condition()

    def wait_until(holds):
        assert changed.wait_for(holds, timeout=patient(30))

    def counter():
        nonlocal reads
        with changed:
            reads += 1
            changed.notify()
            before = made
            if reads <= 3:
                wait_until(lambda: made >= before + 2)
            return 50 * round(clock.now, 2)

    def make_calls():
        nonlocal made
        with changed:
            wait_until(lambda: made < 50 * (reads + 1))
            made += 1
            clock.now += 0.001
            changed.notify()
        return 1

    joules, call_s, watts = energy_of_calls(make_calls, counter, clock=clock)
    assert watts is not None
    assert watts > 0
    assert joules is not None
    assert joules > 0
    assert call_s == pytest.approx(0.001)
    assert reads > 3


def test_a_counter_that_stands_still_gives_no_energy():
    began = time.perf_counter()
    assert energy_of_calls(lambda: time.sleep(0.01) or 1, lambda: 7.0, 0.02).joules is None
    assert time.perf_counter() - began > energy.LEAD_S


@pytest.mark.parametrize(
    ("call_us", "watts", "problem"),
    [
        (18.3, 126, None),
        (13, 126, None),
        (11.3, 123, "its calls took 0.62 times those of the rounds"),
        (30, 126, "its calls took 1.6 times those of the rounds"),
        (18.3, 740, "740 W, beyond the 700 W of the device"),
    ],
)
def test_energies_of_calls_unlike_the_rounds_are_no_figure(call_us, watts, problem):
    """Calls that were much faster have a lower energy than those whose tokens/s stand beside it."""
    found = EnergyOfCalls(1e-6 * call_us * watts, 1e-6 * call_us, watts)
    assert case_runner.energy_problem(found, 18.3e-6, 700.0) == problem


def package(folder, number, joules, name="package-0", most=1000):
    domain = folder / f"intel-rapl:{number}"
    domain.mkdir(exist_ok=True)
    for file, text in (("name", name), ("energy_uj", int(1e6 * joules)), ("max_energy_range_uj", int(1e6 * most))):
        (domain / file).write_text(f"{text}\n")


def test_packages_are_added_and_wrap_around(tmp_path):
    package(tmp_path, 0, 990)
    package(tmp_path, 1, 5, "package-1")
    package(tmp_path, 2, 700, "psys")
    counter = RaplCounter(tmp_path)
    package(tmp_path, 0, 10)
    package(tmp_path, 1, 6, "package-1")
    package(tmp_path, 2, 900, "psys")
    assert counter() == pytest.approx(20 + 1)


def test_without_a_readable_counter_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy_counter(CPU) is None


@pytest.mark.parametrize(("visible", "taken"), [("", 0), ("3,1", 3), ("GPU-ab", "GPU-ab"), ("nonsense", None)])
def test_the_gpu_is_the_first_that_cuda_sees(visible, taken, monkeypatch):
    library = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda at: at, nvmlDeviceGetHandleByUUID=lambda name: name
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = open_nvml()
    assert (found and found[1]) == taken


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("max_slower", "limit_w", "problem"),
    [
        (1e6, 200.0, None),
        slow(0.1, 200.0, "no energy: its calls took"),
        (1e6, 10.0, "W, beyond the 10 W of the device"),
    ],
)
def test_rows_have_the_energy_of_a_token(max_slower, limit_w, problem, monkeypatch):
    """With calls of a second and 50 W; none if they are slower than the rounds', or if the device cannot take 50 W.

    The real calls are made and measured, too; their figures depend on what else the machine does."""
    counter = lambda: 50 * round(time.monotonic(), 3)  # noqa: E731
    monkeypatch.setattr(case_runner, "energy_counter", lambda device: counter)
    monkeypatch.setattr(case_runner, "MAX_SLOWER", max_slower)
    monkeypatch.setattr(case_runner, "power_limit_w", lambda device: limit_w)

    def measured(*given):
        assert energy_of_calls(*given).call_s > 0
        return EnergyOfCalls(joules=50.0, call_s=1.0, watts=50.0)

    monkeypatch.setattr(case_runner, "energy_of_calls", measured)
    plan = Plan(
        cases=(Workload(seq=16, heads=2, head_dim=16, dtype="float32"),),
        implementations=("baseline", "mlx"),
        seconds=0.05,
    )
    record = record_of(plan)
    peaks = Peaks(matmul_flops_per_s=1e10, copy_bytes_per_s=1e10)
    Bench(Assignment(plan=plan, peaks=peaks), plan, record.apply).run()
    for row in record.case(0).rows:
        assert row.joules_per_token == (50 / 16 if problem is None else None)
    said = [message.text for message in record.log if "no energy" in message.text]
    assert len(said) == (2 if problem else 0)
    assert all(problem in text for text in said)
