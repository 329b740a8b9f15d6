"""Predictions for more GPUs than there are, from one GPU's measured times, the kernels' schedule, and the bytes.

A rank's computation takes one GPU's time, by the steps of the longest list of a multiprocessor in each schedule. What
others need is copied within a GPU first, what is needed arrives by one copy engine at a time, after a latency: the link
as it was measured on two GPUs. With two launches the second waits for the rest of the copies.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct

from attention.core.workload import Workload
from attention.distributed import decide, make_layout
from attention.distributed.exchange import Seen, make_exchange
from attention.distributed.one_launch import Arrangement, arrange, head_groups
from attention.kernels.cuda.sm90.forward import Forward, fewer_consumers, specialise
from attention.kernels.cuda.sm90.schedule import TILE_OVERHEAD, make_work_items

MULTIPROCESSORS: Final = 132


class PeerLink(Struct, frozen=True):
    """What peer copies between GPUs of one host take; as measured on two H200s."""

    pull_bytes_per_s: float = 340e9
    """Fetched from another GPU."""
    send_bytes_per_s: float = 833e9
    """Copied within a GPU."""
    latency_s: float = 81e-6


H200: Final = PeerLink()


def predict(workload: Workload, ranks: int, one_s: float, link: PeerLink = H200) -> dict[str, Any]:
    """Return the row of a causal call, or one with a window, by `poc` on GPUs of one host.

    Args:
        workload: the call.
        ranks: number of GPUs.
        one_s: measured seconds on one.
        link: between the GPUs.
    """
    layout = make_layout(workload.seq, ranks, decide(workload, ranks, sharded_by="sequence").layout)
    seen = Seen((workload.batch, workload.heads), causal=workload.causal, window=workload.window)
    arranged = arrange(make_exchange(layout, layout, seen))
    assert arranged is not None
    row_bytes = workload.kv_heads * (workload.head_dim + workload.value_dim) * 2
    groups = head_groups(arranged, workload.batch, workload.kv_heads, row_bytes)
    unit_s = one_s / _steps(workload, workload.kv_heads, workload.seq, workload.seq, lambda row: row)
    times = [
        _rank_s(workload, own, layout.rows(rank), row_bytes, groups, unit_s, own.plan.contributed[rank], link)
        for rank, own in enumerate(arranged)
    ]
    ranks_s, compute_s = max(times)
    return {
        "part": "forward" if workload.window is None else "window",
        "predicted": True,
        "seq": workload.seq,
        "mask": workload.mask,
        "ranks": ranks,
        "one_s": one_s,
        "compute_s": compute_s,
        "ranks_s": ranks_s,
        "pull_bytes_per_s": link.pull_bytes_per_s,
        "received_bytes": max(own.plan.rows for own in arranged) * row_bytes,
        "share_of_ideal": one_s / ranks / ranks_s,
    }


def _rank_s(
    workload: Workload,
    own: Arrangement,
    rows: int,
    row_bytes: int,
    groups: Sequence[int],
    unit_s: float,
    sent: int,
    link: PeerLink,
) -> tuple[float, float]:
    """Return the seconds of a rank's call, and of its computation."""

    def position(row: int) -> int:
        return row + own.shifts[row >= own.second]

    computing = [_steps(workload, count, rows, own.keys, position) * unit_s for count in groups]
    copies = [own.plan.rows * row_bytes * count / workload.kv_heads / link.pull_bytes_per_s for count in groups]
    begins = link.latency_s + sent * row_bytes / link.send_bytes_per_s
    ends = begins + copies[0] + computing[0]
    if len(groups) > 1:
        ends = max(ends, begins + sum(copies)) + computing[1]
    return ends, sum(computing)


def _steps(workload: Workload, kv_heads: int, rows: int, keys: int, position: Callable[[int], int]) -> float:
    """Return the time of a launch in steps of a key tile, by the specialisation that needs the least."""
    largest = specialise(workload.head_dim, workload.causal, "bf16", workload.window is not None)

    def steps(kernel: Forward) -> float:
        ranges = kernel.tile_ranges(rows, keys, workload.window or 0, position)
        planes = kv_heads * workload.heads // workload.kv_heads
        plane_bytes = 4 * keys * workload.head_dim * workload.kv_heads // workload.heads
        table, _ = make_work_items(MULTIPROCESSORS, planes, ranges, plane_bytes, kernel.joining)
        return max(map(_load, table)) * kernel.step_time

    return min(map(steps, [largest, *fewer_consumers(largest)]))


def _load(items: Sequence[Sequence[int]]) -> float:
    return sum(work[3] - work[2] + TILE_OVERHEAD for work in items if work[0] >= 0)


def prediction_line(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    return (
        f"{row['mask']:12} {row['seq']:>8,} predicted {row['ranks']} ranks: one {row['one_s'] * 1e3:.3f} ms, "
        f"ranks {row['ranks_s'] * 1e3:.3f}, computing {row['compute_s'] * 1e3:.3f}; "
        f"{row['received_bytes'] / 1e6:.1f} MB received; {row['share_of_ideal']:.1%} of ideal"
    )
