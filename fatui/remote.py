"""Another machine on which the engine runs: how it is reached over ssh, what it says of itself, and why it cannot be.

`fatui.remote_host` is started there. Its first line is a `Greeting`; what a service writes and reads after that is the
same as on this machine. An empty line a second from here says that this end still exists.
"""

import asyncio
import contextlib
import functools
import hashlib
import re
import shlex
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Self

import msgspec
from msgspec import Struct

from attention.core import events as on
from attention.core.errors import UsageError, truncated
from attention.core.plan import Assignment
from attention.measure.device import Device, computes_on_cpu, installed_version
from fatui import __version__
from fatui.rank_launch import SSH
from fatui.telemetry import Reading
from fatui.untrusted_text import MAX_SHOWN, escape_all
from fatui.worker_process import PATIENCE_S, Worker

Service = Literal["greet", "engine", "advise", "diagnose", "command"]
PING_S: Final = 1.0
ORPHAN_S: Final = 15.0
"""Seconds without a line from the other end after which both ends take the connection for cut."""
KEPT_ALIVE: Final = ("-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3")
SSH_FAILED: Final = 255
MAX_JUNK_LINES: Final = 1000
"""Lines that a login shell may print before the greeting."""
BRACKETED: Final = re.compile(r"(ssh://)?(?P<user>[^\[\]]+@)?\[(?P<address>[^\[\]@/]+)\](:(?P<port>[0-9]{1,5}))?/?")
"""An IPv6 address in brackets, as in a URL."""
PORT_WITHOUT_SCHEME: Final = re.compile(r"[^:/\[\]]+:[0-9]+")
REMEDIES: Final = {
    "permission denied": "ssh must log in without asking: ssh-copy-id {host}, or ssh-add",
    "host key verification failed": "log in by hand once: ssh {host}",
    "could not resolve": "check the name; ssh's own config gives names to hosts",
}
"""What to do about a failure of ssh, by a part of its message."""


class RemoteError(RuntimeError):
    """Another machine cannot be used; the message is one line."""


class Greeting(Struct, frozen=True, kw_only=True, tag_field="fatui_remote", tag="greeting"):
    """What a machine says of itself before anything else."""

    fatui: str
    protocol: str
    """Digest of the types that go over the connection."""
    code: str
    """Digest of the engine's source."""
    mlx: str | None
    computes_on_cpu: bool


class Beat(Struct, frozen=True, kw_only=True, tag_field="event", tag="remote_beat"):
    """A report of the engine's host that it still runs, once a second."""

    running: str | None = None
    """The implementation whose call is being executed."""
    reading: Reading | None = None


MARK: Final = b'{"fatui_remote":'
BEAT_MARK: Final = b'{"event":"remote_beat"'


class Remote(Struct, frozen=True, kw_only=True):
    """A machine that ssh reaches."""

    host: str
    """As ssh takes it: a name of its config, USER@HOST, or ssh://USER@HOST:PORT; also [ADDRESS]:PORT of IPv6."""
    python: str | None = None
    """The interpreter there, or the folder of its virtual environment; None: the one whose `fatui` is on the path."""
    ssh: tuple[str, ...] = ()
    """Further options of ssh."""
    computes_on_cpu: bool = False
    """Whether MLX's default device there is the CPU."""
    notes: tuple[str, ...] = ()
    """What differs there without harm."""

    @property
    def name(self) -> str:
        """The host without user and port."""
        if bracketed := BRACKETED.fullmatch(self.host):
            return bracketed["address"]
        host = self.host.removeprefix("ssh://").rpartition("@")[2]
        return host.partition(":")[0].rstrip("/") if self.host.startswith("ssh://") else host

    @property
    def _destination(self) -> tuple[str, ...]:
        """What ssh gets: an address in brackets, which it takes in no form, without them, and the port as an option."""
        bracketed = BRACKETED.fullmatch(self.host)
        if bracketed is None:
            return ("--", self.host)
        port = ("-p", bracketed["port"]) if bracketed["port"] else ()
        return (*port, "--", f"{bracketed['user'] or ''}{bracketed['address']}")

    def command(self, service: Service, *words: str) -> tuple[str, ...]:
        """Return the local command that starts a service there."""
        script = f"cd {shlex.quote(str(Path.cwd()))} 2>/dev/null; {self._start(('remote', '--serve', service, *words))}"
        return (*SSH[:1], *self.ssh, *SSH[1:], *KEPT_ALIVE, "-T", *self._destination, shlex.join(["sh", "-c", script]))

    def _start(self, words: tuple[str, ...]) -> str:
        """Return the line of sh that becomes fatui."""
        arguments = shlex.join(words)
        if self.python is not None:
            home = '"$HOME"/' if self.python.startswith("~/") else ""
            path = home + shlex.quote(self.python.removeprefix("~/"))
            return f'p={path}; if [ -d "$p" ]; then p="$p/bin/python"; fi; exec "$p" -m fatui {arguments}'
        return (
            f"if command -v fatui >/dev/null; then exec fatui {arguments}; fi; "
            f'if [ -x "$HOME/.local/bin/fatui" ]; then exec "$HOME/.local/bin/fatui" {arguments}; fi; '
            f"exec python3 -m fatui {arguments}"
        )

    def prefixed(self, command: str) -> str:
        """Return a command of fatui as one that runs on this machine: "fatui remote HOST bench quick"."""
        words = [*(["--python", self.python] if self.python else []), *self.ssh, self.host]
        return f"fatui remote {shlex.join(words)}{command.removeprefix('fatui')}"


