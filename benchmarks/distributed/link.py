"""The link between ranks, measured: what peer copies fetch of other GPUs, copy within one, and all_gather."""

import time
from functools import partial
from statistics import median
from typing import Any, Final, cast

import mlx.core as mx

from attention.distributed import collectives
from attention.distributed.peers import RowPlan

PLANES: Final = 8
WIDTH: Final = 256
"""Numbers of a row: keys and values of 128."""
ROWS: Final = (64, 1024, 8192, 16384)
"""Rows of a plane that each rank gets of each other."""
REPEATS: Final = 9
QUEUED: Final = 8


def measure_link(group: collectives.Group) -> dict[str, Any]:
    """Return the row of the link: seconds by the bytes that a rank gets, and rates fitted to them.

    A gather by peer copies takes latency + bytes sent / send_bytes_per_s + bytes received / pull_bytes_per_s; what is
    sent is copied within a GPU first, and that rate is measured apart.
    """
    rank, ranks = group.rank(), group.size()
    peers, reason = collectives.peer_copies(group)
    measured = []
    for rows in ROWS if peers is not None else ROWS[:2]:
        part = mx.random.normal((1, PLANES, rows, WIDTH), key=mx.random.key(rank)).astype(mx.bfloat16)
        mx.eval(part)
        counts = {
            "bytes": (ranks - 1) * part.nbytes,
            "all_gather_s": _seconds(lambda x: _gathered(x, group), part, group),
        }
        if peers is not None:
            others = [other for other in range(ranks) if other != rank]
            needed = tuple((other, 0, place * rows, rows) for place, other in enumerate(others))
            pulled = RowPlan(((rank, 0, 0, rows),), needed, (rows,) * ranks, rows * len(others))
            within = RowPlan((), ((rank, 0, 0, rows),), (0,) * ranks, rows)
            for name, plan in (("peer_copies_s", pulled), ("within_s", within)):
                counts[name] = _seconds(partial(peers.gather, plan=plan), part, group)
        measured.append(counts)
    row: dict[str, Any] = {"part": "link", "ranks": ranks, "transport": collectives.transport(), "peer_copies": reason}
    row["measured"] = measured
    if peers is not None:
        row |= fitted(measured, ranks)
    return row


def fitted(measured: list[dict[str, float]], ranks: int) -> dict[str, float]:
    """Return rates and latency from the times of the fewest and of the most bytes."""
    few, many = measured[0], measured[-1]
    received = many["bytes"] - few["bytes"]
    sent = received / (ranks - 1)
    sending_s = many["within_s"] - few["within_s"]
    return {
        "send_bytes_per_s": sent / sending_s,
        "pull_bytes_per_s": received / (many["peer_copies_s"] - few["peer_copies_s"] - sending_s),
        "latency_s": few["peer_copies_s"],
    }


def _gathered(x: mx.array, group: collectives.Group) -> mx.array:
    return mx.distributed.all_gather(x, group=group, stream=collectives.communication_stream())


def _seconds(call: Any, x: mx.array, group: collectives.Group) -> float:
    """Return the median seconds of a call, one after another, of the slowest rank."""
    times = []
    for _ in range(REPEATS + 1):
        mx.eval(mx.distributed.all_sum(mx.array([1.0]), group=group))
        made = x
        started = time.perf_counter()
        for _ in range(QUEUED):
            made = call(mx.depends(x, made))
        mx.eval(made)
        mx.synchronize()
        times.append((time.perf_counter() - started) / QUEUED)
    every = mx.distributed.all_gather(mx.array([median(times[1:])], mx.float32), group=group)
    return max(cast("list[float]", every.tolist()))


def link_line(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    if "pull_bytes_per_s" not in row:
        most = row["measured"][-1]
        return f"link, {row['ranks']} ranks: all_gather {most['bytes'] / most['all_gather_s'] / 1e9:.1f} GB/s"
    return (
        f"link, {row['ranks']} ranks: fetched {row['pull_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"copied within a GPU {row['send_bytes_per_s'] / 1e9:.0f} GB/s, latency {row['latency_s'] * 1e6:.0f} us"
    )
