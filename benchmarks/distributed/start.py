"""Start a group of ranks on this machine, by the environment variables that mlx.launch sets."""

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from msgspec import Struct


class RankResult(Struct, frozen=True):
    """How a rank ended."""

    rank: int
    returncode: int
    output: str
    """stdout and stderr."""


def start_ranks(
    ranks: int,
    command: Sequence[str],
    backend: str = "ring",
    timeout_s: float = 120,
    on_line: Callable[[str], None] | None = None,
) -> list[RankResult]:
    """Run a command once per rank and wait for all; if one fails or the time is up, the others are ended.

    Args:
        ranks: number of ranks; with "nccl" one GPU each.
        command: the program and its arguments.
        backend: "ring" or "nccl".
        timeout_s: time for all together.
        on_line: called with each line of rank 0, as it comes.
    """
    ports = _free_ports(ranks)
    with tempfile.TemporaryDirectory(prefix="fatui-ranks-") as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        logs = [(Path(folder) / f"rank-{rank}").open("w+") for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | rank_environment(rank, ranks, backend, hosts, ports[0]),
            )
            for rank, log in enumerate(logs)
        ]
        with (Path(folder) / "rank-0").open() as first:
            _wait(processes, time.monotonic() + timeout_s, lambda: _pass_lines(first, on_line))
            _pass_lines(first, on_line)
        results = []
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            log.seek(0)
            results.append(RankResult(rank, process.returncode, log.read()))
            log.close()
    return results


def rank_environment(rank: int, ranks: int, backend: str, hosts: Path, port: int) -> dict[str, str]:
    """Return the environment variables of a rank."""
    if backend == "ring":
        return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
    return {
        "CUDA_VISIBLE_DEVICES": str(rank),
        "MLX_RANK": str(rank),
        "MLX_WORLD_SIZE": str(ranks),
        "NCCL_HOST_IP": "127.0.0.1",
        "NCCL_PORT": str(port),
        "NCCL_NVLS_ENABLE": "0",
    }


def _pass_lines(log: TextIO, on_line: Callable[[str], None] | None) -> None:
    """Pass the whole lines that have come since the last call."""
    while on_line is not None:
        place = log.tell()
        text = log.readline()
        if not text.endswith("\n"):
            log.seek(place)
            return
        on_line(text.rstrip("\n"))


def _wait(processes: Sequence["subprocess.Popen[bytes]"], deadline: float, meanwhile: Callable[[], None]) -> None:
    """Wait for all processes; end the others if one fails or at the deadline."""
    while None in [process.poll() for process in processes]:
        meanwhile()
        if any(process.returncode not in (None, 0) for process in processes) or time.monotonic() > deadline:
            time.sleep(0.5)  # for the others to say why
            for process in processes:
                process.kill()
                process.wait()
            return
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
