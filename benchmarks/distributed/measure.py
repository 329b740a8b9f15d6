"""One rank of `python -m benchmarks.distributed`: times each case on all ranks, paired with one device alone."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
import msgspec

from attention.distributed import collectives, decide, make_layout
from attention.distributed.bound_call import BoundCall
from attention.distributed.decision import Method
from attention.implementations import load_implementation
from attention.implementations.calls import MlxRunner, make_inputs
from attention.measure.accuracy import AccuracyChecker
from benchmarks.distributed.cases import Case, cases
from benchmarks.distributed.link import link_line, measure_link

ROUNDS: Final = 9
SAMPLE_S: Final = 0.05
QUEUED: Final = 8
"""Calls that are given to MLX at once; a model's layers are, too."""


def measure(case: Case, group: collectives.Group, implementation: str, method: Method | None) -> dict[str, Any]:
    """Return the row of a case: median times of the slowest rank, and ratios within rounds.

    A call begins when the one before has ended, on one device too, and calls are queued while others run. One device's
    time is the slowest device's too, since ranks wait for it; all devices' are `one_of_ranks_s`. `bytes_sent` are of
    all ranks.
    """
    workload = case.workload
    decision = decide(workload, group.size(), method=method, sharded_by="any" if method else "sequence")
    one: Any = OneOfRanks(0, 1)
    alone = BoundCall(workload, one, decide(workload, 1), implementation)
    call = BoundCall(workload, group, decision, implementation)
    arms: dict[str, Callable[[], list[mx.array]]] = {
        "one": alone.queue,
        "ranks": call.queue,
        "compute": call.queue_compute,
    }
    counts = {}
    for name, queue in arms.items():
        _sample(queue, 2, call)
        counts[name] = max(1, round(SAMPLE_S / max(call.of_ranks(_sample(queue, 2, call) / 2))))
    rounds = []
    one_of_ranks: list[list[float]] = []
    for _ in range(ROUNDS):
        times = {}
        for name, queue in arms.items():
            _sample(queue, counts[name], call)  # untimed: the sample's own clocks and power
            of_ranks = call.of_ranks(_sample(queue, counts[name], call) / counts[name])
            times[name] = max(of_ranks)
            if name == "one":
                one_of_ranks.append(of_ranks)
        rounds.append(times)
    medians = {name: statistics.median(times[name] for times in rounds) for name in arms}
    ratios = sorted(times["one"] / times["ranks"] for times in rounds)
    return {
        "part": case.part,
        "workload": msgspec.to_builtins(workload),
        "ranks": group.size(),
        "transport": collectives.transport(),
        "method": decision.method,
        "layout": call.layout.kind,
        "one_s": medians["one"],
        "one_of_ranks_s": [statistics.median(times) for times in zip(*one_of_ranks, strict=True)],
        "ranks_s": medians["ranks"],
        "compute_s": medians["compute"],
        "exposed_s": max(0.0, medians["ranks"] - medians["compute"]),
        "bytes_sent": round(sum(call.of_ranks(call.bytes_sent))),
        "speedup": statistics.median(ratios),
        "speedup_range": [ratios[0], ratios[-1]],
        "share_of_ideal": statistics.median(ratios) / group.size(),
        "target": case.target,
        "accurate": _accurate(case, call, group, implementation),
    }


def _sample(queue: Callable[[], list[mx.array]], calls: int, call: BoundCall) -> float:
    """Return the seconds of some calls, some of which are queued while others run."""
    call.barrier()
    started = time.perf_counter()
    for first in range(0, calls, QUEUED):
        mx.async_eval([queue() for _ in range(min(QUEUED, calls - first))])  # type: ignore[no-untyped-call]
    mx.synchronize()
    return time.perf_counter() - started


def _accurate(case: Case, call: BoundCall, group: collectives.Group, implementation: str) -> bool:
    """Return whether the ranks' output, and in training dQ, dK and dV, pass FlashAttention 3's rule.

    dK and dV of a long sequence are of a second call, whose output gradient is zero outside the compared rows.
    """
    results = call.gather_results()
    checker = AccuracyChecker(case.workload, make_inputs(case.workload, 0), case.workload.head_dim**-0.5)
    if checker.row_inputs is None:
        return checker.check(results).accurate
    of_rows = BoundCall(case.workload, group, call.decision, implementation, inputs=checker.row_inputs)
    return checker.check(results, of_rows.gather_results()).accurate


