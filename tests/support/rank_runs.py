"""Runs over two ranks of this machine, and what is left of them."""

import asyncio
import time
from pathlib import Path

import psutil
from msgspec import Struct

from attention.core import events as on
from attention.core.plan import Plan
from attention.core.results import Case, Peaks, Row
from attention.core.workload import Workload
from fatui.engine_process import Engine
from tests.support.patience import patient

PLANTED = Path(__file__).with_name("planted.py")
RING = Path(__file__).with_name("ring_of_two.json")
"""Two ranks of this machine over MLX's ring, also where there is a GPU: they share it."""
PEAKS = Peaks(matmul_flops_per_s=1e10, copy_bytes_per_s=1e10)
SMALL = Workload(seq=64, heads=2, head_dim=16, dtype="float32")
ON_TWO = Workload(seq=64, heads=2, head_dim=16, dtype="float32", ranks=2)


def plan(*planted: str, cases: tuple[Workload, ...] = (ON_TWO,), **fields: object) -> Plan:
    names = ("baseline", *(f"{PLANTED}:{name}" for name in planted))
    if "hosts" not in fields:
        fields = {"hostfile": str(RING), **fields}
    return Plan(cases=cases, implementations=names, seconds=0.5, **fields)  # type: ignore[arg-type]


class Ran(Struct):
    engine: Engine
    events: list[tuple[float, on.AnyEvent]]

    def case(self, index: int = 0) -> Case:
        return self.engine.record.case(index)

    def row(self, name: str, index: int = 0) -> Row:
        return next(row for row in self.case(index).rows if row.implementation.endswith(name))

    def left_over(self) -> list[int]:
        """Return the processes of the run's ranks that still run."""
        pids = {event.process_id for _, event in self.events if isinstance(event, on.RankStarted)}
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def run(planned: Plan, seconds: float = 120) -> Ran:
    events: list[tuple[float, on.AnyEvent]] = []
    engine = Engine(planned, lambda event: events.append((time.monotonic(), event)), peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), patient(seconds)))
    return Ran(engine, events)
