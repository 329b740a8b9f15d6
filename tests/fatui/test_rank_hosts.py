"""Runs over two hosts: two network namespaces, `ssh` between them, and a link with delay and loss that can be cut."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attention.core import events as on
from fatui.engine_process import Engine
from tests.fatui.test_ranks import PEAKS, Ran, plan
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
