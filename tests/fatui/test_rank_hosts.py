"""Runs over two hosts: two network namespaces, `ssh` between them, and a link with delay and loss that can be cut."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attention.core import events as on
from attention.core.workload import Workload
from attention.distributed.decision import Link, decide
from fatui.engine_process import Engine
from tests.support.rank_runs import PEAKS, Ran, plan
from tests.support.two_hosts import TwoHosts, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available")]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with TwoHosts(tmp_path, delay_s=0.001, loss=0.003) as made, made.reachable_by_ssh():
        yield made


def test_two_hosts_with_delay_and_loss_run_a_case(hosts: TwoHosts) -> None:
    events: list[tuple[float, on.AnyEvent]] = []
    engine = Engine(plan(hostfile=hosts.hostfile()), lambda event: events.append((0.0, event)), peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), 100))
    ran = Ran(engine, events)
    assert ran.row("baseline").status == "ok"
    assert ran.row("baseline").exposed_s
    assert not ran.left_over()


SLOW_BYTES_PER_S = 2e7
WIDE = Workload(seq=32, heads=256, head_dim=64, dtype="float32", ranks=2)
"""Many bytes for little computation."""


def test_a_slow_link_is_measured_and_its_cost_predicted(tmp_path: Path) -> None:
    """The bandwidth that the group measures, put into the planner's arithmetic, gives the time that is exposed."""
    events: list[on.AnyEvent] = []
    with TwoHosts(tmp_path, bytes_per_s=SLOW_BYTES_PER_S) as hosts, hosts.reachable_by_ssh():
        planned = plan(cases=(WIDE,), hostfile=hosts.hostfile())
        engine = Engine(planned, events.append, peaks=PEAKS)
        asyncio.run(asyncio.wait_for(engine.run(), 200))
    text = next(event.text for event in events if isinstance(event, on.Message) and "a link of" in event.text)
    measured = 1e9 * float(text.partition("a link of ")[2].split()[0])
    assert SLOW_BYTES_PER_S / 2 < measured < 1.3 * SLOW_BYTES_PER_S
    decision = decide(WIDE, 2, sharded_by="sequence", link=Link(bytes_per_s=measured), flops_per_s=1e15)
    (row,) = engine.record.case(0).rows
    assert row.sent_bytes == sum(decision.bytes_sent)
    assert row.exposed_s is not None
    assert 0.5 < row.exposed_s / decision.option.exposed_s < 3  # the link's process shares the cores with the ranks


def test_a_cut_link_costs_a_row_within_15_s_and_leaves_no_rank(hosts: TwoHosts) -> None:
    events: list[tuple[float, on.AnyEvent]] = []
    cut_s = 0.0

    def listen(event: on.AnyEvent) -> None:
        nonlocal cut_s
        events.append((time.monotonic(), event))
        if isinstance(event, on.FirstCall) and event.implementation.endswith("Sleeps") and not cut_s:
            cut_s = time.monotonic()
            hosts.cut()
        elif isinstance(event, on.RowEnded):
            hosts.mend()

    engine = Engine(plan("Sleeps", "Prints", hostfile=hosts.hostfile()), listen, peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), 200))
    ran = Ran(engine, events)
    ended = next(at for at, event in events if isinstance(event, on.RowEnded))
    assert ended - cut_s < 15
    assert "the link 10.213.77." in (ran.row("Sleeps").reason or "")
    assert ran.row("Prints").status == ran.row("baseline").status == "ok"
    assert not ran.left_over()


def test_a_link_cut_in_the_middle_of_a_transfer_costs_a_row(tmp_path: Path) -> None:
    events: list[tuple[float, on.AnyEvent]] = []
    cut_s: list[float] = []
    with TwoHosts(tmp_path, bytes_per_s=1e6) as hosts, hosts.reachable_by_ssh():

        def cut() -> None:
            hosts.cut()
            cut_s.append(time.monotonic())

        def listen(event: on.AnyEvent) -> None:
            events.append((time.monotonic(), event))
            if isinstance(event, on.StepStarted) and event.implementation.endswith("Sleeps") and not cut_s:
                asyncio.get_running_loop().call_later(1.0, cut)  # of the 4 s that keys and values take
            elif isinstance(event, on.RowEnded):
                hosts.mend()

        engine = Engine(plan("Sleeps", "Prints", cases=(WIDE,), hostfile=hosts.hostfile()), listen, peaks=PEAKS)
        asyncio.run(asyncio.wait_for(engine.run(), 300))
    ran = Ran(engine, events)
    assert not any(isinstance(event, on.FirstCall) and event.implementation.endswith("Sleeps") for _, event in events)
    ended = next(at for at, event in events if isinstance(event, on.RowEnded))
    assert ended - cut_s[0] < 15
    assert "the link 10.213.77." in (ran.row("Sleeps").reason or "")
    assert ran.row("baseline").status == "ok"
    assert not ran.left_over()
