"""The engine on another machine: over a real ssh server, or over a program in ssh's place that runs commands."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.plan import Plan
from attention.core.results import Environment, Peaks, Run
from attention.core.workload import Workload
from fatui import engine_process
from fatui.cli.main import main
from fatui.draft import draft_of
from fatui.engine_process import Engine
from fatui.remote import Greeting, Remote, RemoteError, check, greeting_of, own_greeting, parse_remote
from fatui.remote_host import serve
from fatui.storage.history import RunHistory, summary_of
from fatui.tui import advisor
from fatui.tui.app import FatuiApp
from fatui.tui.view_models.cost import Timing
from tests.support import sshd, two_hosts
from tests.support.marks import slow
from tests.support.patience import patient

PLANTED = Path(__file__).parents[1] / "support" / "planted.py"
PEAKS = Peaks(matmul_flops_per_s=1e10, copy_bytes_per_s=1e10)
SMALL = Workload(seq=32, heads=2, head_dim=16, dtype="float32")
OWN = Greeting(fatui="0.1.0", protocol="aaaa", code="bbbb", mlx="0.32.4", computes_on_cpu=True)
real = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(sshd.unavailable()), reason=sshd.unavailable() or "available"),
]


def plan(*planted, cases=(SMALL,), seconds=0.05, **fields):
    names = ("baseline", *(f"{PLANTED}:{name}" for name in planted))
    return Plan(cases=cases, implementations=names, seconds=seconds, **fields)


def row(engine, name, case=0):
    return next(row for row in engine.record.case(case).rows if row.implementation.endswith(name))


def lost_row(case):
    """Return the one row of three that failed: that of the call that was being executed."""
    assert sorted(each.status for each in case.rows) == ["failed", "ok", "ok"]
    return next(each for each in case.rows if each.status == "failed")


def processes_of(remote):
    """Return what a machine runs for fatui, or has left over: its processes have a home folder of their own."""
    home = remote.python.rpartition("/")[0]
    return [each for each in psutil.process_iter() if _environment(each).get("HOME") == home]


def _environment(process):
    try:
        return process.environ()
    except psutil.Error:  # it has ended, also if it is a zombie
        return {}


def ends(remote, seconds=30):
    """Whether all processes of a machine end within a time."""
    end = time.monotonic() + patient(seconds)
    while processes_of(remote):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def there(tmp_path):
    """Return a machine that is this one, without a server."""
    with sshd.instead_of_ssh(tmp_path):
        yield Remote(host="me@gpu-box", python=sshd.remote_python(tmp_path))


@pytest.mark.parametrize(
    ("host", "name", "given"),
    [
        ("gpu-box", "gpu-box", "-- gpu-box"),
        ("me@gpu-box", "gpu-box", "-- me@gpu-box"),
        ("ssh://me@10.0.0.7:2222", "10.0.0.7", "-- ssh://me@10.0.0.7:2222"),
        ("ssh://gpu-box/", "gpu-box", "-- ssh://gpu-box/"),
        ("::1", "::1", "-- ::1"),
        ("me@fe80::1%eth0", "fe80::1%eth0", "-- me@fe80::1%eth0"),
        ("[::1]", "::1", "-- ::1"),
        ("me@[fe80::1%eth0]:2222", "fe80::1%eth0", "-p 2222 -- me@fe80::1%eth0"),
        ("ssh://me@[::1]:2222", "::1", "-p 2222 -- me@::1"),
    ],
)
def test_the_name_of_a_machine_is_without_user_and_port(host, name, given):
    remote = parse_remote(host)
    assert remote.name == name
    assert f"-T {given} sh" in " ".join(remote.command("greet"))


def test_a_port_after_a_name_is_written_as_ssh_takes_it():
    with pytest.raises(UsageError, match="it takes ssh://gpu-box:2222, or -p PORT HOST"):
        parse_remote("gpu-box:2222")


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b", "me@", "a\nb", "[::1", "[]", "ssh://"])
def test_what_is_no_machine_is_refused(host):
    with pytest.raises(UsageError, match="remote: got"):
        parse_remote(host)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fatui": "0.2.0"}, "gpu-box has fatui 0.2.0, this machine 0.1.0; both need the same"),
        ({"protocol": "cccc"}, "its protocol of events is cccc, here aaaa"),
        ({"mlx": None}, "gpu-box has no MLX; install it there"),
    ],
)
def test_versions_that_cannot_work_together_are_refused(changed, words):
    with pytest.raises(RemoteError, match=words):
        check(structs.replace(OWN, **changed), Remote(host="gpu-box"), OWN)


def test_another_mlx_or_engine_is_mentioned():
    other = structs.replace(OWN, mlx="0.33.0", code="cccc")
    engine, mlx = check(other, Remote(host="gpu-box"), OWN)
    assert "digest cccc, here bbbb" in engine
    assert mlx == "gpu-box has MLX 0.33.0, this machine 0.32.4; its own is measured"


def test_a_machine_of_this_state_is_accepted():
    assert not check(own_greeting(), Remote(host="gpu-box"))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo 'me@gpu-box: Permission denied (publickey).' >&2; exit 255",
            "denied .publickey.; .*: ssh-copy-id gpu-box, or",
        ),
        ("echo 'ssh: connect to host gpu-box port 22: No route to host' >&2; exit 255", "cannot be reached: ssh: conn"),
        ("echo 'python3: No module named fatui' >&2; exit 1", "python3 has no fatui; --python names"),
        ("exit 127", "python3 cannot be started"),
        ('echo \'{"fatui_remote":"greeting","fatui":"9.0"}\'', "another version of fatui than"),
        ("yes", "answers with something else"),
    ],
)
async def test_what_keeps_a_machine_from_use_is_one_line(script, words, tmp_path):
    with sshd.instead_of_ssh(tmp_path, f"#!/bin/sh\n{script}\n"), pytest.raises(RemoteError, match=words) as caught:
        await greeting_of(Remote(host="gpu-box"))
    assert "\n" not in str(caught.value)


async def test_a_run_there_has_its_host_in_rows_and_history(there):
    engine = Engine(plan(), peaks=PEAKS, remote=there)
    await asyncio.wait_for(engine.run(), patient(60))
    assert row(engine, "baseline").status == "ok"
    report = engine.record.report(Run(id="a", started="2026-03-14T12:04:11+00:00", seconds=1.0, command="x"))
    assert report.environment.host == "gpu-box"
    assert report.fingerprint.versions["mlx"]
    assert summary_of(report).device.endswith(" on gpu-box")
    assert await asyncio.to_thread(ends, there)


@pytest.mark.slow
def test_a_command_there_prints_and_keeps_its_rows_here(there, capsys):
    words = ["--python", there.python, there.host, "bench", "--seq", "64", "--seconds", "0.1", "--impl", "baseline"]
    assert main(["remote", *words]) == 0
    assert " on gpu-box" in capsys.readouterr().out
    (line,) = RunHistory().runs()
    command = RunHistory().get(line.id).run.command
    assert command.startswith(f"fatui remote --python {there.python} me@gpu-box bench quick --seq 64")


@pytest.mark.slow
def test_a_whole_command_there_has_its_output_and_code(there, capfdbinary):
    assert main(["remote", "--python", there.python, there.host, "explain", "--seq", "64", "--impl", "nonsense"]) == 2
    assert b"got 'nonsense'" in capfdbinary.readouterr().err
    assert main(["remote", "--python", there.python, there.host, "explain", "--seq", "64"]) == 0
    assert b"what practical chose" in capfdbinary.readouterr().out
    assert ends(there)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "remote: the machine is missing"),
        (["gpu-box", "history"], "'history' runs on this machine; the other runs bench"),
        (["gpu-box", "bench", "--hostfile", "x"], "--hostfile: not taken"),
        (["gpu-box", "bench", "--nonsense"], "--nonsense: not known here"),
        (["gpu-box", "--python", "x"], "options of ssh and --python come before HOST"),
        (["--serve", "nonsense"], "--serve: got 'nonsense'"),
    ],
)
def test_wrong_requests_are_one_line_and_code_2(words, line, capsys):
    assert main(["remote", *words]) == 2
    assert line in capsys.readouterr().err


def test_a_machine_that_cannot_be_reached_is_code_1(tmp_path, capsys):
    with sshd.instead_of_ssh(tmp_path, "#!/bin/sh\necho 'Connection refused' >&2\nexit 255\n"):
        assert main(["remote", "gpu-box", "bench"]) == 1
    assert capsys.readouterr().err == "fatui: gpu-box cannot be reached: Connection refused\n"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "given", ["an environment", slow("an environment/bin/python"), slow("~/an environment"), slow(None)]
)
async def test_fatui_is_found_by_interpreter_environment_or_path(given, tmp_path, monkeypatch):
    """In folders whose names have a space; without --python by the path of the shell there."""
    environment = tmp_path / "an environment"
    (environment / "bin").mkdir(parents=True)
    sshd.remote_python(tmp_path)
    (tmp_path / "remote-python").rename(environment / "bin" / "python")
    (environment / "bin" / "fatui").write_text(f'#!/bin/sh\nexec "{environment}/bin/python" -m fatui "$@"\n')
    (environment / "bin" / "fatui").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is None:
        monkeypatch.setenv("PATH", f"{environment}/bin:/usr/bin:/bin")
    with sshd.instead_of_ssh(tmp_path):
        named = given if given is None or given.startswith("~") else str(tmp_path / given)
        assert await greeting_of(Remote(host="gpu-box", python=named)) == own_greeting()


def test_call_times_are_kept_for_the_machine_that_made_them():
    timing = Timing()
    timing.take(on.RunStarted(environment=Environment(device="NVIDIA H200", host="gpu-box")), plan())
    assert timing.device == "NVIDIA H200 on gpu-box"


@pytest.mark.thorough
async def test_routes_and_device_are_those_of_the_machine(there, monkeypatch):
    monkeypatch.setattr(advisor, "RETRY_S", 0.1)
    answered = asyncio.Event()
    advice = advisor.Advice(answered.set, there)
    asking = asyncio.create_task(advice.run())
    advice.ask(SMALL, ("baseline",))
    try:
        await _until(lambda: advice.answer.routes, 60)
        assert advice.device is not None
        (connection,) = psutil.Process().children()
        connection.kill()
        await _until(lambda: "the connection to gpu-box was cut" in advice.problem, 60)
        assert advice.device is None
        advice.ask(SMALL, ("baseline", "poc"))
        await _until(lambda: "poc" in advice.answer.routes, 60)
        assert not advice.problem
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert await asyncio.to_thread(ends, there)


async def _until(holds, seconds):
    async with asyncio.timeout(patient(seconds)):
        while not holds():
            await asyncio.sleep(0.05)


def test_no_service_has_another_name():
    with pytest.raises(UsageError, match="--serve: got ''"):
        serve([])


@pytest.fixture
def loopback(tmp_path):
    """Return a real server, and this machine as its host."""
    with sshd.Sshd(tmp_path) as server:
        yield server, Remote(host=sshd.HOST, python=sshd.remote_python(tmp_path), ssh=server.options)


class Cut:
    """A listener that does something to the server when a row has made its first call."""

    def __init__(self, server, name, do):
        self.events, self.at, self._server, self._name, self._do = [], 0.0, server, name, do

    def __call__(self, event):
        self.events.append((time.monotonic(), event))
        if isinstance(event, on.MemoryMeasured) and event.implementation.endswith(self._name) and not self.at:
            self.at = time.monotonic()
            asyncio.get_running_loop().call_later(0.8, self._do)  # a beat later, in the rounds

    @property
    def texts(self):
        return [event.text for _, event in self.events if isinstance(event, on.Message)]


@pytest.mark.parametrize("case", [pytest.param("killed", marks=real), pytest.param("dead", marks=real)])
def test_a_cut_connection_costs_one_row(case, loopback):
    """Killed: the server's processes end. Dead: they are stopped, so that nothing comes and nothing closes."""
    server, remote = loopback
    listen = Cut(server, "SleepsLong", server.cut if case == "killed" else lambda: server.signal(signal.SIGSTOP))
    engine = Engine(plan("SleepsLong", "Prints", seconds=3), listen, peaks=PEAKS, remote=remote)
    asyncio.run(asyncio.wait_for(engine.run(), patient(120)))
    assert "the connection to loopback was cut" in lost_row(engine.record.case(0)).reason
    assert engine.record.done
    assert any("was running when the connection was cut; the engine is started again" in text for text in listen.texts)
    assert "connected to loopback again" in listen.texts
    assert engine.record.environment.host == "loopback"
    if case == "dead":
        ended = next(at for at, event in listen.events if isinstance(event, on.RowEnded))
        assert ended - listen.at < patient(60)
        server.cut()
    assert ends(remote)