def parse_remote(host: str, python: str | None = None, ssh: tuple[str, ...] = ()) -> Remote:
    """Return the machine of a command line.

    Raises:
        UsageError: the name is none.
    """
    remote = Remote(host=host, python=python, ssh=ssh)
    name = remote.name
    if PORT_WITHOUT_SCHEME.fullmatch(host):
        raise UsageError(
            f"remote: got '{truncated(host)}'; with a port it takes ssh://{truncated(host)}, or -p PORT HOST"
        )
    if not name or host.startswith("-") or not host.isprintable() or " " in host or {"[", "]"} & set(name):
        raise UsageError(
            f"remote: got '{truncated(host)}'; it takes a name of ssh's config, USER@HOST, or ssh://HOST:PORT"
        )
    if python is not None and not python.strip():
        raise UsageError("--python: got nothing; it takes an interpreter, or the folder of a virtual environment")
    return remote


def protocol() -> str:
    """Return the digest of the types of what goes over a connection, without their descriptions."""
    made = _without_descriptions(msgspec.json.schema_components([on.AnyEvent, Assignment, Beat, Device]))
    return hashlib.sha256(msgspec.json.encode(made, order="deterministic")).hexdigest()[:12]


def _without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_descriptions(each) for name, each in value.items() if name != "description"}
    return [_without_descriptions(each) for each in value] if isinstance(value, list | tuple) else value


@functools.cache
def own_greeting() -> Greeting:
    """Return what this machine says of itself."""
    from attention.kernels.common.cache import code_fingerprint

    return Greeting(
        fatui=__version__,
        protocol=protocol(),
        code=code_fingerprint(""),
        mlx=installed_version("mlx"),
        computes_on_cpu=computes_on_cpu(),
    )


def check(greeting: Greeting, remote: Remote, own: Greeting | None = None) -> list[str]:
    """Compare a machine's versions with those here; return what differs without harm.

    Raises:
        RemoteError: the two cannot work together.
    """
    own, name = own or own_greeting(), remote.name
    if greeting.fatui != own.fatui:
        raise RemoteError(
            f"{name} has fatui {greeting.fatui}, this machine {own.fatui}; both need the same: "
            f"pip install fatui=={own.fatui} on {name}, or --python names another environment there"
        )
    if greeting.protocol != own.protocol:
        raise RemoteError(
            f"{name} has another state of fatui {own.fatui}: its protocol of events is {greeting.protocol}, here "
            f"{own.protocol}; bring its checkout to the same commit"
        )
    notes = []
    if greeting.mlx is None:
        raise RemoteError(f"{name} has no MLX; install it there: pip install 'fatui[cpu]', or [cuda13] with a GPU")
    if greeting.code != own.code:
        notes.append(
            f"{name} has another state of the engine (digest {greeting.code}, here {own.code}); its own is measured"
        )
    if own.mlx is not None and greeting.mlx != own.mlx:
        notes.append(f"{name} has MLX {greeting.mlx}, this machine {own.mlx}; its own is measured")
    return notes


def decode_beat(line: bytes) -> Beat | None:
    """Return the beat that a line is; None for any other line."""
    if not line.startswith(BEAT_MARK):
        return None
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(line, type=Beat)
    return None


