"""An ssh server on this machine for one test, with keys and a configuration of its own; and a program in ssh's place.

The server is OpenSSH's, for the user that runs the tests, on a free port of 127.0.0.1, where its host is `loopback`, or
of an address in a network namespace.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from fatui.rank_launch import free_ports
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
HOST = "loopback"
SERVER = """Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/pid
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
CLIENT = """Host {host}
    HostName {address}
    Port {port}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking accept-new
"""
WITHOUT_SSH = """#!/bin/sh
# ssh [OPTION...] [--] HOST COMMAND, for a host that is this machine, whose shell prints something first
while true; do case $1 in --) shift; break;; -o|-p|-i|-F|-J) shift 2;; -*) shift;; *) break;; esac; done
shift
cd "$HOME"
echo Welcome
exec setsid -w sh -c "$*"
"""
PYTHON = """#!/bin/sh
export PYTHONPATH={root} FATUI_CACHE_DIR={cache} HOME={folder} {more}
exec {python} "$@"
"""


def unavailable():
    """Return why there can be no server here, or an empty string."""
    missing = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None]
    if server_program() is None:
        missing.append("sshd")
    return f"needs {', '.join(missing)} (apt install openssh-server)" if missing else ""


def server_program():
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def remote_python(folder, more=""):
    """Write a program that starts this Python with this checkout, as an environment of another machine would."""
    program = folder / "remote-python"
    cache = os.environ.get("FATUI_CACHE_DIR", folder / "cache")
    program.write_text(PYTHON.format(root=ROOT, cache=cache, folder=folder, python=sys.executable, more=more))
    program.chmod(0o755)
    return str(program)


@contextlib.contextmanager
def instead_of_ssh(folder, program=WITHOUT_SSH):
    """Put a program `ssh` first on the path, which executes the command on this machine."""
    path = folder / "bin" / "ssh"
    path.parent.mkdir(exist_ok=True)
    path.write_text(program)
    path.chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{path.parent}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


class Sshd:
    """The server.

    Attributes:
        options: of ssh, for its client.
    """

    def __init__(self, folder, address="127.0.0.1", inside=()):
        """Create it; `inside` is a command that executes others where the address is."""
        self.folder, self._address, self._inside = Path(folder), address, inside
        self.options = ("-F", str(self.folder / "config"))
        self._process = None

    def __enter__(self):
        for name in ("host_key", "key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name]
            subprocess.run(command, check=True, capture_output=True)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        (self.port,) = free_ports(1)
        values = {"port": self.port, "folder": self.folder, "host": HOST, "address": self._address}
        (self.folder / "sshd_config").write_text(SERVER.format(**values))
        (self.folder / "config").write_text(CLIENT.format(**values))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where a server of root separates its privileges
        self.start()
        return self

    def __exit__(self, *_):
        self.cut()
        self.stop()

    def start(self):
        """Start the server, and wait until it answers."""
        log = self.folder / "log"
        log.write_text("")
        command = [*self._inside, server_program(), "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)]
        self._process = subprocess.Popen(command, start_new_session=True)
        end = time.monotonic() + patient(10)
        while "Server listening" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)

    def stop(self):
        """Stop the server; connections go on."""
        self._process.terminate()
        self._process.wait()

    def connections(self):
        """Return the server's processes for connections; none of a server that was stopped."""
        if self._process.poll() is not None:
            return []
        started = psutil.Process(self._process.pid).children(recursive=True)
        return [each for each in started if each.name().startswith("sshd")]

    def cut(self):
        """End every connection, as a server does that is killed."""
        self.signal(signal.SIGKILL)

    def signal(self, number):
        """Signal the processes of all connections."""
        for each in self.connections():
            with contextlib.suppress(psutil.Error):
                each.send_signal(number)