SSH_INSIDE = """#!/bin/sh
exec ip netns exec {namespace} {ssh} "$@"
"""
far = [*real, pytest.mark.skipif(bool(two_hosts.unavailable()), reason=two_hosts.unavailable() or "available")]


@pytest.fixture
def over_a_network(tmp_path):
    """Return a real server in another network namespace, behind a link with delay and loss, and that as a host."""
    with two_hosts.TwoHosts(tmp_path, delay_s=0.01, loss=0.01) as hosts:
        here, there = hosts.names
        program = SSH_INSIDE.format(namespace=here, ssh=shutil.which("ssh"))
        inside = ("ip", "netns", "exec", there)
        with sshd.Sshd(tmp_path, two_hosts.ADDRESSES[1], inside) as server, sshd.instead_of_ssh(tmp_path, program):
            remote = Remote(host=sshd.HOST, python=sshd.remote_python(tmp_path), ssh=server.options)
            yield hosts, server, remote


@pytest.mark.parametrize("case", [pytest.param("killed", marks=far), pytest.param("link cut", marks=far)])
def test_a_connection_cut_between_two_machines_costs_one_row(case, over_a_network):
    hosts, server, remote = over_a_network
    listen = Cut(server, "SleepsLong", server.cut if case == "killed" else hosts.cut)

    def mend_after_the_row(event):
        listen(event)
        if isinstance(event, on.RowEnded):
            hosts.mend()

    engine = Engine(plan("SleepsLong", "Prints", seconds=3), mend_after_the_row, peaks=PEAKS, remote=remote)
    asyncio.run(asyncio.wait_for(engine.run(), patient(180)))
    assert "the connection to loopback was cut" in lost_row(engine.record.case(0)).reason
    assert engine.record.done
    assert "connected to loopback again" in listen.texts
    ended = next(at for at, event in listen.events if isinstance(event, on.RowEnded))
    assert ended - listen.at < patient(20)
    assert ends(remote)