class OneOfRanks:
    """A rank of a group that does not exist: for the time of its computation on this device alone."""

    def __init__(self, rank: int, ranks: int) -> None:
        """Create it."""
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        """Return its rank."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._ranks


def simulate(case: Case, ranks: int, implementation: str, bytes_per_s: float, latency_s: float) -> dict[str, Any]:
    """Return the row of a case on more devices than there are: computation measured here, communication computed.

    Each of up to four ranks' computations is timed on this device, without communication. What arrives before the
    first piece is computed is exposed, and what the computation of the other pieces does not cover.
    """
    workload = case.workload
    decision = decide(workload, ranks, sharded_by="sequence")
    scale = workload.head_dim**-0.5
    inputs = make_inputs(workload, 0)
    alone = MlxRunner(load_implementation(implementation), workload, inputs, scale)
    one_s = _median_s(alone.queue)
    del alone, inputs
    mx.clear_cache()
    computing = {}
    for rank in sorted({0, 1, ranks // 2, ranks - 1}):
        group: Any = OneOfRanks(rank, ranks)
        call = BoundCall(workload, group, decision, implementation, communicate=False)
        computing[rank] = _median_s(call.queue)
        del call
        mx.clear_cache()
    moving = max(decision.bytes_sent) / bytes_per_s + 2 * latency_s
    slowest = max(computing.values())
    if decision.method == "split keys":
        exposed = moving
    else:
        first = moving / 8  # the first piece is an eighth of the K/V heads
        exposed = first + max(0.0, moving - first - slowest / 8)
    return {
        "part": case.part,
        "workload": msgspec.to_builtins(workload),
        "ranks": ranks,
        "simulated": True,
        "method": decision.method,
        "layout": make_layout(workload.seq, ranks, decision.layout).kind,
        "one_s": one_s,
        "compute_s": slowest,
        "compute_of_ranks_s": computing,
        "bytes_sent": sum(decision.bytes_sent),
        "bytes_per_s": bytes_per_s,
        "exposed_s": exposed,
        "ranks_s": slowest + exposed,
        "share_of_computation": one_s / ranks / slowest,
        "share_of_ideal": one_s / ranks / (slowest + exposed),
    }


def _median_s(queue: Callable[[], list[mx.array]]) -> float:
    """Return the median seconds of a call, of samples of some calls queued together."""

    def sample(calls: int) -> float:
        mx.synchronize()
        started = time.perf_counter()
        mx.eval([queue() for _ in range(calls)])
        mx.synchronize()
        return (time.perf_counter() - started) / calls

    sample(1)
    calls = max(1, round(SAMPLE_S / sample(2)))
    return statistics.median(sample(calls) for _ in range(5))


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    workload = row["workload"]
    length = workload["kv_seq"] if workload["pass"] == "decode" else workload["seq"]
    target = f" (target {row['target']:.0%})" if row.get("target") else ""
    accurate = {True: "accurate", False: "NOT ACCURATE", None: ""}[row.get("accurate")]
    kind = "simulated " if row.get("simulated") else ""
    return (
        f"{row['part']:9} {workload['mask']:14} {length:>8,} {kind}"
        f"{row['ranks']} ranks, {row['method']}, {row['layout']}: "
        f"one {row['one_s'] * 1e3:.3f} ms, ranks {row['ranks_s'] * 1e3:.3f}, computing {row['compute_s'] * 1e3:.3f}, "
        f"exposed {row['exposed_s'] * 1e3:.3f}; {row['bytes_sent'] / 1e6:.1f} MB sent; "
        f"{row['share_of_ideal']:.1%} of ideal{target} {accurate}"
    )


def main() -> int:
    """Measure the parts named as arguments; rank 0 prints lines, and rows as JSON after `ROW`."""
    implementation, backend, method, *parts = sys.argv[1:]
    group = mx.distributed.init(strict=True, backend=backend)
    if not parts or "link" in parts:
        row = measure_link(group)
        if group.rank() == 0:
            print(link_line(row), flush=True)
            print("ROW", msgspec.json.encode(row).decode(), flush=True)
    for case in cases(parts, mx.default_device() == mx.gpu):
        if group.rank() == 0:
            print(f"measuring {case.part}, {case.workload.label} ...", flush=True)
        row = measure(case, group, implementation, None if method == "-" else method)  # type: ignore[arg-type]
        if group.rank() == 0:
            print(line(row), flush=True)
            print("ROW", msgspec.json.encode(row).decode(), flush=True)
        mx.clear_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
