"""The workload that opens first: chosen by a timed call, on simulated machines and for the command line."""

import asyncio

import pytest

from attention.core import events as on
from attention.core.results import Environment
from attention.core.workload import Workload
from attention.engine import cost
from fatui import fitting
from fatui.cli import bench, main

GIB = 2**30
MACHINES = {
    "a phone's core": (2e8, 0.0, 4 * GIB),
    "two cores": (8e8, 1e-4, 16 * GIB),
    "a workstation": (5e10, 1e-4, 64 * GIB),
    "a laptop's GPU": (3e12, 1e-4, 16 * GIB),
    "a server's GPU": (6e13, 3e-5, 141 * GIB),
}
"""FLOP/s of the reference, seconds before each call, and memory."""


def call_s(machine, workload):
    rate, before, _ = MACHINES[machine]
    return before + workload.flops / rate


@pytest.mark.parametrize("machine", MACHINES)
def test_the_table_is_soon_there_on_any_machine(machine):
    timed = cost.smaller(fitting.TIMED, cost.FIRST_FLOPS)
    if call_s(machine, timed) * fitting.TIMED.flops / timed.flops <= cost.MAX_CALL_S:
        timed = fitting.TIMED
    found = fitting.fitting(timed.flops, call_s(machine, timed), MACHINES[machine][2])
    slow = found.workload.seq == 64
    assert slow or call_s(machine, found.workload) <= fitting.CALL_S
    assert found.call_s == pytest.approx(call_s(machine, found.workload), rel=0.5)


def test_a_faster_machine_gets_more_work():
    sizes = [fitting.fitting(1e9, 1e9 / rate, memory).workload.flops for rate, _, memory in MACHINES.values()]
    assert sizes == sorted(sizes)
    assert sizes[0] == Workload(seq=64).flops
    assert sizes[-1] == Workload(batch=16, seq=4096).flops


@pytest.mark.parametrize(("memory", "batch", "seq"), [(0, 1, 4096), (2 * GIB, 1, 2048), (32 * GIB, 4, 4096)])
def test_scores_take_a_quarter_of_the_memory_at_most(memory, batch, seq):
    size = fitting.fitting(1e12, 1e-3, memory).workload
    assert (size.batch, size.seq) == (batch, seq)


class Engine:
    """An engine whose calls take what is said."""

    def __init__(self, plan, listener, calls=(), seconds=0.0):
        self.plan, self.listener, self.calls, self.seconds, self.killed = plan, listener, calls, seconds, False

    async def run(self):
        self.listener(on.RunStarted(environment=Environment(device="Test", memory_bytes=16 * GIB)))
        for flops, seconds in self.calls:
            self.listener(on.CallTimed(case=0, implementation="baseline", flops=flops, seconds=seconds))
        await asyncio.sleep(self.seconds)

    def kill(self):
        self.killed = True


def found(**options):
    made = []

    def make(plan, listener):
        made.append(Engine(plan, listener, **options))
        return made[-1]

    return asyncio.run(fitting.find(make)), made[0]


def test_a_call_of_the_reference_is_timed():
    fit, engine = found(calls=[(10**8, 0.1)])
    assert engine.plan.implementations == ("baseline",)
    assert engine.killed
    assert (fit.workload.batch, fit.workload.seq) == (1, 64)
    assert fit.call_s == pytest.approx(fit.workload.flops * 1e-9)


def test_a_machine_that_cannot_be_timed_has_no_fit(monkeypatch):
    assert found()[0] is None
    monkeypatch.setattr(fitting, "LIMIT_S", 0.01)
    fit, engine = found(seconds=60.0)
    assert fit is None
    assert engine.killed


FIT = fitting.Fit(Workload(batch=4, seq=2048), 0.021)


@pytest.fixture
def planned(monkeypatch):
    """Return the plan and the command that `fatui bench` would run on a machine with a given fit."""

    def command(*words, fit=FIT):
        requested, ran = [], []

        async def find(make):
            requested.append(make)
            return fit

        monkeypatch.setattr(fitting, "find", find)
        monkeypatch.setattr("fatui.cli.run.run_plan", lambda *given: ran.append(given) or 0)
        assert main.main(["bench", *words]) == 0
        return ran[0][0], ran[0][1], bool(requested)

    return command


def test_bench_alone_measures_what_fits(planned, capsys):
    plan, command, _ = planned()
    (case,) = plan.cases
    assert (case.batch, case.seq, case.heads, case.head_dim) == (4, 2048, 8, 64)
    assert command == "fatui bench quick --batch 4 --seq 2048 --head-dim 64"
    assert "batch 4, length 2048 fit this machine: a call of baseline takes about 21" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("quick",), ("--seq", "128"), ("--mask", "causal"), ("--ranks", "1")])
def test_bench_of_a_preset_or_shape_measures_that(planned, words):
    plan, _, requested = planned(*words)
    assert not requested
    assert (plan.cases[0].batch, plan.cases[0].seq) == (1, 128)


def test_bench_without_a_fit_measures_quick(planned):
    plan, command, _ = planned("--seconds", "1", fit=None)
    assert (plan.cases[0].seq, plan.seconds) == (128, 1)
    assert command == "fatui bench quick --seconds 1"


def test_bench_still_reports_all_mistakes_first(capsys):
    assert bench.DEFAULT_PRESET == "quick"
    assert main.main(["bench", "--impl", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