@pytest.mark.parametrize("size", [pytest.param((120, 40), marks=real)])
async def test_the_app_loses_one_row_and_goes_on(size, loopback):
    server, remote = loopback
    app = FatuiApp(remote=remote)
    async with app.run_test(size=size) as pilot:
        app.set_draft(draft_of(plan("SleepsLong", "Prints", seconds=3), None))
        await _until(lambda: app.device_name.endswith(" on loopback"), 60)
        await pilot.press("r")
        await _until(lambda: app.session.rates, 60)  # in the rounds
        await asyncio.sleep(1)
        server.cut()
        await _until(lambda: "connected to loopback again" in app.journal.text(), 60)
        await _until(lambda: app.report is not None, 60)
        lost = lost_row(app.report.cases[0])
        assert lost.reason.startswith("the connection to loopback was cut")
        assert app.report.run.command.startswith("fatui remote ")
        await _until(lambda: not app.advice.problem, 60)
    assert await asyncio.to_thread(ends, remote)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=real), pytest.param(signal.SIGKILL, marks=real)])
def test_the_end_of_a_command_ends_the_engine_there(number, loopback):
    _, remote = loopback
    command = ["-m", "fatui", "remote", "--python", remote.python, *remote.ssh, remote.host, "bench", "--seconds", "60"]
    with subprocess.Popen(
        [sys.executable, *command, "--seq", "64"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(sshd.ROOT)},
    ) as process:
        assert any(b"case 1 of 1" in line for line in iter(process.stderr.readline, b""))
        assert processes_of(remote)
        os.killpg(process.pid, number)
        process.wait(patient(30))
    assert ends(remote)


@pytest.mark.parametrize("retry_s", [pytest.param(0.2, marks=real)])
def test_a_machine_that_stays_away_ends_the_run(retry_s, loopback, monkeypatch):
    monkeypatch.setattr(engine_process, "RECONNECT_S", 1.0)
    monkeypatch.setattr(engine_process, "RETRY_S", retry_s)
    server, remote = loopback

    connections = []

    def listen(event):
        if isinstance(event, on.MemoryMeasured) and not connections:
            connections.extend(server.connections())
            server.stop()
            for each in connections:
                each.kill()

    engine = Engine(plan("Prints", seconds=3), listen, peaks=PEAKS, remote=remote)
    asyncio.run(asyncio.wait_for(engine.run(), patient(60)))
    server.start()
    assert engine.record.refused.kind == "cannot start"
    assert "loopback cannot be reached" in engine.record.refused.reason
    assert ends(remote)
