"""Runs over several ranks on the ring backend: figures of each rank, and failures that cost one row."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import mlx.core as mx
import pytest

from attention.core import events as on
from attention.core.plan import GenerationPlan
from attention.core.workload import Workload, generations
from fatui import rank_launch
from fatui.engine_process import Engine
from fatui.rank_launch import RankLaunch
from tests.support.patience import patient
from tests.support.rank_runs import ON_TWO, PEAKS, PLANTED, RING, SMALL, Ran, plan, run
from tests.support.sshd import instead_of_ssh


@pytest.fixture(scope="module")
def two_ranks() -> Ran:
    return run(plan("KeepsScratch", cases=(SMALL, ON_TWO)))


@pytest.mark.thorough
def test_a_rows_memory_is_that_of_its_largest_rank(two_ranks: Ran) -> None:
    for name in ("baseline", "KeepsScratch"):
        row = two_ranks.row(name, 1)
        assert row.peak_bytes == max(each.peak_bytes or 0 for each in row.per_rank)


@pytest.mark.thorough
def test_each_rank_has_its_time_waiting_and_bytes(two_ranks: Ran) -> None:
    row = two_ranks.row("baseline", 1)
    assert row.status == "ok"
    assert [each.rank for each in row.per_rank] == [0, 1]
    assert all(each.call_s > 0 and each.compute_s and each.sent_bytes for each in row.per_rank)


@pytest.mark.thorough
def test_one_device_is_timed_in_the_same_rounds(two_ranks: Ran) -> None:
    assert two_ranks.row("baseline", 1).one_device_s is not None
    assert two_ranks.row("baseline").one_device_s is None


@pytest.mark.thorough
def test_efficiency_is_relative_to_all_ranks_devices(two_ranks: Ran) -> None:
    row = two_ranks.row("baseline", 1)
    assert row.flops_per_s is not None
    assert row.efficiency == pytest.approx(row.flops_per_s / 2 / PEAKS.flops_per_s)
    assert (two_ranks.engine.record.environment.device or "").startswith("2 x ")


@pytest.mark.thorough
def test_no_rank_is_left_after_the_run(two_ranks: Ran) -> None:
    assert not two_ranks.left_over()


FAULTS = {
    "KilledOnRankOne": "rank 1: killed by signal 9 (SIGKILL)",
    "StoppedOnRankOne": "rank 1 has not answered for",
    "OutOfMemoryOnRankOne": "rank 1: RuntimeError: [cuda] out of memory: 68719476736 bytes",
    "ExitsOnRankOne": "rank 1: SystemExit: planted exit",
    "OtherRouteOnRankOne": "rank 1: it would run B=1 L=64",
}


@pytest.fixture(scope="module")
def faulty_run() -> Ran:
    return run(plan(*FAULTS))


@pytest.mark.slow
@pytest.mark.parametrize("planted", FAULTS)
def test_a_failing_rank_costs_one_row(faulty_run: Ran, planted: str) -> None:
    row = faulty_run.row(planted)
    assert row.status == "failed"
    assert row.reason is not None
    assert row.reason.startswith(FAULTS[planted])
    assert "\n" not in row.reason


@pytest.mark.slow
def test_the_others_go_on_after_failing_ranks(faulty_run: Ran) -> None:
    assert faulty_run.row("baseline").status == "ok"
    assert not faulty_run.left_over()


@pytest.mark.slow
def test_each_failure_is_reported_within_15_s(faulty_run: Ran) -> None:
    """From the last step of the row, or the start of the case before its first, to its end."""
    steps: dict[str, float] = {}
    for at, event in faulty_run.events:
        if isinstance(event, on.CaseStarted):
            steps = dict.fromkeys(steps, at) | {f"{PLANTED}:{name}": at for name in FAULTS}
        elif isinstance(event, on.StepStarted):
            steps[event.implementation] = at
        elif isinstance(event, on.RowEnded):
            assert at - steps[event.implementation] < patient(15)


@pytest.mark.slow
def test_a_crash_on_the_only_host_costs_one_row(tmp_path: Path) -> None:
    with instead_of_ssh(tmp_path):
        ran = run(plan("KilledAtOnce", "Prints", cases=(SMALL,), hosts=("127.0.0.2",)))
    assert ran.row("KilledAtOnce").status == "failed"
    assert ran.row("baseline").status == ran.row("Prints").status == "ok"


def test_hosts_without_ssh_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = run(plan(cases=(SMALL,), hosts=("127.0.0.2",))).engine.record.refused
    assert refused is not None
    assert "rank 0 (127.0.0.2): ssh cannot be started: No such file or directory" in refused.reason


STEP_ON_TWO = Workload(kv_seq=512, heads=2, head_dim=16, dtype="float32", pass_="decode", ranks=2)
WHILE_MERGING = {
    "KilledWhileMerging": "rank 1: killed by signal 9 (SIGKILL)",
    "StoppedWhileMerging": "rank 1 has not answered for",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [STEP_ON_TWO, ON_TWO], ids=["decode step", "prefill"])
def test_a_rank_lost_while_it_waits_for_others_costs_one_row(case: Workload) -> None:
    ran = run(plan(*WHILE_MERGING, cases=(case,)))
    late_s = {}
    for at, event in ran.events:
        if isinstance(event, on.StepStarted):
            late_s[event.implementation] = at
        elif isinstance(event, on.RowEnded):
            assert at - late_s[event.implementation] < patient(15)
    for name, words in WHILE_MERGING.items():
        row = ran.row(name)
        assert row.status == "failed"
        assert (row.reason or "").startswith(words)
        assert "\n" not in (row.reason or "")
    assert ran.row("baseline").status == "ok", ran.row("baseline").reason
    assert not ran.left_over()


@pytest.mark.slow
def test_a_model_runs_over_two_ranks_beside_one_device() -> None:
    fields = {"model": "tiny-llama", "dtype": "float32", "generate": 4, "ranks": 2}
    cases = generations(2, prompts=[128], batches=[1], **fields)
    planned = GenerationPlan(cases=cases, implementations=("baseline", "mlx", "demo"), seconds=0.5, hostfile=str(RING))
    engine = Engine(planned, peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), patient(120)))
    for index in range(2):
        row, without_logsumexp, tuned = engine.record.case(index).rows
        assert without_logsumexp.status == "unsupported"
        assert tuned.path not in (None, "x2 not tried yet")
        assert row.status == "ok"
        assert row.one_device_s is not None
        assert row.sent_bytes


@pytest.mark.slow
@pytest.mark.skipif(mx.distributed.is_available("nccl"), reason="this MLX has NCCL")
def test_an_mlx_without_nccl_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(RING.read_text().replace('"ring"', '"nccl"'))
    ran = run(plan(hostfile=str(path)))
    assert ran.engine.record.refused is not None
    words = "this MLX has no distributed backend 'nccl'; mlx[cuda12] and mlx[cuda13] have NCCL"
    assert words in ran.engine.record.refused.reason
    assert not ran.left_over()


@pytest.mark.slow
def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = run(plan(hosts=("127.0.0.1", f"127.0.0.1:{port}")))
    assert ran.engine.record.refused is not None
    assert f"rank 1: its address 127.0.0.1:{port} is in use" in ran.engine.record.refused.reason
    assert not ran.left_over()


@pytest.mark.slow
def test_a_rank_lost_before_the_first_case_is_reported() -> None:
    events: list[tuple[float, on.AnyEvent]] = []
    killed: list[int] = []

    def listen(event: on.AnyEvent) -> None:
        events.append((time.monotonic(), event))
        if isinstance(event, on.RankStarted) and event.rank == 1 and not killed:
            killed.append(event.process_id)
            os.kill(event.process_id, signal.SIGKILL)

    engine = Engine(plan(), listen, peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), patient(120)))
    ran = Ran(engine, events)
    texts = [event.text for _, event in events if isinstance(event, on.Message)]
    words = "rank 1: killed by signal 9 (SIGKILL)"
    assert [text for text in texts if text.startswith(words) and text.endswith("the group of ranks is formed again")]
    assert ran.row("baseline").status == "ok"
    assert not ran.left_over()


DIFFERING = """import sys
from attention.core import events
from attention.engine import worker
started = events.RankStarted
events.RankStarted = lambda **fields: started(**(fields | {{"{field}": "0.1"}} if fields["rank"] else fields))
sys.exit(worker.main())"""


@pytest.mark.slow
@pytest.mark.parametrize(("field", "words"), [("mlx", "MLX 0.1"), ("code", "another version of fatui")])
def test_ranks_of_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch, field: str, words: str) -> None:
    def differing(launch: RankLaunch) -> RankLaunch:
        script = DIFFERING.format(field=field)
        return RankLaunch(
            setting=launch.setting,
            host=launch.host,
            command=(launch.command[0], "-c", script, *launch.command[3:]),
            where=launch.where,
        )

    launches = rank_launch.rank_launches
    monkeypatch.setattr(rank_launch, "rank_launches", lambda *given: [differing(each) for each in launches(*given)])
    ran = run(plan(cases=(ON_TWO, SMALL)))
    assert ran.row("baseline", 0).status == "failed"
    assert words in (ran.row("baseline", 0).reason or "")
    assert ran.row("baseline", 1).status == "ok"