class RemoteWorker(Worker):
    """A service of another machine: its process here is ssh's.

    Attributes:
        greeting: what the machine said of itself; None until then.
    """

    remote: Remote
    service: Service
    greeting: Greeting | None = None
    _heard_s = 0.0
    _junk = 0
    _silent = False

    @classmethod
    async def start_service(cls, remote: Remote, service: Service, run: str | None = None) -> Self:
        """Start a service; its processes here are marked with a run.

        Raises:
            RemoteError: there is no ssh.
        """
        try:
            worker = await cls.start(remote.command(service), run or uuid.uuid4().hex)
        except OSError as error:
            raise RemoteError(f"{remote.name} cannot be reached: ssh cannot be started: {error.strerror}") from error
        worker.remote, worker.service, worker._heard_s = remote, service, time.monotonic()
        return worker

    async def converse(self, take: Callable[[bytes], None], greeted: Callable[[], None] = lambda: None) -> None:
        """Hand on a service's lines until it ends, or the connection does.

        Args:
            take: takes a line.
            greeted: called once after the greeting.

        Raises:
            RemoteError: the two versions cannot work together.
        """

        def take_line(line: bytes) -> None:
            self._heard_s = time.monotonic()
            if self.greeting is not None:
                take(line)
            elif self._greet(line):
                greeted()

        tasks = [
            asyncio.create_task(each)
            for each in (self.read_lines(take_line, lambda: None), self.wait(), self._until_silent(), self._ping())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[1].done():
                await asyncio.wait(tasks[:1], timeout=PATIENCE_S)
            elif tasks[0].done():  # ssh closes its output a moment before it ends
                await asyncio.wait(tasks[1:2], timeout=PATIENCE_S)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _greet(self, line: bytes) -> bool:
        """Take a line before the greeting, which the shell there may have printed; return whether it was it."""
        if not line.startswith(MARK):
            self._junk += 1
            if self._junk > MAX_JUNK_LINES:
                raise RemoteError(f"{self.remote.name} answers with something else than fatui's lines")
            return False
        try:
            greeting = escape_all(msgspec.json.decode(line, type=Greeting), MAX_SHOWN)
        except msgspec.DecodeError as error:
            raise RemoteError(
                f"{self.remote.name} has another version of fatui than {__version__}, whose greeting cannot be read: "
                f"{error}; both need the same"
            ) from error
        check(greeting, self.remote)
        self.greeting = greeting
        return True

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            self.send(b"")

    async def _until_silent(self) -> None:
        """Return once the engine's host, which reports every second, has been silent for too long."""
        while self.service != "engine" or self.greeting is None or time.monotonic() - self._heard_s < ORPHAN_S:
            await asyncio.sleep(PING_S)
        self._silent = True

    @property
    def is_cut(self) -> bool:
        """Whether the connection ended, and not the service; after it has ended."""
        return self._silent or self.process.returncode == SSH_FAILED or (self.process.returncode or 0) < 0

    def failure(self) -> str:
        """Return why the service ended early, after it has ended, in one line."""
        return escape_all(self._failure(), MAX_SHOWN)

    def _failure(self) -> str:
        name, code = self.remote.name, self.process.returncode
        last = truncated(next((line for line in reversed(self._tail.lines) if line.strip()), "")).rstrip(".")
        if self._silent:
            return f"the connection to {name} was cut: nothing has come from it for {ORPHAN_S:.0f} s"
        if self.greeting is not None:
            what = "the connection to {} was cut" if self.is_cut else "fatui ended on {}"
            return what.format(name) + (f": {last}" if last else "")
        return _why_not_reached(self.remote, code, last)


def _why_not_reached(remote: Remote, code: int | None, last: str) -> str:
    name = remote.name
    if code == SSH_FAILED:
        remedy = next((text for part, text in REMEDIES.items() if part in last.lower()), "")
        return f"{name} cannot be reached: {last or 'ssh failed'}" + (
            f"; {remedy.format(host=remote.host)}" if remedy else ""
        )
    python = remote.python or "python3"
    if "No module named" in last:
        absent = last.endswith(("fatui", "fatui'"))
        what = "has no fatui" if absent else f"cannot start fatui: {last}"
        return f"{name}: {python} {what}; --python names the interpreter or the environment there"
    if code in (126, 127):
        return f"{name}: {python} cannot be started ({last}); --python names the interpreter or the environment there"
    return f"{name}: fatui did not start: {last or f'it ended with code {code}'}"


async def greeting_of(remote: Remote) -> Greeting:
    """Connect to a machine once, and return what it says of itself.

    Raises:
        RemoteError: it cannot be used, with the reason.
    """
    worker = await RemoteWorker.start_service(remote, "greet")
    try:
        await worker.converse(lambda line: None)
    finally:
        await worker.end()
    if worker.greeting is None:
        raise RemoteError(worker.failure())
    return worker.greeting
