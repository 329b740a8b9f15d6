"""Energies of calls from a counter that moves in steps."""

import sys
import time
import types

import pytest

from attention.core.plan import Assignment, Plan
from attention.core.results import Peaks
from attention.core.workload import Workload
from attention.engine import case_runner
from attention.engine.bench import Bench
from attention.engine.record import record_of
from attention.measure import energy, nvml
from attention.measure.device import Device
from attention.measure.energy import RaplCounter, energy_counter, joules_per_call

CPU = Device(backend="cpu", name="a CPU", cores=2, memory_bytes=1, available_bytes=1)


class Machine:
    """A clock that calls move on, and a counter of what they take, which is read at steps only."""

    def __init__(self, step_s, call_s=0.003, watts=50.0):
        self.now_s, self._step_s, self._call_s, self._watts = 0.0, step_s, call_s, watts

    def make_calls(self):
        self.now_s += 5 * self._call_s
        return 5

    def clock(self):
        return self.now_s

    def counter(self):
        return self._watts * (self.now_s // self._step_s * self._step_s) if self._step_s else 7.0


@pytest.mark.parametrize("step_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("call_s", [0.0001, 0.003, 0.4])
def test_the_energy_of_a_call_is_its_power_times_its_time(step_s, call_s):
    machine = Machine(step_s, call_s)
    measured = joules_per_call(machine.make_calls, machine.counter, clock=machine.clock)
    samples = 5 * call_s / energy.ENERGY_S
    assert measured == pytest.approx(50 * call_s, rel=2 * min(samples, step_s / call_s / 5) + 1e-6)


def test_a_counter_that_stands_still_gives_no_energy():
    machine = Machine(step_s=0)
    assert joules_per_call(machine.make_calls, machine.counter, clock=machine.clock) is None
    assert machine.now_s < 2


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
    found = nvml.open_device()
    assert (found and found[1]) == taken


def test_rows_have_the_energy_of_a_token(monkeypatch):
    """With a counter of 50 W whose steps are 1 ms, and the real calls."""
    counter = lambda: 50 * round(time.monotonic(), 3)  # noqa: E731
    monkeypatch.setattr(case_runner, "energy_counter", lambda device: counter)
    plan = Plan(
        cases=(Workload(seq=16, heads=2, head_dim=16, dtype="float32"),),
        implementations=("baseline", "mlx"),
        seconds=0.05,
    )
    record = record_of(plan)
    peaks = Peaks(matmul_flops_per_s=1e10, copy_bytes_per_s=1e10)
    Bench(Assignment(plan=plan, peaks=peaks), plan, record.apply).run()
    for row in record.case(0).rows:
        assert 0.05 < row.joules_per_token * 16 / (50 * row.call_s.median) < 20  # of another load than the rounds'
