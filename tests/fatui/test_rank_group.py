"""What is concluded from the events, ends and silences of ranks, and how they are started."""

import json
import socket
from pathlib import Path

import pytest

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.plan import RunOptions
from fatui import rank_group
from fatui.rank_group import GroupWatch
from fatui.rank_launch import hosts_of, parse_hosts, rank_launches, read_hostfile


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def started(rank: int, **fields: str) -> on.RankStarted:
    known = {"host": "vm", "device": "a CPU", "backend": "cpu", "code": "c0de", "mlx": "1.0", "python": "3.11"}
    return on.RankStarted(rank=rank, process_id=10 + rank, **(known | fields))


def alive(rank: int, **fields: object) -> on.RankAlive:
    return on.RankAlive(rank=rank, **({"commands": 3, "busy": False} | fields))  # type: ignore[arg-type]


class Watched:
    """Two ranks that have started and joined."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.watch = GroupWatch(rank_launches(2, parse_hosts("127.0.0.1,127.0.0.1")), self.clock)
        for rank in (0, 1):
            self.watch.take(rank, started(rank))
            self.watch.take(rank, alive(rank))

    def beat(self, times: int, *reports: on.RankAlive) -> None:
        for _ in range(times):
            self.clock.now += 1
            for report in reports:
                self.watch.take(report.rank, report)
            self.watch.beat()

    def verdict(self) -> str:
        self.clock.now += rank_group.GRACE_S
        fault = self.watch.verdict
        return fault.reason if fault else ""


@pytest.fixture
def pair() -> Watched:
    return Watched()


def test_ranks_that_report_are_well(pair: Watched) -> None:
    pair.beat(100, alive(0), alive(1))
    assert not pair.verdict()


def test_a_rank_without_a_word_is_lost(pair: Watched) -> None:
    pair.beat(rank_group.LOST_BEATS, alive(0))
    assert not pair.verdict()
    pair.beat(1, alive(0))
    assert pair.verdict().startswith("rank 1 has not answered")


def test_the_cause_outweighs_what_others_notice_before_it(pair: Watched) -> None:
    lost = on.RankFailed(rank=0, reason="connection to a peer was lost", running="poc", lost_peer=True)
    pair.watch.take(0, lost)
    pair.watch.end(1, -9, "killed by signal 9 (SIGKILL)")
    assert pair.verdict() == "rank 1: killed by signal 9 (SIGKILL)"
    assert pair.watch.verdict is not None
    assert pair.watch.verdict.running == "poc"


def test_there_is_no_verdict_before_the_cause_had_time_to_come(pair: Watched) -> None:
    pair.watch.take(1, on.RankFailed(rank=1, reason="out of memory"))
    assert pair.watch.verdict is None
    assert pair.verdict() == "rank 1: out of memory"


def test_a_silent_link_is_named_with_its_ends(pair: Watched) -> None:
    pair.beat(1, alive(0), alive(1, silent_link_s=9.0))
    assert pair.verdict().startswith("nothing has come from rank 0 to rank 1 for 9 s: the link 127.0.0.1 to 127.0.0.1")


def test_a_command_that_does_not_arrive_is_noticed(pair: Watched) -> None:
    pair.beat(rank_group.STALL_BEATS + 1, alive(0, commands=4, busy=True), alive(1))
    assert pair.verdict().startswith("nothing that rank 0 sends has reached rank 1")


def test_a_crash_belongs_to_the_step_begun_after_the_report(pair: Watched) -> None:
    pair.watch.take(0, alive(0, busy=True, running="baseline"))
    pair.watch.take(0, on.StepStarted(case=0, implementation="poc", step="first call"))
    pair.watch.end(0, 255, "the engine ended with code 255")
    pair.clock.now += rank_group.GRACE_S
    assert pair.watch.verdict is not None
    assert pair.watch.verdict.running == "poc"


def test_a_long_command_that_both_execute_is_no_fault(pair: Watched) -> None:
    pair.beat(1000, alive(0, busy=True), alive(1, busy=True))
    assert not pair.verdict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mlx": "0.9"}, "rank 1 has MLX 0.9, rank 0 1.0"),
        ({"code": "beef"}, "rank 1 has another version of fatui, with the digest beef, rank 0 c0de"),
        ({"backend": "cuda"}, "rank 0 found no GPU; each rank needs its own"),
    ],
)
def test_ranks_must_be_alike(fields: dict[str, str], words: str) -> None:
    for order in ((0, 1), (1, 0)):
        clock = Clock()
        watch = GroupWatch(rank_launches(2, None), clock)
        for rank in order:
            watch.take(rank, started(rank, **(fields if rank else {})))
        clock.now = 2.0
        assert watch.verdict is not None
        assert watch.verdict.reason == words
        assert watch.verdict.fatal


def test_ranks_of_this_machine_have_ports_of_their_own() -> None:
    launches = rank_launches(3, None)
    addresses = launches[0].setting.addresses
    assert len(set(addresses)) == 3
    assert [launch.setting.place for launch in launches] == [0, 1, 2]
    assert all(launch.setting.addresses == addresses for launch in launches)


def test_hosts_take_their_ranks_in_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    hosts = [{"ssh": "mac-a", "ips": ["10.0.0.1"]}, {"ssh": "mac-b", "ips": ["10.0.0.2"]}]
    path.write_text(json.dumps({"backend": "ring", "envs": ["A=b c"], "hosts": hosts}))
    launches = rank_launches(4, read_hostfile(str(path)))
    assert [launch.where for launch in launches] == [
        *("rank 0 (mac-a)", "rank 1 (mac-a)"),
        *("rank 2 (mac-b)", "rank 3 (mac-b)"),
    ]
    assert launches[0].setting.addresses == ("10.0.0.1:32323", "10.0.0.1:32324", "10.0.0.2:32325", "10.0.0.2:32326")
    assert launches[3].command[-2] == "mac-b"
    assert "export 'A=b c'; exec " in launches[3].command[-1]


def test_fewer_ranks_than_hosts_run_on_the_first() -> None:
    (only,) = rank_launches(1, parse_hosts("127.0.0.1,nowhere.invalid"))
    assert only.host.name == "127.0.0.1"


def test_the_address_of_a_host_leaves_out_the_user() -> None:
    (only,) = rank_launches(1, parse_hosts("me@localhost:4000"))
    assert only.setting.addresses == ("127.0.0.1:4000",)
    assert "me@localhost" in only.command


def unknown(host: bytes) -> str:
    """Answer as a resolver that knows no name; a real one may be slow, or answer any."""
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("name", ["a..b", "a" * 70 + ".invalid", "nowhere.invalid"])
def test_a_host_without_an_address_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda host: unknown(host.encode("idna")))
    with pytest.raises(UsageError, match=f"hosts: '{name[:40]}.*has no address"):
        rank_launches(1, parse_hosts(name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hosts": ("-oProxyCommand=x",)}, "hosts: got '-oProxyCommand=x'"),
        ({"hosts": ("a:0",)}, "hosts: got 'a:0'"),
        ({"hosts": ("a",), "hostfile": "b"}, "--hosts and --hostfile"),
        ({"hostfile": "nowhere.json"}, "^hostfile: nowhere.json cannot be read: No such file or directory$"),
    ],
)
def test_wrong_hosts_are_refused_in_a_line(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        hosts_of(RunOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["[]", "{}", '{"hosts": [{"ips": []}]}', '{"hosts": [{"ssh": "-x"}]}', "nonsense"])
def test_what_is_no_hostfile_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="hostfile: "):
        read_hostfile(str(path))


def test_ranks_must_be_a_multiple_of_the_hosts() -> None:
    with pytest.raises(UsageError, match="ranks: got 3 on 2 hosts"):
        rank_launches(3, parse_hosts("127.0.0.1,localhost"))
