"""How the ranks of a run over several devices are started: on this machine, or on hosts over ssh.

Hostfiles, addresses and environment variables are those of `mlx.launch`. Each rank is a process with pipes of its own,
so that its events, its last words and its end are known apart from the others'.
"""

import json
import shlex
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from attention.core.errors import UsageError
from attention.core.files import expand_home, read_bounded
from attention.core.plan import Blas, RankSetting, RunOptions

STARTING_PORT: Final = 32323
"""The first port of ranks on other hosts, as in `mlx.launch`."""
COORDINATOR_PORT: Final = 12345
ORPHAN_S: Final = 15.0
"""Seconds after which a rank on another host ends by itself if its connection is cut."""
LOCAL: Final = ("127.0.0.1", "localhost")
BACKENDS: Final = ("ring", "nccl", "jaccl")
MAX_HOSTFILE_BYTES: Final = 2**20
SSH: Final = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=8", "-o", "LogLevel=ERROR")
KEYS: Final = ("ssh", "ips", "rdma")


class Host(Struct, frozen=True, kw_only=True):
    """A machine on which one rank runs."""

    name: str
    """Its name for ssh; this machine for LOCAL."""
    ip: str | None = None
    """Address that the other ranks reach; None is looked up from the name."""
    port: int | None = None
    rdma: tuple[str | None, ...] = ()

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return self.name in LOCAL

    @property
    def address(self) -> str:
        """Return its IP address.

        Raises:
            UsageError: its name is not known.
        """
        try:
            return self.ip or socket.gethostbyname(self.name.rpartition("@")[2])
        except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, such as "a..b"
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"hosts: '{self.name[:60]}' has no address: {reason}") from error


class Hosts(Struct, frozen=True, kw_only=True):
    """The machines of a run."""

    hosts: tuple[Host, ...]
    backend: str | None = None
    environment: tuple[str, ...] = ()
    """NAME=VALUE for the ranks on other hosts."""
    python: str = sys.executable


class RankLaunch(Struct, frozen=True, kw_only=True):
    """How one rank is started."""

    setting: RankSetting
    host: Host
    command: tuple[str, ...]
    where: str
    """The rank in messages: "rank 1", "rank 1 (mac-b)"."""


def parse_hosts(text: str) -> Hosts:
    """Parse "a,b" or "10.0.0.1:4000,10.0.0.2:4000": names for ssh, each with the port of its rank if needed.

    Raises:
        UsageError: a part is empty, or its port is no port.
    """
    hosts = []
    for part in (part.strip() for part in text.split(",")):
        name, colon, port = part.partition(":")
        if not name or name.startswith("-") or (colon and not _is_port(port)):
            raise UsageError(f"hosts: got '{part[:60]}'; it takes HOST or HOST:PORT, with commas between them")
        hosts.append(Host(name=name, port=int(port) if colon else None))
    return Hosts(hosts=tuple(hosts))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 2**16


