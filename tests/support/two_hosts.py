"""Two network namespaces of this machine as two hosts, joined by a link with a delay, loss, a rate, and a switch.

    namespace a   tun 10.213.77.1 ─▶ ┐ this file as a process: waits, drops, ┌ ─▶ tun 10.213.77.2   namespace b
                                  ◀─ ┘ or forwards nothing while cut         └ ◀─

The link is a process and not the kernel's netem, which not every kernel has. It needs root and /dev/net/tun.
`VethHosts` have the kernel's own link, a veth pair, whose rate its token bucket filter (`tc ... tbf`) limits.
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

ADDRESSES = ("10.213.77.1", "10.213.77.2")
MTU = 9000
DEVICE = "fatui0"
TUNSETIFF = 0x400454CA
TUN_WITHOUT_HEADER = 0x1001
CLONE_NEWNET = 0x40000000
SSH = """#!/bin/bash
# ssh -o ... HOST COMMAND, for hosts that are network namespaces
while [[ $1 == -o ]]; do shift 2; done
host=$1; shift
exec ip netns exec "$host" bash -c "$*"
"""


def unavailable() -> str:
    """Return why there can be no such hosts here, or an empty string."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists() or shutil.which("ip") is None:
        return "network namespaces need /dev/net/tun and the command ip"
    return ""


class TwoHosts:
    """The two namespaces.

    Attributes:
        names: of the namespaces, and of the hosts for `ssh`.
    """

    def __init__(self, folder: Path, *, delay_s: float = 0.0, loss: float = 0.0, bytes_per_s: float = 1e9) -> None:
        self.names = tuple(f"fatui-{letter}-{os.getpid()}" for letter in "ab")
        self._folder = folder
        self._options = (str(delay_s), str(loss), str(bytes_per_s))
        self._link: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_up(self) -> None:
        self._add_namespaces()
        command = [sys.executable, __file__, *self.names, *self._options]
        self._link = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._link.stdout is not None
        assert self._link.stdout.readline() == "ready\n"
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "dev", DEVICE, "mtu", str(MTU), "up")

    def _add_namespaces(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def __exit__(self, *error: object) -> None:
        if self._link is not None:
            self._link.kill()
            self._link.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self) -> None:
        """Forward nothing from now on; connections stay open."""
        self._say("cut")

    def mend(self) -> None:
        """Forward again."""
        self._say("mend")

    def _say(self, word: str) -> None:
        assert self._link is not None
        assert self._link.stdin is not None
        self._link.stdin.write(f"{word}\n")
        self._link.stdin.flush()

    def hostfile(self) -> str:
        """Write a hostfile of mlx.launch, and return its path."""
        path = self._folder / "hosts.json"
        hosts = [{"ssh": name, "ips": [address]} for name, address in zip(self.names, ADDRESSES, strict=True)]
        path.write_text(json.dumps({"backend": "ring", "envs": [], "hosts": hosts}))
        return str(path)

    @contextlib.contextmanager
    def reachable_by_ssh(self) -> Iterator[None]:
        """Put a command `ssh` that enters the namespaces first on the path."""
        program = self._folder / "ssh"
        program.write_text(SSH)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{self._folder}:{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before


class VethHosts(TwoHosts):
    """Two namespaces joined by a veth pair, with a rate by the kernel's tbf if one is given; no delay, no loss."""

    def __init__(self, folder: Path, *, bytes_per_s: float | None = None) -> None:
        super().__init__(folder)
        self._bytes_per_s = bytes_per_s

    def _set_up(self) -> None:
        self._add_namespaces()
        one, other = self.names
        _run(*f"ip link add {DEVICE} netns {one} type veth peer name {DEVICE} netns {other}".split())
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "dev", DEVICE, "up")
            if self._bytes_per_s is not None:
                limits = f"rate {8 * self._bytes_per_s:.0f}bit burst 32kb latency 50ms"
                _run("ip", "netns", "exec", name, *f"tc qdisc add dev {DEVICE} root tbf {limits}".split())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _open_tun(namespace: str) -> int:
    """Return a tun device named DEVICE of a network namespace, which this process enters."""
    handle = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(handle)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), TUN_WITHOUT_HEADER))
    return tun


def forward(names: list[str], delay_s: float, loss: float, bytes_per_s: float) -> None:
    """Forward packets between two namespaces until stdin ends; "cut" and "mend" on stdin switch the link."""
    ends = [_open_tun(name) for name in names]
    print("ready", flush=True)
    draw, cut = random.Random(0), False
    waiting: list[tuple[float, int, int, bytes]] = []
    free_s = [0.0, 0.0]
    count = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, end, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                os.write(ends[end], packet)
        timeout = max(0.0, waiting[0][0] - now) if waiting else 1.0
        for ready in select.select([*ends, 0], [], [], timeout)[0]:
            if ready == 0:
                word = os.read(0, 64).decode().strip()
                if not word:
                    return
                cut = word.endswith("cut")
                continue
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    packet, end = os.read(ready, 65536), 1 - ends.index(ready)
                    if cut or draw.random() < loss:
                        continue
                    count += 1
                    free_s[end] = max(free_s[end], time.monotonic()) + len(packet) / bytes_per_s
                    heapq.heappush(waiting, (free_s[end] + delay_s, count, end, packet))


if __name__ == "__main__":
    forward(sys.argv[1:3], *map(float, sys.argv[3:]))