def read_hostfile(path: str) -> Hosts:
    """Read a hostfile of `mlx.launch`: {"backend": ..., "envs": [...], "hosts": [{"ssh": ..., "ips": [...]}, ...]}.

    A further key "python" names the interpreter on the hosts; by default it has the path of this one.

    Raises:
        UsageError: the file cannot be read, or is no hostfile.
    """
    try:
        content: Any = json.loads(read_bounded(expand_home(Path(path)), MAX_HOSTFILE_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(f"hostfile: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    document = {"hosts": content} if isinstance(content, list) else content
    if not isinstance(document, dict) or not isinstance(document.get("hosts"), list) or not document["hosts"]:
        raise UsageError(f"hostfile: {path} has no list of hosts; `mlx.distributed_config` writes such files")
    backend = document.get("backend") or None
    if backend == "jaccl-ring":
        backend = "jaccl"
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"hostfile: {path}: backend: got '{backend}'; it takes {', '.join(BACKENDS)}")
    return Hosts(
        hosts=tuple(_host(number, each, path) for number, each in enumerate(document["hosts"], start=1)),
        backend=backend,
        environment=tuple(map(str, document.get("envs", ()))),
        python=str(document.get("python", sys.executable)),
    )


def _host(number: int, entry: object, path: str) -> Host:
    wrong = UsageError(f'hostfile: {path}: host {number}: it takes {{"ssh": NAME, "ips": [ADDRESS]}}')
    if not isinstance(entry, dict) or not isinstance(entry.get("ssh"), str) or entry["ssh"].startswith("-"):
        raise wrong
    ips, rdma = entry.get("ips", []), entry.get("rdma", [])
    if not isinstance(ips, list) or not isinstance(rdma, list) or not all(isinstance(ip, str) for ip in ips):
        raise wrong
    return Host(name=entry["ssh"], ip=ips[0] if ips else None, rdma=tuple(rdma))


def hosts_of(options: RunOptions) -> Hosts | None:
    """Return the hosts of a run; None for ranks on this machine.

    Raises:
        UsageError: both kinds of lists are given, or one is wrong.
    """
    if options.hosts and options.hostfile is not None:
        raise UsageError("hosts: got --hosts and --hostfile; it takes one of them")
    if options.hostfile is not None:
        return read_hostfile(options.hostfile)
    return parse_hosts(",".join(options.hosts)) if options.hosts else None


def rank_launches(ranks: int, hosts: Hosts | None, blas: Blas = "mlx") -> list[RankLaunch]:
    """Return how each rank is started; on hosts in the order of the list, as many to each.

    Fewer ranks than hosts run on the first ones.

    Raises:
        UsageError: the hosts do not fit the number of ranks, or have no addresses.
    """
    given = hosts or Hosts(hosts=(Host(name=LOCAL[0]),))
    given = structs.replace(given, hosts=given.hosts[:ranks])
    if ranks % len(given.hosts):
        count = len(given.hosts)
        raise UsageError(f"ranks: got {ranks} on {count} hosts; it takes a multiple of {count}")
    each = ranks // len(given.hosts)
    placed = [host for host in given.hosts for _ in range(each)]
    free = iter(free_ports(ranks + 1) if all(host.local for host in given.hosts) else [])
    addresses = []
    for rank, host in enumerate(placed):
        port = host.port + rank % each if host.port else next(free, STARTING_PORT + rank)
        addresses.append(f"{host.address}:{port}")
    coordinator = f"{placed[0].address}:{next(free, COORDINATOR_PORT)}"
    places = Counter(host.name for host in placed)
    taken: Counter[str] = Counter()
    launches = []
    for rank, host in enumerate(placed):
        setting = RankSetting(
            rank=rank,
            ranks=ranks,
            addresses=tuple(addresses),
            coordinator=coordinator,
            backend=given.backend,
            rdma=tuple(other.rdma for other in placed) if given.backend == "jaccl" else (),
            place=taken[host.name],
            places=places[host.name],
            orphan_s=None if host.local else ORPHAN_S,
            blas=blas,
        )
        taken[host.name] += 1
        launches.append(_launch(setting, host, given))
    return launches


def _launch(setting: RankSetting, host: Host, hosts: Hosts) -> RankLaunch:
    worker = ("-m", "attention.engine.worker", "--rank", msgspec.json.encode(setting).decode())
    where = f"rank {setting.rank}"
    if host.local:
        return RankLaunch(setting=setting, host=host, command=(sys.executable, *worker), where=where)
    exports = [f"export {shlex.quote(each)}" for each in hosts.environment]
    folder = f"cd {shlex.quote(str(Path.cwd()))} 2>/dev/null"
    script = "; ".join([folder, *exports, shlex.join(["exec", hosts.python, *worker])])
    return RankLaunch(setting=setting, host=host, command=(*SSH, host.name, script), where=f"{where} ({host.name})")


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOCAL[0], 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def with_mark(launch: RankLaunch, mark: int) -> RankLaunch:
    """Return the launch of a rank on this machine that marks the running implementation."""
    return structs.replace(launch, command=(*launch.command, "--mark", str(mark)))
